"""Q-GaLore: GaLore with int4 projections, 8-bit moments, int8 weights, and layers that refresh their basis only while it moves."""

from typing import Any, Literal

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.core.weights import holds_int8
from tare.methods.base import TARGETS, Method
from tare.methods.galore import LARGE_PRESETS, llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.subspace.bases import Basis, SVDBasis
from tare.subspace.catalogue import instead
from tare.subspace.refresh import AdaptiveRefresh
from tare.subspace.wrapper import Subspace

CARD = Card(
    key="q-galore",
    title="Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
    authors="Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang",
    year=2024,
    arxiv="2407.08296",
    idea="Keep GaLore's projection in 4 bits, its moments in 8, the weights in 8 with stochastic rounding, and double a "
    "layer's refresh interval whenever its subspace has stopped moving.",
    axes={
        "rule": "Adam, eps after bias correction", "basis": "SVD of G on the shorter side, int4 in groups of 256",
        "refresh": "T = 200, doubled per leaf while similarity >= 0.4", "transfer": "keep", "lift": "back-projection x 0.25",
        "residual": "dropped", "storage": "int8 moments, int4 basis, int8 weights where the model is quantised",
        "release": "accumulates",
    },
    defaults={
        "lr": "0.015 (60M, 130M), 0.01 (350M, 1B), 0.004 (7B)", "rank": "128, 256, 256, 512, 1024", "period": "200 (500 at 7B)",
        "scale": "0.25", "threshold": "0.4", "growth": "2", "queue": "5", "betas": "(0.9, 0.95) (code; its per-layer path "
        "0.999)", "eps": "1e-8 (bitsandbytes)", "weight_decay": "0",
    },
    presets={
        **llama_presets(1e-2),
        **LARGE_PRESETS,
        "llama-60m": {"lr": 1.5e-2, "rank": 128},
        "llama-130m": {"lr": 1.5e-2, "rank": 256},
        "llama-7b": {"lr": 4e-3, "rank": 1024, "period": 500},
    },
    limits=(
        "In a loop of your own, weights are int8 where `tare.quantize_weights_(model)` made them so, others stay as they are; "
        "`tare train --method q-galore` quantises the linear ones (`--storage.weight plain` leaves them).",
        "Embedding, head and norms keep dense 8-bit Adam (below 4,096 elements fp32).",
    ),
    differences=(
        "Similarity of two bases: the code takes the signed cosine of their first vectors, whose signs are arbitrary and "
        "cancel; the paper speaks of projection matrices. Default `projector`, |P_old^T P_new|^2 / r; `vector` is the code.",
        "int4 codes go two a byte; the code keeps one a byte.",
        "Stochastic rounding of weights is done in fp32 with a zero point that is not clamped: in bf16 a third of the "
        "fractions vanish, and the code's clamp destroys groups of one sign.",
        "In release mode embedding, norms and head are trained; in the code's per-layer mode they never are.",
    ),
    auto_rank=58,
    release="accumulates",
    state="2 r l (1 + 4/256) + r s (1/2 + 5/256)",
)  # fmt: skip


def q_galore_recipe(
    rank: int, period: int, scale: float, threshold: float, growth: float, queue: int, similarity: str, side: str,
    basis: str | Basis | None, betas: tuple[float, float], eps: float, transfer: str, stagger: bool, targets: Match,
) -> Recipe:  # fmt: skip
    rule = Adam(betas, eps, "after")
    calendar = AdaptiveRefresh(period, stagger, "start", threshold, growth, queue, similarity)  # type: ignore[arg-type]
    low = Subspace(rule, instead(basis, SVDBasis(rank)), calendar, side_name(side), transfer, scale=scale)  # type: ignore[arg-type]
    return Recipe(((targets, low), ("*", rule)), decay="after")


@register(CARD)
class QGaLore(Method):
    """GaLore with P in int4, moments in int8 and an adaptive calendar (Zhang et al. 2024, arXiv 2407.08296).

    Args:
        params: module, tensors, named tensors or groups; weights made int8 by `tare.quantize_weights_` stay int8.
        lr, rank, scale, side, basis, eps, weight_decay, transfer, stagger, targets: as `GaLore`.
        period: T, the first interval between refreshes of a leaf.
        threshold, growth, queue: a leaf's interval is multiplied by `growth` when the mean of its last `queue` similarities
            reaches `threshold`.
        similarity: `projector` (default), `vector` (the code's signed cosine of first vectors), or `absolute`, its size.
        betas: of Adam.
        storage: default int8 moments, int4 basis, and int8 weights where the model has them.
        release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = QGaLore(torch.nn.Linear(256, 128, bias=False), lr=1e-2, rank=32)
    >>> opt.state_bytes().by_kind["basis"] == 32 * 128 // 2 + 16 * 5  # codes, then a scale and a zero for each of 16 groups
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 128, period: int = 200, scale: float = 0.25, *,
        threshold: float = 0.4, growth: float = 2.0, queue: int = 5,
        similarity: Literal["projector", "vector", "absolute"] = "projector", side: str = "shorter",
        basis: str | Basis | None = None, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.0, transfer: str = "keep", stagger: bool = False, targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "threshold": threshold, "growth": growth, "queue": queue,
            "similarity": similarity, "side": side, "basis": basis, "betas": betas, "eps": eps, "transfer": transfer,
            "stagger": stagger, "targets": targets,
        }  # fmt: skip
        if storage is None:
            params, quantized = holds_int8(params)
            storage = Storage(moment="int8", basis="int4", weight="int8" if quantized else "plain")
        super().__init__(
            params, lr, q_galore_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
