"""4-bit AdamW: both moments as two codes a byte, one scale for 128 elements."""

from typing import Any

from torch import Tensor

from tare.core.storage import Storage
from tare.methods.adamw import adamw_recipe
from tare.methods.base import Method
from tare.methods.registry import Card, register

CARD = Card(
    key="adamw-4bit",
    title="Memory Efficient Optimizers with 4-bit States",
    authors="Li, Chen, Zhu",
    year=2023,
    arxiv="2309.01507",
    idea="Keep Adam's moments as 4-bit codes, two a byte, one scale per block of 128; no zero among the second moments.",
    axes={"rule": "Adam", "subspace": "none", "storage": "int4, block 128", "release": "yes"},
    defaults={
        "lr": "1e-3 (published code)", "betas": "(0.9, 0.999)", "eps": "1e-8", "weight_decay": "1e-2 (published code)",
        "block": "128 (paper)", "min_quantized": "4096 (published code)",
    },
    presets={"*": {"lr": 1e-3, "weight_decay": 0.0}},
    limits=(
        "Second moments below a thirty-second of their block's largest count as a sixteenth of it: such weights move "
        "too little.",
        "A second moment changes its code only when it has moved by half of a sixteenth of its block's largest within one "
        "step; with beta2 = 0.999 it mostly follows its block.",
        "A block's most negative first moment comes back as 0.8875 of itself: the map has +1 but not -1.",
        "Blocks follow memory order: rows of very different scale in one block lose precision.",
    ),
    differences=(
        "The paper normalises second moments of matrices by the lesser of their row's and their column's maximum "
        "(rank-1). Here both moments have blocks of 128, as in the published fused optimizer and in torchao: one pass, no "
        "maxima over the whole matrix first, and it can be cut for shards.",
        "Codes are rounded to nearest, as by default in the published code; a tie goes to the lower code.",
        "Decay comes before the update, and eps is added after bias correction (torch's AdamW).",
        "Embeddings are quantised like the rest; storage keep=('embedding',) leaves their moments in fp32.",
    ),
    auto_rank=65,
    state="2 m n (1/2 + 4/128)",
)  # fmt: skip


@register(CARD)
class AdamW4bit(Method):
    """AdamW whose moments live in 4 bits (arXiv 2309.01507).

    Args:
        block: elements per absmax, even. min_quantized: smaller tensors keep fp32 moments.
        storage: overrides both.

    >>> import torch
    >>> AdamW4bit(torch.nn.Linear(64, 64, bias=False), lr=1e-3).state_bytes().total  # 2 * 4096 * (1/2 + 4/128)
    4352
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, block: int = 128, min_quantized: int = 4096,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        kept = storage if storage is not None else Storage(moment="int4", block=block, min_quantized=min_quantized)
        super().__init__(
            params, lr, adamw_recipe, {"betas": betas, "eps": eps}, weight_decay=weight_decay, storage=kept,
            release=release, seed=seed, maximize=maximize,
        )  # fmt: skip
