"""Fira: GaLore plus the rest of the gradient, scaled by what Adam did inside the subspace, its norm growth limited."""

from typing import Any, Literal

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.galore import llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.subspace.bases import Basis
from tare.subspace.catalogue import make_basis
from tare.subspace.limiter import NormGrowth
from tare.subspace.refresh import Refresh
from tare.subspace.residual import NormRatioResidual
from tare.subspace.wrapper import Subspace

CARD = Card(
    key="fira",
    title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    authors="Chen, Feng, Li, Lai, Yue, Yuan, Wang",
    year=2025,
    arxiv="2410.01623",
    idea="Keep the gradient outside GaLore's subspace, scale each of its columns by how much Adam rescaled the matching "
    "low-rank column, and limit how fast its norm grows.",
    axes={
        "rule": "Adam, eps before bias correction", "basis": "SVD of G on the shorter side", "refresh": "T = 200",
        "transfer": "keep", "lift": "back-projection x alpha", "residual": "column norm ratio, norm-growth limiter 1.01",
        "release": "yes, one micro-batch per step",
    },
    defaults={
        "lr": "1e-2 (5e-3 at 7B)", "rank": "128 (60M), 256 (130M, 350M), 512 (1B), 64 (7B)", "period": "200 (500 at 7B)",
        "scale": "0.25 (alpha; 0.0625 at 1B and 7B)", "gamma": "1.01", "eps": "1e-6 (code)", "form": "code",
    },
    presets={
        **llama_presets(2.5e-3),
        "llama-1b": {"lr": 1e-2, "rank": 512, "scale": 0.0625},
        "llama-7b": {"lr": 5e-3, "rank": 64, "scale": 0.0625, "period": 500},
        "*": {"lr": 1e-2, "rank": 128},
    },
    limits=("Needs the whole gradient of a matrix: no small accumulation in release mode.", "One full-size temporary."),
    differences=(
        "The code subtracts alpha P R from G, the paper P R; form='code' is the default, form='paper' follows Algorithm "
        "1 (alpha on both parts, limiter after bias correction). They agree at alpha = 1 but for the bias correction.",
        "A zero gradient freezes the published limiter; here it is skipped (limiter_zero='legacy' reproduces it). At a "
        "refresh it also keeps the old basis (basis='svd-legacy': the code's unit vectors).",
    ),
    auto_rank=40,
    release="yes",
    state="4 (2 r l + r s) + 4",
)  # fmt: skip


def fira_recipe(
    rank: int, period: int, scale: float, gamma: float | None, form: str, limiter_zero: str, side: str,
    basis: str | Basis, betas: tuple[float, float], eps: float, transfer: str, stagger: bool, targets: Match,
) -> Recipe:  # fmt: skip
    rule = Adam(betas, eps, "before")
    low = Subspace(
        rule, make_basis(basis, rank), Refresh(period, stagger), side_name(side), transfer=transfer, scale=scale,  # type: ignore[arg-type]
        residual=NormRatioResidual(form), limiter=NormGrowth(gamma, limiter_zero) if gamma is not None else None,  # type: ignore[arg-type]
    )  # fmt: skip
    return Recipe(((targets, low), ("*", rule)), decay="after")


@register(CARD)
class Fira(Method):
    """W <- W - lr c_t (alpha lift(N) + S), S = limited (G - alpha lift(R)) phi (Chen et al. 2025, arXiv 2410.01623).

    Args:
        scale: alpha. gamma: the limiter's growth; None turns it off. form: `code` or `paper` (see the card).
        limiter_zero: `skip` or `legacy`.
        others: as `GaLore`.

    >>> import torch
    >>> opt = Fira(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4)
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16 + 4 * 8) + 4
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 128, period: int = 200, scale: float = 0.25, *,
        gamma: float | None = 1.01, form: Literal["code", "paper"] = "code", limiter_zero: str = "skip",
        side: str = "shorter", basis: str | Basis = "svd", betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6, weight_decay: float = 0.0, transfer: str = "keep", stagger: bool = False,
        targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "gamma": gamma, "form": form, "limiter_zero": limiter_zero,
            "side": side, "basis": basis, "betas": betas, "eps": eps, "transfer": transfer, "stagger": stagger,
            "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, fira_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
