"""diffGrad: Adam, slowed down where the gradient stays as it was."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.methods.base import Method
from tare.methods.registry import Card, register
from tare.rules.diffgrad import DiffGrad as DiffGradRule

CARD = Card(
    key="diffgrad",
    title="diffGrad: An Optimization Method for Convolutional Neural Networks",
    authors="Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri",
    year=2020,
    arxiv="1909.11015",
    idea="Multiply Adam's step by a friction between 1/2 and 1 that is small where successive gradients are alike.",
    axes={"rule": "Adam x sigmoid(|G_prev - G|)", "subspace": "none", "storage": "fp32", "release": "yes"},
    defaults={
        "lr": "1e-3 (paper)", "betas": "(0.9, 0.999) (paper)", "eps": "1e-8 (code, before bias correction)",
        "weight_decay": "0 (code), added to the gradient",
    },
    presets={
        **{f"llama-{name}": {"lr": 2e-3} for name in ("tiny", "3m", "9m", "20m")},
        "*": {"lr": 2e-3},
    },
    limits=(
        "Friction depends on the gradient's scale: far below 1 it is 1/2 everywhere, and this is Adam at half its lr. "
        "Language models are in that regime.",
        "12 bytes of state for every weight, half again as many as AdamW's.",
    ),
    differences=(
        "The first published file kept a reference to the gradient instead of a copy; with the in-place zero_grad of older "
        "torch the difference was always 0: Adam at half its lr. The authors say that the journal's results came from it. "
        "The copy of the arXiv revision is the default; reference_alias=True reproduces the other.",
        "Weight decay is L2, added to the gradient before everything, as in the code.",
    ),
    auto_rank=78,
    state="12 m n",
)  # fmt: skip


def diffgrad_recipe(betas: tuple[float, float], eps: float, reference_alias: bool) -> Recipe:
    return Recipe((("*", DiffGradRule(betas, eps, reference_alias)),), decay="l2")


@register(CARD)
class DiffGrad(Method):
    """W <- W - lr c_t sigmoid(|G_prev - G|) m / (sqrt(v) + eps), G with wd W added (Dubey et al. 2020, arXiv 1909.11015).

    Args:
        params: module, tensors, named tensors or groups.
        lr: learning rate, 1e-3 in the paper.
        betas, eps: of Adam; eps is added before bias correction.
        weight_decay: L2, coupled: the rule sees G + wd W.
        reference_alias: no memory of the gradient, friction 1/2 throughout, as the first published file in older torch.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> DiffGrad(torch.nn.Linear(4, 3), lr=1e-3).state_bytes().total
    180
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, reference_alias: bool = False, storage: Storage | dict[str, Any] | None = None,
        release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        super().__init__(
            params, lr, diffgrad_recipe, {"betas": betas, "eps": eps, "reference_alias": reference_alias},
            weight_decay=weight_decay, storage=storage, release=release, seed=seed, maximize=maximize,
        )  # fmt: skip
