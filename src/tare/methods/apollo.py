"""APOLLO and APOLLO-Mini: a random low-rank Adam only estimates by how much each channel (or tensor) of the raw gradient is scaled."""

from typing import Any, Literal

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.galore import LLAMA_RANKS, SMALL, llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.subspace.bases import Basis
from tare.subspace.catalogue import make_basis
from tare.subspace.limiter import NormGrowth
from tare.subspace.refresh import Refresh
from tare.subspace.wrapper import Subspace

_AXES = {
    "rule": "Adam, eps before bias correction", "basis": "Gaussian N(0, 1/r) on the shorter side", "refresh": "T = 200",
    "transfer": "keep", "residual": "none needed", "limiter": "norm growth 1.01 on the whole update",
    "release": "yes, one micro-batch per step",
}  # fmt: skip
_AUTHORS = "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee"
_TITLE = "APOLLO: SGD-like Memory, AdamW-level Performance"
_DIFFERENCES = (
    "`scale` enters as its square root, as in the code.",
    "Random numbers come from a generator keyed by (seed, leaf name, refresh): the same on every device and after every "
    "resume. The published code draws from device generators seeded by a parameter's position.",
    "The code keeps P, the paper only its seed: storage basis='fp32' (default) keeps it, basis='seed' draws it anew.",
    "A zero gradient freezes the published limiter; here it is skipped (limiter_zero='legacy' reproduces it).",
)
_LIMITS = (
    "Needs the whole gradient of a matrix: no small accumulation in release mode.",
    "Embedding, head and norms keep dense Adam.",
)
_RANKS = {**LLAMA_RANKS, "130m": 192, "1b": 256, "7b": 256}

CARD = Card(
    key="apollo",
    title=_TITLE,
    authors=_AUTHORS,
    year=2025,
    arxiv="2412.05270",
    idea="Run Adam on a random low-rank sketch of the gradient only to learn how much Adam would scale each channel, "
    "then scale the raw gradient by it.",
    axes={**_AXES, "lift": "channel scale of raw G"},
    defaults={
        "lr": "1e-2", "rank": "128, 192, 256, 256, 256 (60M to 7B; about s/4)", "period": "200", "scale": "1",
        "gamma": "1.01", "eps": "1e-6 (code)", "weight_decay": "0",
    },
    presets={**llama_presets(5e-3, _RANKS), "*": {"lr": 1e-2, "rank": 256}},
    limits=_LIMITS,
    differences=_DIFFERENCES,
    auto_rank=30,
    state="4 (2 r l) + 4, + 4 r s unless storage basis='seed'",
)  # fmt: skip

MINI_CARD = Card(
    key="apollo-mini",
    title="APOLLO-Mini (" + _TITLE + ")",
    authors=_AUTHORS,
    year=2025,
    arxiv="2412.05270",
    idea="APOLLO at rank 1 with one scale for the whole tensor: the state of SGD, nearly.",
    axes={**_AXES, "basis": "one Gaussian vector", "lift": "tensor scale of raw G, x sqrt(128)"},
    defaults={
        "lr": "1e-2 (also 2e-2)", "rank": "1", "period": "200", "scale": "128 (192 at 130M)",
        "scale_front": "True at 60M and 130M (scripts)", "gamma": "1.01", "eps": "1e-6 (code)", "weight_decay": "0",
    },
    presets={
        "llama-60m": {"lr": 1e-2, "scale_front": True}, "llama-130m": {"lr": 1e-2, "scale": 192.0, "scale_front": True},
        **{f"llama-{name}": {"lr": 2.5e-3, "period": 50} for name in SMALL},
        "*": {"lr": 1e-2},
    },
    limits=_LIMITS,
    differences=_DIFFERENCES,
    auto_rank=35,
    state="4 (2 l) + 4, + 4 s unless storage basis='seed'",
)  # fmt: skip


def apollo_recipe(
    rank: int, period: int, scale: float, scale_front: bool, lift: str, gamma: float | None, limiter_zero: str,
    side: str, basis: str | Basis, betas: tuple[float, float], eps: float, transfer: str, stagger: bool, targets: Match,
) -> Recipe:  # fmt: skip
    rule = Adam(betas, eps, "before")
    low = Subspace(
        rule, make_basis("gaussian" if basis == "random" else basis, rank), Refresh(period, stagger), side_name(side),
        transfer=transfer, lift=lift, scale=scale, scale_front=scale_front,  # type: ignore[arg-type]
        limiter=NormGrowth(gamma, limiter_zero) if gamma is not None else None,  # type: ignore[arg-type]
    )  # fmt: skip
    return Recipe(((targets, low), ("*", rule)), decay="after")


@register(CARD)
class Apollo(Method):
    """W <- W - lr c_t sqrt(scale) G phi, limited; phi_j = |N_j| / |R_j| per channel (Zhu et al. 2025, arXiv 2412.05270).

    Args:
        params: module, tensors, named tensors or groups. Linear and convolution weights are scaled by channel.
        lr: learning rate, 1e-2 in the paper.
        rank: of the sketch. period: updates between new sketches. scale: enters as sqrt(scale).
        scale_front: multiply before the limiter instead of after it.
        lift: `channel` or `tensor`.
        gamma: the limiter's growth; None turns it off. limiter_zero: `skip` or `legacy`.
        side, basis, betas, eps, weight_decay, transfer, stagger, targets: as `GaLore`; basis defaults to `gaussian`.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = Apollo(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4, storage={"basis": "seed"})
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16) + 4
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 256, period: int = 200, scale: float = 1.0, *,
        scale_front: bool = False, lift: Literal["channel", "tensor"] = "channel", gamma: float | None = 1.01,
        limiter_zero: str = "skip", side: str = "shorter", basis: str | Basis = "gaussian",
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
        transfer: str = "keep", stagger: bool = False, targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "scale_front": scale_front, "lift": lift, "gamma": gamma,
            "limiter_zero": limiter_zero, "side": side, "basis": basis, "betas": betas, "eps": eps,
            "transfer": transfer, "stagger": stagger, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, apollo_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip


@register(MINI_CARD)
class ApolloMini(Apollo):
    """APOLLO at rank 1 with one scale per tensor (arXiv 2412.05270). Arguments as `Apollo`.

    >>> import torch
    >>> opt = ApolloMini(torch.nn.Linear(16, 8, bias=False), lr=1e-2)
    >>> opt.state_bytes().total == 4 * (2 * 16 + 8) + 4
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 1, period: int = 200, scale: float = 128.0, *,
        scale_front: bool = False, lift: Literal["channel", "tensor"] = "tensor", gamma: float | None = 1.01,
        limiter_zero: str = "skip", side: str = "shorter", basis: str | Basis = "gaussian",
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
        transfer: str = "keep", stagger: bool = False, targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        super().__init__(
            params, lr, rank, period, scale, scale_front=scale_front, lift=lift, gamma=gamma, limiter_zero=limiter_zero,
            side=side, basis=basis, betas=betas, eps=eps, weight_decay=weight_decay, transfer=transfer,
            stagger=stagger, targets=targets, storage=storage, release=release, seed=seed, maximize=maximize,
        )  # fmt: skip
