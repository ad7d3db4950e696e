"""8-bit AdamW: both moments as block-wise 8-bit codes of a dynamic map."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tare.core.storage import Storage
from tare.methods.adamw import adamw_recipe
from tare.methods.base import Method
from tare.methods.registry import Card, register

CARD = Card(
    key="adamw-8bit",
    title="8-bit Optimizers via Block-wise Quantization",
    authors="Dettmers, Lewis, Shleifer, Zettlemoyer",
    year=2022,
    arxiv="2110.02861",
    idea="Keep Adam's moments as 8-bit codes of a non-linear map with one scale per block of 256; compute in fp32.",
    axes={"rule": "Adam", "subspace": "none", "storage": "int8, block 256", "release": "yes"},
    defaults={
        "lr": "1e-3 (bitsandbytes)", "betas": "(0.9, 0.999)", "eps": "1e-8", "weight_decay": "1e-2 (bitsandbytes)",
        "block": "256 (bitsandbytes since 0.44; paper 2048)", "min_quantized": "4096 (bitsandbytes)",
    },
    presets={"*": {"lr": 1e-3, "weight_decay": 0.0}},
    limits=(
        "Second-moment entries below 1.6e-7 of their block's largest become zero.",
        "Blocks follow memory order: rows of very different scale in one block lose precision.",
    ),
    differences=(
        "Codes are the nearest map value (the portable quantiser); the native CPU quantiser of bitsandbytes 0.50 is up "
        "to 7 codes off for small values.",
        "Decay comes before the update (bitsandbytes on CPU; its CUDA kernel decays after) and codes get no sign fix.",
        "Embeddings are quantised like the rest; bitsandbytes does the same unless an override is registered. "
        "stable_embedding=True keeps their moments in fp32; `tare.stable_embedding_(model)` is the other half, the layer.",
    ),
    auto_rank=20,
    state="2 m n (1 + 4/256)",
)  # fmt: skip


@register(CARD)
class AdamW8bit(Method):
    """AdamW whose moments live in 8 bits (arXiv 2110.02861).

    Args:
        block: elements per absmax. min_quantized: smaller tensors keep fp32 moments.
        stable_embedding: embeddings keep fp32 moments, as the paper's stable embedding does; the layer that belongs to it
            is put in by `tare.stable_embedding_(model)`.
        storage: overrides block and min_quantized.

    >>> import torch
    >>> AdamW8bit(torch.nn.Linear(64, 64, bias=False), lr=1e-3).state_bytes().total  # 2 * 4096 * (1 + 4/256)
    8320
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, block: int = 256, min_quantized: int = 4096, stable_embedding: bool = False,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        own = Storage(moment="int8", block=block, min_quantized=min_quantized)
        kept = own if storage is None else Storage.of(storage)
        if stable_embedding:
            kept = replace(kept, keep=tuple(dict.fromkeys((*kept.keep, "embedding"))))
        super().__init__(
            params, lr, adamw_recipe, {"betas": betas, "eps": eps}, weight_decay=weight_decay, storage=kept,
            release=release, seed=seed, maximize=maximize,
        )  # fmt: skip
