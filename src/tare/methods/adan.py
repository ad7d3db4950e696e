"""Adan: three moments, of the gradient, of its difference, and of the square of their Nesterov sum."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tare.core.checks import check_number
from tare.core.clipping import norm_of, squared_norm
from tare.core.errors import InputError
from tare.core.optimizer import Entry
from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.core.transform import Step
from tare.methods.base import Method
from tare.methods.registry import Card, register
from tare.rules.adan import Adan as AdanRule

CARD = Card(
    key="adan",
    title="Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
    authors="Xie, Zhou, Li, Lin, Yan",
    year=2022,
    arxiv="2208.06677",
    idea="Estimate the gradient at Nesterov's extrapolated point from the difference of successive gradients, and use it in "
    "both moments of Adam; decay by a proximal step.",
    axes={"rule": "Adan", "subspace": "none", "storage": "fp32", "release": "yes, without max_grad_norm"},
    defaults={
        "lr": "1e-3 (code; 5-10x AdamW's)", "betas": "(0.98, 0.92, 0.99) (paper: one minus these)", "eps": "1e-8",
        "weight_decay": "0 (code; 0.02 in the paper's runs)", "no_prox": "False", "max_grad_norm": "0: no clipping (code)",
    },
    presets={
        **{f"llama-{name}": {"lr": 2e-3, "weight_decay": 0.02} for name in ("tiny", "3m", "9m", "20m")},
        "*": {"lr": 1e-3, "weight_decay": 0.02},
    },
    limits=(
        "16 bytes of state for every weight, twice AdamW's: with storage moment='int8' it is 4.06.",
        "max_grad_norm needs all gradients together: not in release mode, where clip_release clips instead.",
    ),
    differences=(
        "The code counts steps by group, so that a parameter whose first gradient comes late is corrected as if it had had "
        "all of them; here every leaf counts its own, as the paper's equations do.",
        "The code scales gradients in place when it clips; here they stay as they were.",
        "A norm of all gradients that is not finite clips nothing here, so that a NaN stays in its leaf; the code spreads it.",
        "The paper restarts momentum on a condition of its analysis; the code has no restart by default, and neither has this.",
    ),
    auto_rank=75,
    state="16 m n",
)  # fmt: skip


def adan_recipe(betas: tuple[float, float, float], eps: float, no_prox: bool) -> Recipe:
    return Recipe((("*", AdanRule(betas, eps)),), decay="before" if no_prox else "prox")


@register(CARD)
class Adan(Method):
    """W <- (W - lr U) / (1 + lr wd), U of three moments: see `tare.rules.adan.Adan` (Xie et al. 2022, arXiv 2208.06677).

    Args:
        params: module, tensors, named tensors or groups.
        lr: learning rate; Adan bears 5 to 10 times AdamW's.
        betas: of gradient, difference and square, as in the code.
        eps, weight_decay: see the card.
        no_prox: decay as AdamW does, W <- (1 - lr wd) W - lr U, instead of the proximal step.
        max_grad_norm: gradients are seen times min(1, max_grad_norm / (|G| + eps)), |G| over all leaves; 0 turns it off.
        storage, release, seed, maximize: see `tare.Optimizer`.

    Raises:
        InputError: a value out of range, or max_grad_norm together with release.

    >>> import torch
    >>> Adan(torch.nn.Linear(4, 3), lr=1e-3).state_bytes().total
    240
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8, weight_decay: float = 0.0, *, no_prox: bool = False, max_grad_norm: float = 0.0,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        self._max_norm = check_number("max_grad_norm", max_grad_norm, 0.0, inclusive=True)
        self._scale, self._eps = 1.0, eps
        if release and self._max_norm:
            raise InputError(
                "max_grad_norm: the norm of all gradients is not known when release steps the first leaf; "
                "leave it at 0 and use clip_release, or use release=False"
            )
        super().__init__(
            params, lr, adan_recipe, {"betas": betas, "eps": eps, "no_prox": no_prox}, weight_decay=weight_decay,
            storage=storage, release=release, seed=seed, maximize=maximize,
        )  # fmt: skip

    def _update(self, ready: Iterable[tuple[Tensor, dict[str, Any]]], compressed: Tensor | None = None) -> None:
        ready = list(ready)
        if self._max_norm:
            norm = norm_of(squared_norm(p.grad) for p, _ in ready if p.grad is not None)
            self._scale = min(1.0, self._max_norm / (norm + self._eps)) if norm < float("inf") else 1.0
        super()._update(ready, compressed)

    def _step_of(self, p: Tensor, entry: Entry, group: dict[str, Any], count: int) -> Step:
        step = super()._step_of(p, entry, group, count)
        if self._scale == 1.0:
            return step
        return replace(step, options={**step.options, AdanRule.SCALE: self._scale})
