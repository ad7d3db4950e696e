"""GaLore: Adam on the gradient projected on its own top singular directions."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.subspace.bases import Basis
from tare.subspace.catalogue import make_basis
from tare.subspace.refresh import Refresh
from tare.subspace.wrapper import Subspace

# Ranks of the paper for 60M to 350M, and the same share of the width (a quarter) below.
LLAMA_RANKS = {"tiny": 32, "3m": 48, "9m": 64, "20m": 96, "60m": 128, "130m": 256, "350m": 256}


SMALL = ("tiny", "3m", "9m", "20m")


def llama_presets(small_lr: float, ranks: dict[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """Arguments by named model: the papers' lr of 1e-2, and for the small ones the best of `bench/sweep.py`.

    These run for hundreds of steps, not 10,000, so that their bases live 50 steps.
    """
    return {
        f"llama-{name}": {"lr": small_lr, "rank": rank, "period": 50} if name in SMALL else {"lr": 1e-2, "rank": rank}
        for name, rank in (ranks or LLAMA_RANKS).items()
    }


LARGE_PRESETS: dict[str, dict[str, Any]] = {
    "llama-1b": {"lr": 1e-2, "rank": 512},
    "llama-7b": {"lr": 5e-3, "rank": 1024, "period": 500},
    "*": {"lr": 1e-2, "rank": 128},
}

CARD = Card(
    key="galore",
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    authors="Zhao, Zhang, Chen, Wang, Anandkumar, Tian",
    year=2024,
    arxiv="2403.03507",
    idea="Run Adam on the gradient projected on its top-r singular directions, found anew every T steps; "
    "update the full weight.",
    axes={
        "rule": "Adam, eps before bias correction", "basis": "SVD of G on the shorter side", "refresh": "T = 200",
        "transfer": "keep", "lift": "back-projection x 0.25", "residual": "dropped", "release": "accumulates",
    },
    defaults={
        "lr": "1e-2 (paper, C4; 5e-3 at 7B)", "rank": "128 (60M), 256 (130M, 350M), 512 (1B), 1024 (7B)",
        "period": "200 (500 at 7B)", "scale": "0.25", "eps": "1e-6 (code; paper 1e-8)", "weight_decay": "0",
    },
    presets={**llama_presets(1e-2), **LARGE_PRESETS},
    limits=(
        "Embedding, head and norms keep dense Adam: most of the state of small models.",
        "The exact SVD makes refresh steps long; basis='randomized' with stagger=True does not.",
        "Moments are kept as numbers when the basis changes under them.",
    ),
    differences=(
        "eps: paper 1e-8, code 1e-6 added before bias correction; the code is the default.",
        "Rank at 1B: paper 512, script 1024; the paper is the preset.",
        "State is fp32 by default; the published runs keep it in bf16, where v with beta2 = 0.999 never decays "
        "(storage moment='bf16_legacy' reproduces that).",
        "A refresh on a zero or non-finite gradient keeps the old basis, is counted and tried again; the code fails on "
        "non-finite ones, and keeps the unit vectors it makes of a zero one for a whole period (basis='svd-legacy').",
        "The tensor (Tucker) variant of the repository ignores its optimizer and is not offered; convolutions are "
        "projected as out x (in * kernel) matrices.",
    ),
    auto_rank=50,
    release="accumulates",
    state="4 (2 r l + r s), s = min(m, n), l = max(m, n)",
)  # fmt: skip


def galore_recipe(
    rank: int, period: int, scale: float, side: str, basis: str | Basis, betas: tuple[float, float], eps: float,
    transfer: str, stagger: bool, targets: Match, eps_placement: str = "before",
) -> Recipe:  # fmt: skip
    rule = Adam(betas, eps, eps_placement)  # type: ignore[arg-type]
    low = Subspace(
        rule, make_basis(basis, rank), Refresh(period, stagger), side_name(side), transfer=transfer, scale=scale  # type: ignore[arg-type]
    )  # fmt: skip
    return Recipe(((targets, low), ("*", rule)), decay="after")


def side_name(side: str) -> Any:
    """The published names of sides, in ours."""
    return {"std": "shorter", "reverse_std": "longer", "full": "both"}.get(side, side)


@register(CARD)
class GaLore(Method):
    """R = P^T G or G P; N = Adam(R); W <- W - lr scale lift(N) (Zhao et al. 2024, arXiv 2403.03507).

    Args:
        params: module, tensors, named tensors or groups. Linear and convolution weights are projected.
        lr: learning rate, 1e-2 in the paper's pretraining.
        rank: r; a matrix whose shorter side is below it is stepped dense.
        period: T, updates between refreshes of P.
        scale: alpha, multiplies the lifted update.
        side: `shorter` (std), `longer` (reverse_std), `left`, `right`, or `both` (full).
        basis: `svd` (paper), `gram` (same vectors, faster), `randomized` (fast range finder), `svd-legacy` (zero
            gradients as in the code, see the card), or a `Basis`.
        betas, eps, weight_decay: of Adam; eps is added before bias correction; decay comes after the update.
        transfer: `keep` (paper), `zero` or `rotate` the moments at a refresh.
        stagger: spread refreshes over the period.
        targets: which leaves are projected: roles, name patterns or a function.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = GaLore(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4)
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16 + 4 * 8)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 128, period: int = 200, scale: float = 0.25, *,
        side: str = "shorter", basis: str | Basis = "svd", betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6, weight_decay: float = 0.0, transfer: str = "keep", stagger: bool = False,
        targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "side": side, "basis": basis, "betas": betas, "eps": eps,
            "transfer": transfer, "stagger": stagger, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, galore_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
