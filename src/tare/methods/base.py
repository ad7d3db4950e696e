"""What the named constructors share: a method is a recipe built from hyperparameters, and a group may override its own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tare.core.optimizer import Optimizer
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage

# The leaves that the low-rank papers project: attention and MLP weights (of experts too). Embedding, head and norms stay dense.
TARGETS: Match = ("linear", "conv", "expert")


class Method(Optimizer):
    """An `Optimizer` whose recipe is `recipe_from(**hyper)`; any of `hyper` may stand in a parameter group."""

    def __init__(
        self, params: Any, lr: float | Tensor, recipe_from: Callable[..., Recipe], hyper: dict[str, Any], *,
        weight_decay: float, storage: Storage | dict[str, Any] | None, release: bool = False, seed: int = 0,
        maximize: bool = False,
    ):  # fmt: skip
        self._recipe_from, self._hyper = recipe_from, hyper
        recipe = recipe_from(**hyper)  # checks every value
        live = {"betas": tuple(hyper["betas"])} if hyper.get("betas") is not None else {}
        super().__init__(
            params, recipe, lr, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize, **live,
        )  # fmt: skip

    def group_recipe(self, group: dict[str, Any]) -> Recipe:
        own = {name: group.pop(name) for name in list(group) if name in self._hyper and name != "betas"}
        if not own:
            return super().group_recipe(group)
        return self._recipe_from(**{**self._hyper, **own})
