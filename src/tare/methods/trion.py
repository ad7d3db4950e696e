"""Trion: Muon in low rank: the momentum's r best cosine coordinates are orthogonalised, the rest stays in the momentum."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.leaf import Leaf
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base import TARGETS, Method
from tare.methods.dct_adamw import CARD as DCT
from tare.methods.galore import LARGE_PRESETS, LLAMA_RANKS, SMALL
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.maps import Orthogonal
from tare.rules.own_rate import OwnRate
from tare.rules.stateless import Stateless
from tare.subspace.bases import Basis
from tare.subspace.catalogue import instead
from tare.subspace.dct import DCTBasis
from tare.subspace.refresh import Refresh
from tare.subspace.residual import FeedbackResidual
from tare.subspace.wrapper import Subspace

FACTORS = ("none", "muon", "spectral", "moonlight")

CARD = Card(
    key="trion",
    title=DCT.title + " (Trion)",
    authors=DCT.authors,
    year=DCT.year,
    arxiv=DCT.arxiv,
    idea="Orthogonalise only the r cosine coordinates in which the momentum is largest; what is left out stays in the momentum.",
    axes={
        "rule": "Newton-Schulz on r x l, no second moment", "basis": "top-r columns of a DCT matrix by L1 alignment",
        "refresh": "every step", "lift": "back-projection", "residual": "kept in the full-size momentum",
        "release": "yes, one micro-batch per step",
    },
    defaults={
        "lr": "0.02", "rank": "128", "momentum": "0.95", "factor": "muon: max(1, rows/columns)^(1/2)", "transform": "matmul",
        "adam_ratio": "0.015 (Adam at 3e-4 beside 0.02)", "adam_betas": "(0.9, 0.95), adam_eps 1e-10", "weight_decay": "0",
    },
    presets={
        **{f"llama-{n}": {"lr": 2e-2, "rank": LLAMA_RANKS[n], "adam_ratio": 0.05} for n in SMALL},
        **{f"llama-{n}": {"lr": 2e-2, "rank": r} for n, r in LLAMA_RANKS.items() if n not in SMALL},
        **{n: {"lr": 2e-2, "rank": p["rank"]} for n, p in LARGE_PRESETS.items()},
    },
    limits=(
        "The momentum is full-size: low rank saves computation (and communication), not memory.",
        "Needs the whole gradient: no small accumulation in release mode.",
    ),
    differences=(
        "The published file does not run (undefined names); this follows its equations: B = M + G; b the top-r columns of "
        "B Q; M <- B - (1 - mu) b Q^T; W <- (1 - lr wd) W - lr f NS5(b) Q^T.",
        "Other leaves take Adam at lr * adam_ratio, so that one schedule drives both; the code gives them their own group.",
    ),
    auto_rank=80,
    release="yes",
    state="4 (m n + r)",
)  # fmt: skip


@dataclass(frozen=True)
class ShapeScaled(Subspace):
    """A subspace whose scale is multiplied by a function of the leaf's shape.

    factor: `none`, `muon` max(1, R/C)^(1/2), `spectral` (R/C)^(1/2), `moonlight` 0.2 max(R, C)^(1/2).
    """

    factor: Literal["none", "muon", "spectral", "moonlight"] = "muon"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("factor", self.factor, FACTORS)

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        transform, why = super().resolve(leaf)
        if transform is not self or leaf.matrix is None:
            return transform, why
        rows, columns = leaf.matrix
        by = {
            "none": 1.0, "muon": math.sqrt(max(1.0, rows / columns)), "spectral": math.sqrt(rows / columns),
            "moonlight": 0.2 * math.sqrt(max(rows, columns)),
        }[self.factor]  # fmt: skip
        return replace(self, scale=self.scale * by, factor="none"), why


def trion_recipe(
    rank: int, momentum: float, transform: str, norm: int, factor: str, steps: int, adam_ratio: float, basis: str | Basis | None,
    adam_betas: tuple[float, float], adam_eps: float, targets: Match,
) -> Recipe:  # fmt: skip
    check_number("momentum", momentum, 0.0, inclusive=True, below=1.0)
    own = DCTBasis(rank, transform, norm)  # type: ignore[arg-type]
    low = ShapeScaled(
        Stateless(Orthogonal(steps)), instead(basis, own), Refresh(1),
        residual=FeedbackResidual(1.0 - momentum), factor=factor,  # type: ignore[arg-type]
    )  # fmt: skip
    return Recipe(((targets, low), ("*", OwnRate(Adam(adam_betas, adam_eps), adam_ratio))), decay="before")


@register(CARD)
class Trion(Method):
    """B = M + G; M <- B - (1 - mu) b Q_I^T; W <- W - lr f NewtonSchulz(b) Q_I^T, b = B Q_I (Modoranu et al. 2025, arXiv 2505.17967).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights are orthogonalised.
        lr: learning rate.
        rank: r, cosines kept at a step.
        momentum: mu.
        transform, norm, basis: as `DCTAdamW`.
        factor: `muon` max(1, rows/columns)^(1/2), `spectral` (rows/columns)^(1/2), `moonlight` 0.2 max(rows, columns)^(1/2),
            `none`.
        steps: of Newton-Schulz.
        adam_ratio: the other leaves take Adam (adam_betas, adam_eps) at lr times this.
        weight_decay, targets, storage, release, seed, maximize: see `GaLore`; decay comes first.

    >>> import torch
    >>> opt = Trion(torch.nn.Linear(16, 8, bias=False), lr=2e-2, rank=4)
    >>> opt.state_bytes().total == 4 * (8 * 16 + 4)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-2, rank: int = 128, *, momentum: float = 0.95,
        transform: Literal["matmul", "makhoul"] = "matmul", norm: int = 1,
        factor: Literal["none", "muon", "spectral", "moonlight"] = "muon", steps: int = 5, adam_ratio: float = 0.015,
        basis: str | Basis | None = None, adam_betas: tuple[float, float] = (0.9, 0.95), adam_eps: float = 1e-10,
        weight_decay: float = 0.0, targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None,
        release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "momentum": momentum, "transform": transform, "norm": norm, "factor": factor, "steps": steps,
            "adam_ratio": adam_ratio, "basis": basis, "adam_betas": adam_betas, "adam_eps": adam_eps, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, trion_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
