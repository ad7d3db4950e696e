"""GaLore with Adafactor inside: the second moment of the projected gradient is factored too."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.galore import CARD as GALORE
from tare.methods.galore import LARGE_PRESETS, llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adafactor import Adafactor
from tare.subspace.bases import Basis
from tare.subspace.catalogue import make_basis
from tare.subspace.refresh import Refresh
from tare.subspace.wrapper import Subspace

CARD = Card(
    key="galore-adafactor",
    title="GaLore with Adafactor",
    authors=GALORE.authors,
    year=GALORE.year,
    arxiv=GALORE.arxiv,
    idea="GaLore with Adafactor on the projected gradient: row and column means in place of a second moment.",
    axes={**GALORE.axes, "rule": "Adafactor (arXiv 1804.04235)"},
    defaults={
        "lr": "1e-2 (paper)", "rank": GALORE.defaults["rank"], "period": "200", "scale": "0.25",
        "beta1": "None (code); the paper keeps first-order statistics, 0.9", "clip_threshold": "1", "decay_rate": "-0.8",
    },
    presets={**llama_presets(5e-3), **LARGE_PRESETS},
    limits=(*GALORE.limits, "Every leaf, dense ones too, is stepped by Adafactor."),
    differences=(
        "beta1: the paper's runs keep a first moment, the script's default does not; off is the default here.",
        "scale_parameter with weight_decay: the code multiplies the decay by RMS(W) too; here decay is lr weight_decay.",
        "The first moment averages updates that are already multiplied by the learning rate, as in the code.",
    ),
    auto_rank=70,
    release="accumulates",
    state="4 (r + l + r s) (+ 4 r l with beta1)",
)  # fmt: skip


def galore_adafactor_recipe(
    rank: int, period: int, scale: float, side: str, basis: str | Basis, beta1: float | None, decay_rate: float,
    eps: tuple[float, float], clip_threshold: float, scale_parameter: bool, transfer: str, stagger: bool, targets: Match,
) -> Recipe:  # fmt: skip
    rule = Adafactor(beta1, decay_rate, eps, clip_threshold, scale_parameter)
    low = Subspace(
        rule, make_basis(basis, rank), Refresh(period, stagger), side_name(side), transfer=transfer, scale=scale  # type: ignore[arg-type]
    )  # fmt: skip
    return Recipe(((targets, low), ("*", rule)), decay="before")


@register(CARD)
class GaLoreAdafactor(Method):
    """GaLore (arXiv 2403.03507) with Adafactor inside and on the dense leaves.

    Args:
        beta1: first moment of the lr-scaled update; None keeps none. eps: (added to R^2, floor of RMS(W)).
        clip_threshold: RMS of an update at most. scale_parameter: multiply lr by RMS(W).
        others: as `GaLore`. Decay comes before the update.

    >>> import torch
    >>> opt = GaLoreAdafactor(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4)
    >>> opt.state_bytes().total == 4 * (4 + 16 + 4 * 8)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 128, period: int = 200, scale: float = 0.25, *,
        side: str = "shorter", basis: str | Basis = "svd", beta1: float | None = None, decay_rate: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3), clip_threshold: float = 1.0, scale_parameter: bool = False,
        weight_decay: float = 0.0, transfer: str = "keep", stagger: bool = False, targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "side": side, "basis": basis, "beta1": beta1,
            "decay_rate": decay_rate, "eps": eps, "clip_threshold": clip_threshold, "scale_parameter": scale_parameter,
            "transfer": transfer, "stagger": stagger, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, galore_adafactor_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release,
            seed=seed, maximize=maximize,
        )  # fmt: skip
