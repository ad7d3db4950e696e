"""8-bit GaLore: GaLore whose low-rank moments live in 8 bits and whose basis is bf16."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.galore import CARD as GALORE
from tare.methods.galore import galore_recipe
from tare.methods.registry import Card, register
from tare.subspace.bases import Basis

CARD = Card(
    key="galore-8bit",
    title="8-bit GaLore",
    authors=GALORE.authors,
    year=GALORE.year,
    arxiv=GALORE.arxiv,
    idea="GaLore with 8-bit Adam on the projected gradient: the setting of the paper's 7B run.",
    axes={**GALORE.axes, "rule": "Adam, eps after bias correction", "storage": "int8 moments (block 256), bf16 basis"},
    defaults={**GALORE.defaults, "eps": "1e-8 (bitsandbytes)", "weight_decay": "0 (the class of the code: 1e-2)"},
    presets=GALORE.presets,
    limits=(*GALORE.limits, "Projected tensors below 4,096 elements keep fp32 moments."),
    differences=(
        "The inner step is 8-bit Adam as bitsandbytes defines it: eps 1e-8 after bias correction.",
        "weight_decay defaults to 0; the published class defaults to 1e-2 and lets it pass unscaled.",
    ),
    auto_rank=55,
    release="accumulates",
    state="2 r l (1 + 4/256) + 2 r s",
)


def galore_8bit_recipe(**hyper: Any) -> Recipe:
    return galore_recipe(**hyper, eps_placement="after")


@register(CARD)
class GaLore8bit(Method):
    """GaLore with 8-bit moments and a bf16 basis (arXiv 2403.03507 and 2110.02861). Arguments as `GaLore`.

    >>> import torch
    >>> opt = GaLore8bit(torch.nn.Linear(256, 128, bias=False), lr=1e-2, rank=32)
    >>> opt.state_bytes().total == 2 * 32 * 256 * (1 + 4 / 256) + 2 * 32 * 128
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 128, period: int = 200, scale: float = 0.25, *,
        side: str = "shorter", basis: str | Basis = "svd", betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, transfer: str = "keep", stagger: bool = False,
        targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "rank": rank, "period": period, "scale": scale, "side": side, "basis": basis, "betas": betas, "eps": eps,
            "transfer": transfer, "stagger": stagger, "targets": targets,
        }  # fmt: skip
        kept = storage if storage is not None else Storage(moment="int8", basis="bf16")
        super().__init__(
            params, lr, galore_8bit_recipe, hyper, weight_decay=weight_decay, storage=kept, release=release,
            seed=seed, maximize=maximize,
        )  # fmt: skip
