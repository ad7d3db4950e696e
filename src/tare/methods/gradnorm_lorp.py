"""GradNormLoRP: weight normalisation whose direction is stepped in GaLore's subspace."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.galore import llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.weight_norm import WeightNorm
from tare.subspace.bases import Basis
from tare.subspace.catalogue import make_basis
from tare.subspace.refresh import Refresh
from tare.subspace.wrapper import Subspace

CARD = Card(
    key="gradnorm-lorp",
    title="Gradient Weight-Normalized Low-Rank Projection for Efficient LLM Training",
    authors="Huang, Jiang, Wang, Chen",
    year=2024,
    arxiv="2412.19616",
    idea="Split every weight into the magnitude and the direction of its rows; step the direction in GaLore's subspace and "
    "the magnitudes with Adam.",
    axes={
        "rule": "Adam on the direction and on the magnitudes, eps before bias correction",
        "basis": "SVD of the direction's gradient on the shorter side", "refresh": "T = 250", "transfer": "keep",
        "lift": "back-projection x 0.25", "residual": "dropped", "post": "rows normalised to their magnitude",
        "release": "yes, one micro-batch per step",
    },
    defaults={
        "lr": "1e-2 (code, 60M)", "rank": "128 (code, 60M)", "period": "250 (code)", "scale": "0.25 (code)",
        "axis": "row (code)", "form": "paper", "eps": "1e-6 (code)", "weight_decay": "0",
    },
    presets={
        **llama_presets(1e-2),
        "llama-60m": {"lr": 1e-2, "rank": 128, "period": 250},
        "*": {"lr": 1e-2, "rank": 128, "period": 250},
    },
    limits=(
        "Needs the gradient's inner product with the whole weight: no small accumulation in release mode.",
        "One full-size temporary.",
        "More state than GaLore by four numbers a row; the paper's savings come from applying it to adapter factors.",
        "A row that is zero has no direction and is stepped as a plain row until it is not.",
    ),
    differences=(
        "The published optimizer (LowRankWeightNormAdamW) overwrites the magnitude by the row norms of the direction at every "
        "step, so that its step lasts until the next one only, and takes G for the gradient of the direction. The default "
        "form='paper' differentiates W = g v / |v| and keeps g; form='code' reproduces the code.",
        "The published code keeps v as a second copy of the weight; here v is the weight times |v| / g, row by row: the same "
        "numbers to rounding, without the copy.",
        "The other published class (WeightNormGaLoreAdamW) trains copies that it never writes back, and is not offered.",
        "The paper's runs wrap the model in adapters (DoRA); this is the optimizer alone, on whatever matrices are trainable.",
        "A refresh waits for a gradient that is not zero (with B = 0 an adapter's A has none at first); the code keeps the "
        "arbitrary basis of a zero matrix for T steps.",
    ),
    auto_rank=80,
    state="4 (2 r l + r s + 4 m), s = min(m, n), l = max(m, n)",
)  # fmt: skip


def gradnorm_lorp_recipe(
    rank: int, period: int, scale: float, axis: str, form: str, side: str, basis: str | Basis,
    betas: tuple[float, float], eps: float, transfer: str, stagger: bool, targets: Match, eps_placement: str = "before",
) -> Recipe:  # fmt: skip
    rule = Adam(betas, eps, eps_placement)  # type: ignore[arg-type]
    low = Subspace(
        rule, make_basis(basis, rank), Refresh(period, stagger), side_name(side), transfer=transfer, scale=scale  # type: ignore[arg-type]
    )  # fmt: skip
    normed = WeightNorm(low, rule, axis, form)  # type: ignore[arg-type]
    return Recipe(((targets, normed), ("*", rule)), decay="after")


@register(CARD)
class GradNormLoRP(Method):
    """W = g v / |v| by rows; v steps in a subspace of its own gradient, g with Adam (Huang et al. 2024, arXiv 2412.19616).

    grad_g = <G, v> / |v|; grad_v = (g / |v|) (G - grad_g v / |v|); v <- v - lr scale lift(Adam(P^T grad_v)).

    Args:
        params: module, tensors, named tensors or groups. Linear and convolution weights are normalised.
        lr: learning rate, 1e-2 in the published scripts.
        rank, period, scale: of the direction's subspace, as `GaLore`.
        axis: `row` (an output feature has a magnitude) or `column`.
        form: `paper` (default) or `code`, see the card.
        side, basis, betas, eps, weight_decay, transfer, stagger, targets: as `GaLore`.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = GradNormLoRP(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4)
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16 + 4 * 8 + 4 * 8)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 128, period: int = 250, scale: float = 0.25, *,
        axis: str = "row", form: str = "paper", side: str = "shorter", basis: str | Basis = "svd",
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0, transfer: str = "keep",
        stagger: bool = False, targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None,
        release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "axis": axis, "form": form, "side": side, "basis": basis,
            "betas": betas, "eps": eps, "transfer": transfer, "stagger": stagger, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, gradnorm_lorp_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
