"""DCT-AdamW: Adam on the coordinates of a fixed cosine basis that align best with the gradient; only their numbers are kept."""

from typing import Any, Literal

from torch import Tensor

from tare.core.checks import check_choice
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.galore import LARGE_PRESETS, LLAMA_RANKS, SMALL, side_name
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.subspace.bases import Basis
from tare.subspace.catalogue import instead
from tare.subspace.dct import DCTBasis
from tare.subspace.refresh import Refresh
from tare.subspace.residual import FeedbackResidual
from tare.subspace.wrapper import Subspace

CARD = Card(
    key="dct-adamw",
    title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    authors="Modoranu, Safaryan, Schultheis, Ryabinin, Chumachenko, Alistarh",
    year=2025,
    arxiv="2505.17967",
    idea="Choose the r columns of a fixed orthogonal cosine (DCT) matrix that align best with the gradient and run Adam there; "
    "what the subspace misses may be fed back into the next gradient.",
    axes={
        "rule": "Adam, eps after bias correction", "basis": "top-r columns of a DCT matrix by L1 alignment",
        "refresh": "T = 1", "transfer": "rotate: an exact gather", "lift": "back-projection",
        "residual": "dropped, or error feedback in the moments' precision, 8 or 4 bits",
        "release": "accumulates without error feedback",
    },
    defaults={
        "lr": "1e-3", "rank": "256 (code's example)", "period": "1 (code)", "transform": "matmul", "norm": "1 (code)",
        "feedback": "none", "eps": "1e-8", "weight_decay": "0",
    },
    presets={
        **{f"llama-{n}": {"lr": 2.5e-3, "rank": LLAMA_RANKS[n]} for n in SMALL},
        **{f"llama-{n}": {"lr": 1e-3, "rank": r} for n, r in LLAMA_RANKS.items() if n not in SMALL},
        **{n: {"lr": 1e-3, "rank": p["rank"]} for n, p in LARGE_PRESETS.items()},
    },
    limits=(
        "One s x s cosine matrix for each size of a projected side is shared by all leaves of that size.",
        "Coordinates that enter with zero moments while Adam's bias correction is long over take large first steps (3 to 6 "
        "learning rates); transfer='zero' restarts the count of all instead.",
        "With feedback the whole gradient is needed: no small accumulation in release mode.",
    ),
    differences=(
        "transfer: the code rotates only when asked, and its product overwrites its own input; here the rotation is the "
        "exact gather that it stands for, and the default. transfer='keep' leaves moments in their slots, as the code does "
        "without rotation: the result then depends on the order of the chosen columns.",
        "The code's 4-bit feedback is scrambled and its 8-bit feedback uses 15 levels; here both round-trip.",
        "`matmul` and `makhoul` are two different bases (D and its transpose), as in the code; any number of sizes may be "
        "shared, the code hard-wires one.",
        "Bias correction and calendar count a tensor's own updates; the code has one count for all, which differs where "
        "gradients are missing at some steps.",
        "A refresh on a zero gradient keeps the columns and is tried again; the code takes whichever a tie of zeros gives.",
        "norm: the code scores by L1; norm=2 minimises the projection error, as the theorem has it.",
        "The code projects every 2-D parameter with sides below 32,000 (a small vocabulary too); here linear weights.",
    ),
    auto_rank=72,
    release="accumulates",
    state="4 (2 r l + r), + m n for feedback in 1/2, 1 or 4 bytes",
)  # fmt: skip


def feedback_residual(feedback: str, share: float = 1.0) -> FeedbackResidual | None:
    """The error feedback by its storage; None for `none`."""
    check_choice("feedback", feedback, ("none", "moment", "int8", "int4"))
    return None if feedback == "none" else FeedbackResidual(share, feedback)  # type: ignore[arg-type]


def dct_recipe(
    rank: int, period: int, transform: str, norm: int, feedback: str, scale: float, side: str, basis: str | Basis | None,
    betas: tuple[float, float], eps: float, transfer: str, targets: Match,
) -> Recipe:  # fmt: skip
    rule = Adam(betas, eps, "after")
    own = DCTBasis(rank, transform, norm)  # type: ignore[arg-type]
    low = Subspace(
        rule, instead(basis, own), Refresh(period, at="end"), side_name(side),
        transfer, scale=scale, residual=feedback_residual(feedback),  # type: ignore[arg-type]
    )  # fmt: skip
    return Recipe(((targets, low), ("*", rule)), decay="before")


@register(CARD)
class DCTAdamW(Method):
    """A = G + E; R = A Q_I; W <- (1 - lr wd) W - lr Adam(R) Q_I^T; E = A - R Q_I^T (Modoranu et al. 2025, arXiv 2505.17967).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights are projected.
        lr: learning rate.
        rank: r, cosines kept.
        period: updates between selections, at updates 1, period, 2 period, ...
        transform: `matmul` scores by a product with D, `makhoul` by an FFT with its transpose.
        norm: 1 or 2, of the score.
        feedback: what the subspace misses: `none` (dropped), or fed back and kept as `moment`, `int8` or `int4`.
        scale: multiplies the lifted update.
        transfer: `rotate` (kept columns keep their moments, new ones start at zero), `keep` or `zero`.
        basis: recorded selections in place of the search.
        side, betas, eps, weight_decay, targets, storage, release, seed, maximize: see `GaLore`; decay comes first.

    >>> import torch
    >>> opt = DCTAdamW(torch.nn.Linear(16, 8, bias=False), lr=1e-3, rank=4)
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16) + 4 * 4
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, rank: int = 256, period: int = 1, *,
        transform: Literal["matmul", "makhoul"] = "matmul", norm: int = 1,
        feedback: Literal["none", "moment", "int8", "int4"] = "none", scale: float = 1.0, side: str = "shorter",
        basis: str | Basis | None = None, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, transfer: str = "rotate", targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "transform": transform, "norm": norm, "feedback": feedback, "scale": scale,
            "side": side, "basis": basis, "betas": betas, "eps": eps, "transfer": transfer, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, dct_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
