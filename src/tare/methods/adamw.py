"""AdamW: the reference, through torch's fused kernel."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.methods.base import Method
from tare.methods.registry import Card, register
from tare.rules.adam import Adam


def adamw_recipe(betas: tuple[float, float], eps: float) -> Recipe:
    return Recipe((("*", Adam(betas, eps)),), decay="before")


CARD = Card(
    key="adamw",
    title="AdamW",
    authors="Loshchilov, Hutter",
    year=2019,
    arxiv="1711.05101",
    idea="Adam with weight decay taken out of the gradient: two moments for every weight.",
    axes={"rule": "Adam", "subspace": "none", "storage": "fp32", "release": "yes"},
    defaults={
        "lr": "1e-3 (torch)",
        "betas": "(0.9, 0.999) (torch)",
        "eps": "1e-8 (torch)",
        "weight_decay": "1e-2 (torch)",
    },
    presets={"*": {"lr": 1e-3, "weight_decay": 0.0}},
    limits=("8 bytes of state for every weight: the cost that the other methods take off.",),
    auto_rank=10,
    state="8 m n",
)


@register(CARD)
class AdamW(Method):
    """W <- (1 - lr wd) W - lr m_hat / (sqrt(v_hat) + eps), equal to `torch.optim.AdamW`.

    Args:
        params: module, tensors, named tensors or groups.
        lr: learning rate (torch's default 1e-3).
        betas, eps, weight_decay: torch's defaults.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = AdamW(torch.nn.Linear(4, 3), lr=1e-3)
    >>> opt.state_bytes().total
    120
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        super().__init__(
            params, lr, adamw_recipe, {"betas": betas, "eps": eps}, weight_decay=weight_decay, storage=storage,
            release=release, seed=seed, maximize=maximize,
        )  # fmt: skip
