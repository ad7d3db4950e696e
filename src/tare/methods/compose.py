"""Compose: any rule x basis x refresh x lift x residual x limiter x post-map, by name: the frame itself as a method."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tare.core.checks import check_choice
from tare.core.errors import InputError
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base import TARGETS, Method
from tare.methods.galore import LARGE_PRESETS, llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adafactor import Adafactor
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.maps import PostMap, Sign, Sinkhorn, make_map
from tare.rules.momentum import Momentum
from tare.subspace.bases import Basis
from tare.subspace.catalogue import make_basis
from tare.subspace.limiter import NormGrowth
from tare.subspace.refresh import AdaptiveRefresh, Refresh
from tare.subspace.residual import FeedbackResidual, MappedResidual, NormRatioResidual, Residual
from tare.subspace.sparse import SparseResidual
from tare.subspace.wrapper import Subspace

RESIDUALS: dict[str, Callable[[float], Residual | None]] = {
    "none": lambda _: None,
    "norm-ratio": lambda _: NormRatioResidual("code"),
    "norm-ratio-paper": lambda _: NormRatioResidual("paper"),
    "sign": lambda kappa: MappedResidual(Sign(), kappa),
    "sgd": lambda kappa: MappedResidual(None, kappa),
    "sinkhorn": lambda kappa: MappedResidual(Sinkhorn(), kappa),
    "feedback": lambda _: FeedbackResidual(),
    "feedback-int8": lambda _: FeedbackResidual(storage="int8"),
    "feedback-int4": lambda _: FeedbackResidual(storage="int4"),
    "sparse": lambda _: SparseResidual(),
}
RULES = ("adam", "lion", "momentum", "sgd", "adafactor")

CARD = Card(
    key="compose",
    title="Any combination of the frame",
    authors="-",
    year=2026,
    arxiv="-",
    idea="Name a rule, a basis, a calendar, a lift, a residual, a limiter and a post-map; what makes no sense together is "
    "refused with the reason.",
    axes={
        "rule": "any of " + ", ".join(RULES), "basis": "any", "refresh": "periodic or adaptive", "transfer": "keep, zero, rotate",
        "lift": "back, channel, tensor", "residual": "any of " + ", ".join(RESIDUALS), "limiter": "norm growth or none",
        "post": "any map", "release": "accumulates where nothing but R is used",
    },
    defaults={"everything": "GaLore's, with the norm limiter off; see the arguments"},
    presets={**llama_presets(1e-2), **LARGE_PRESETS},
    limits=("A combination is not a published method: nobody has tuned it. `tare bench quality` measures some.",),
    reproduced="Combinations drawn at random from all axes either learn, with the state that their spec says, or are refused in one line "
    "(tests/subspace/test_combinations.py); its parts are those of the methods whose traces are named on their pages.",
    auto_rank=1000,
    release="accumulates",
    state="that of its parts",
)  # fmt: skip


def inner_rule(name: str, betas: tuple[float, float], eps: float, eps_placement: str, momentum: float) -> Transform:
    """The rule of that name."""
    check_choice("rule", name, RULES)
    if name == "lion":
        return Lion(betas)
    if name == "adafactor":
        return Adafactor(betas[0])
    if name == "adam":
        return Adam(betas, eps, eps_placement)  # type: ignore[arg-type]
    return Momentum(momentum if name == "momentum" else 0.0)


def compose_recipe(
    rank: int | float, period: int, scale: float, rule: str, basis: str | Basis, side: str, transfer: str, lift: str,
    residual: str | Residual | None, residual_scale: float, gamma: float | None, limiter_zero: str, scale_front: bool,
    post: str | PostMap | None, adaptive: bool, stagger: bool, betas: tuple[float, float], eps: float, eps_placement: str,
    momentum: float, decay: str, targets: Match,
) -> Recipe:  # fmt: skip
    inner = inner_rule(rule, betas, eps, eps_placement, momentum)
    if isinstance(residual, str):
        residual = RESIDUALS[check_choice("residual", residual, tuple(RESIDUALS))](residual_scale)
    elif residual is not None and not isinstance(residual, Residual):
        raise InputError(f"residual: {residual!r} is neither a name nor a Residual; names: {', '.join(RESIDUALS)}")
    calendar = AdaptiveRefresh(period, stagger) if adaptive else Refresh(period, stagger)
    check_choice("limiter zero policy", limiter_zero, ("skip", "legacy"))
    limiter = NormGrowth(gamma, limiter_zero) if gamma is not None else None  # type: ignore[arg-type]
    low = Subspace(
        inner, make_basis(basis, rank), calendar, side_name(side), transfer, lift, scale, scale_front, residual,  # type: ignore[arg-type]
        limiter, make_map(post),
    )  # fmt: skip
    return Recipe(((targets, low), ("*", inner)), decay=decay)  # type: ignore[arg-type]


@register(CARD)
class Compose(Method):
    """The one frame of gradient-subspace methods, every axis an argument.

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights are projected.
        lr: learning rate.
        rank: columns of P, or a share in (0, 1] of the projected side.
        period, adaptive, stagger: when the basis is computed anew; adaptive: Q-GaLore's calendar.
        rule: `adam`, `lion`, `momentum`, `sgd`, `adafactor`, in the subspace and on the other leaves.
        basis: `svd`, `gram`, `randomized`, `gaussian`, `orthonormal`, `dct`, `online`, `columns`, `rows`, `lines`,
            `top-columns`, `top-rows`, `entries`, or a `Basis`.
        side: `shorter`, `longer`, `left`, `right`, `both`.
        transfer: `keep`, `zero`, `rotate` the moments at a refresh.
        lift: `back`, or scale the raw gradient by `channel` or `tensor`; then scale enters as its square root.
        residual: `none`, `norm-ratio` (Fira), `norm-ratio-paper`, `sign` (FRUGAL), `sgd`, `sinkhorn`, `feedback`,
            `feedback-int8`, `feedback-int4`, `sparse` (GaLore+), or a `Residual`. residual_scale: kappa, for the mapped ones.
        gamma: growth allowed to a norm in a step (1.01 in Fira and APOLLO); None is no limiter. limiter_zero, scale_front: see
            `Apollo`.
        post: a map of the whole update: `sign`, `orthogonal`, `sinkhorn`, `row-norm`, `col-norm`, ...
        betas, eps, eps_placement, momentum: of the rule. decay: `before` or `after` the update.
        targets, weight_decay, storage, release, seed, maximize: see `GaLore`.

    Raises:
        InputError: for a combination without meaning, saying why.

    >>> import torch
    >>> opt = Compose(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4, basis="dct", residual="sign")
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16 + 4)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int | float = 128, period: int = 200, scale: float = 0.25, *,
        rule: str = "adam", basis: str | Basis = "svd", side: str = "shorter", transfer: str = "keep", lift: str = "back",
        residual: str | Residual | None = "none", residual_scale: float = 1.0, gamma: float | None = None,
        limiter_zero: str = "skip", scale_front: bool = False, post: str | PostMap | None = None, adaptive: bool = False,
        stagger: bool = False, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, eps_placement: str = "before",
        momentum: float = 0.9, weight_decay: float = 0.0, decay: str = "after", targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "rule": rule, "basis": basis, "side": side,
            "transfer": transfer, "lift": lift, "residual": residual, "residual_scale": residual_scale, "gamma": gamma,
            "limiter_zero": limiter_zero, "scale_front": scale_front, "post": post, "adaptive": adaptive,
            "stagger": stagger, "betas": betas, "eps": eps, "eps_placement": eps_placement, "momentum": momentum,
            "decay": decay, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, compose_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
