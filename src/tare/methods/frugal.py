"""FRUGAL: Adam on a rotating share of the linear weights, signSGD on the rest, at the same learning rate."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.errors import InputError
from tare.core.orders import Order
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.core.transform import Step, Transform
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.maps import Sign
from tare.rules.momentum import Momentum
from tare.rules.rotating import make_order, rotating_tensors
from tare.rules.stateless import Stateless
from tare.subspace.bases import Basis, OrthonormalBasis, SVDBasis
from tare.subspace.catalogue import instead
from tare.subspace.coordinates import CoordinateBasis, EntryBasis
from tare.subspace.refresh import Refresh
from tare.subspace.residual import MappedResidual
from tare.subspace.wrapper import SIDES, Subspace

SELECTIONS = (
    "block", "columns", "rows", "randperm", "randk", "svd", "random", "top-columns", "top-rows",
)  # fmt: skip

CARD = Card(
    key="frugal",
    title="FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    authors="Zmushko, Beznosikov, Takac, Horvath",
    year=2025,
    arxiv="2411.07837",
    idea="Give Adam's state to a rotating share of the linear weights and update the rest by the sign of the gradient, at "
    "the same learning rate: no direction is lost.",
    axes={
        "rule": "Adam (or Lion, SGD with momentum), counted from the last reset",
        "basis": "whole tensors, columns, rows, entries, SVD or random orthonormal", "refresh": "T = 200",
        "transfer": "zero, step count too", "lift": "back", "residual": "sign", "release": "yes, one micro-batch per step",
    },
    defaults={
        "lr": "1e-3 (paper)", "density": "0.25 (paper)", "period": "200 (500 at 7B)", "selection": "block (paper's main runs)",
        "order": "descending (paper's main runs)", "outside_scale": "1 (pretraining), 0.1 (fine-tuning)", "eps": "1e-8",
        "weight_decay": "0 (0.1 on GLUE)",
    },
    presets={
        **{f"llama-{n}": {"lr": 1e-3, "selection": "columns", "period": 50} for n in ("tiny", "3m", "9m", "20m")},
        "llama-7b": {"lr": 5e-4, "density": 0.0, "scale": 0.3, "period": 500},
        "*": {"lr": 1e-3},
    },
    limits=(
        "Needs the whole gradient of a matrix: no small accumulation in release mode.",
        "Embedding, head and norms keep dense Adam.",
        "A sign step moves every weight by lr: in bf16 weights small lr round away (storage weight='stochastic').",
    ),
    differences=(
        "The paper's blocks are transformer blocks; the code's block is one linear weight tensor, and so it is here.",
        "The code draws selections from the global generator of each rank; here from a generator keyed by (seed, name, "
        "period), so that ranks agree.",
        "`randk` keeps one int32 an entry, the code two int64 (more than the moments it saves); storage basis='seed' "
        "keeps none.",
        "`top-columns`, `top-rows` and order='greedy' choose by size instead of at random (Gauss-Southwell).",
        "A tensor without a gradient at a refresh is passed over; the code fails, and its calendar is that of the first "
        "tensor of a group, ours each tensor's own.",
        "`svd` on a zero gradient keeps basis and moments and tries again at the next update; the code decomposes the zeros "
        "and resets (basis='svd-legacy').",
        "`sgdm` starts its buffer from zero after a selection; the code from the gradient (momentum_start='gradient'), and "
        "in blocks and dense tensors from the weight, which is not offered.",
        "A density that rounds to no line gets one; the code gives none.",
    ),
    auto_rank=65,
    release="yes",
    every_leaf={"selection": "columns"},
    state="8 density m n, + 4 for each chosen row, column or entry, or the basis",
)  # fmt: skip


@dataclass(frozen=True)
class PrimedMomentum(Momentum):
    """Momentum whose buffer is the first gradient before that is added: b_1 = (1 + momentum) g_1, as FRUGAL's code has it."""

    def _rest(self, step: Step) -> float:
        return 1.0 + self.momentum if step.count == 1 else super()._rest(step)


def inner_rule(inner: str, betas: tuple[float, float], eps: float, momentum: float) -> Transform:
    """The rule of the chosen part by its name."""
    check_choice("inner", inner, ("adam", "lion", "sgdm"))
    if inner == "lion":
        return Lion(betas)
    return Momentum(momentum) if inner == "sgdm" else Adam(betas, eps, "after")


def selection_basis(selection: str, density: float, basis: str | Basis | None) -> Basis:
    """The basis that a selection means; a recorded one takes its place, and its kind."""
    named: dict[str, Basis] = {
        "columns": CoordinateBasis(density, "columns"), "rows": CoordinateBasis(density, "rows"),
        "top-columns": CoordinateBasis(density, "columns", "greedy"),
        "top-rows": CoordinateBasis(density, "rows", "greedy"),
        "randperm": CoordinateBasis(density, "side", nearest=True), "randk": EntryBasis(density), "svd": SVDBasis(density),
        "random": OrthonormalBasis(density),
    }  # fmt: skip
    return instead(basis, named[selection])


def frugal_recipe(
    density: float, period: int, selection: str, order: str | Order, inner: str, outside: str, outside_scale: float, scale: float,
    side: str, basis: str | Basis | None, betas: tuple[float, float], eps: float, momentum: float, momentum_start: str,
    transfer: str, stagger: bool, targets: Match,
) -> Recipe:  # fmt: skip
    check_choice("selection", selection, SELECTIONS)
    check_choice("outside", outside, ("sign", "sgd", "none"))
    check_choice("momentum_start", momentum_start, ("zero", "gradient"))
    if check_number("density", density, 0.0, inclusive=True) > 1.0:
        raise InputError(f"density: {density!r} is more than everything; a share in [0, 1] is expected")
    rule, blocks = inner_rule(inner, betas, eps, momentum), make_order(order)
    check_choice("transfer", transfer, ("zero", "keep", "rotate"))
    check_choice("side", side, SIDES)
    own = Stateless({"sign": Sign(), "sgd": None, "none": None}[outside], outside_scale * (outside != "none"))
    idle = replace(own, scale=own.scale * scale)
    low: Transform
    if density == 0.0:
        low = idle
    elif selection == "block":
        low = rotating_tensors(rule, own, density, period, blocks, scale)
    else:
        residual = MappedResidual(idle.map, idle.scale) if outside != "none" else None
        inside = PrimedMomentum(momentum) if inner == "sgdm" and momentum_start == "gradient" else rule
        low = Subspace(
            inside, selection_basis(selection, density, basis), Refresh(period, stagger), side,  # type: ignore[arg-type]
            transfer, scale=scale, residual=residual,  # type: ignore[arg-type]
        )  # fmt: skip
    return Recipe(((targets, low), ("*", rule)), decay="before")


@register(CARD)
class Frugal(Method):
    """W <- W - lr (lift(Adam(R)) + kappa sign(G - lift(R))), R a rotating share of G (Zmushko et al. 2025, arXiv 2411.07837).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights are split.
        lr: learning rate, 1e-3 in the paper, for everything.
        density: rho, the share that has state; 0 is signSGD on these weights.
        period: updates between selections; moments and their step count start anew.
        selection: `block` (whole tensors), `columns`, `rows`, `randperm` (lines of the shorter side), `randk` (entries),
            `svd`, `random` (orthonormal), `top-columns`, `top-rows` (the largest).
        order: of the blocks: `random`, `ascending`, `descending`, `mirror`, `fixed`, `greedy`, or an `Order`.
        inner: rule of the chosen part: `adam`, `lion`, `sgdm`.
        outside: `sign` (paper), `sgd`, or `none` (GaLore with resets).
        outside_scale: kappa, multiplies the learning rate outside.
        scale: multiplies the learning rate of all split weights, inside and outside.
        momentum: of `sgdm`. momentum_start: its buffer at a selection: `zero`, or `gradient` (the code: b_1 = (1 + momentum) g).
        betas, eps: of the inner rule and of the dense leaves.
        side, basis, transfer, stagger, targets, storage, release, seed, maximize: see `GaLore`.

    >>> import torch
    >>> opt = Frugal(torch.nn.Linear(16, 8, bias=False), lr=1e-3, selection="columns")
    >>> opt.state_bytes().total == 2 * 4 * (8 * 4) + 4 * 4
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, density: float = 0.25, period: int = 200, *,
        selection: str = "block", order: str | Order = "descending", inner: Literal["adam", "lion", "sgdm"] = "adam",
        outside: Literal["sign", "sgd", "none"] = "sign", outside_scale: float = 1.0, scale: float = 1.0,
        side: str = "shorter", basis: str | Basis | None = None, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        momentum: float = 0.9, momentum_start: Literal["zero", "gradient"] = "zero", weight_decay: float = 0.0,
        transfer: str = "zero", stagger: bool = False, targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "density": density, "period": period, "selection": selection, "order": order, "inner": inner,
            "outside": outside, "outside_scale": outside_scale, "scale": scale, "side": side, "basis": basis,
            "betas": betas, "eps": eps, "momentum": momentum, "momentum_start": momentum_start,
            "transfer": transfer, "stagger": stagger, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, frugal_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
