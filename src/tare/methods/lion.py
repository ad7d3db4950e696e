"""Lion: sign of an interpolated momentum; one moment."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.methods.base import Method
from tare.methods.registry import Card, register
from tare.rules.lion import Lion as LionRule

CARD = Card(
    key="lion",
    title="Symbolic Discovery of Optimization Algorithms",
    authors="Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le",
    year=2023,
    arxiv="2302.06675",
    idea="Move every weight by the same amount, in the sign of an interpolated momentum: one moment instead of two.",
    axes={"rule": "Lion", "subspace": "none", "storage": "fp32", "release": "yes"},
    defaults={
        "lr": "1e-4 (paper; 3-10x below AdamW's)", "betas": "(0.9, 0.99) (paper; language (0.95, 0.98))",
        "weight_decay": "0 (code); the paper's runs use 3-10x AdamW's",
    },
    presets={
        **{f"llama-{name}": {"lr": 5e-4, "weight_decay": 0.1} for name in ("tiny", "3m", "9m", "20m")},
        "*": {"lr": 1e-4, "weight_decay": 0.1},
    },
    limits=(
        "Without weight decay the weights are unbounded; with it |W| <= 1 / wd.",
        "In bf16 weights an lr of 1e-4 rounds away above |W| = 0.03: use storage weight='stochastic'.",
    ),
    auto_rank=60,
    state="4 m n",
)  # fmt: skip


def lion_recipe(betas: tuple[float, float]) -> Recipe:
    return Recipe((("*", LionRule(betas)),), decay="before")


@register(CARD)
class Lion(Method):
    """W <- (1 - lr wd) W - lr sign(b1 m + (1-b1) G); m <- b2 m + (1-b2) G (arXiv 2302.06675).

    >>> import torch
    >>> Lion(torch.nn.Linear(4, 3), lr=1e-4).state_bytes().total
    60
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *, storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        super().__init__(
            params, lr, lion_recipe, {"betas": betas}, weight_decay=weight_decay, storage=storage, release=release,
            seed=seed, maximize=maximize,
        )  # fmt: skip
