"""CoordinateOptimizer: evaluates coordinate by coordinate. It numbers them, measures what layers can spare, touches one leaf at a time."""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tare.core.errors import InputError, nearest
from tare.core.int8_weight import Int8Weight
from tare.core.recipe import Recipe
from tare.core.tensors import is_fake
from tare.zeroth.chains import chain_of
from tare.zeroth.closure import explained, loss_from, numbers
from tare.zeroth.coordinates import (
    FIRST,
    KEPT_COUNT,
    UNKNOWN,
    Coordinates,
    CoordinateWise,
    counts_from,
    places_of,
    reached,
    subscripts,
)  # fmt: skip
from tare.zeroth.dice import Dice
from tare.zeroth.directions import Directed, Law
from tare.zeroth.grasp import Grasp, Scores, keep, score
from tare.zeroth.members import Members, takes_members
from tare.zeroth.memory import Memory, Moved, choose
from tare.zeroth.past import Past
from tare.zeroth.population import PopulationOptimizer
from tare.zeroth.probes import Estimate, Point
from tare.zeroth.record import Record
from tare.zeroth.touched import Elements, Touched

TOGETHER = 64  # coordinates in one forward, where a closure takes members and nobody says how many


@dataclass(frozen=True)
class Sparing:
    """How many coordinates each masked leaf keeps.

    sparsity: share that is left out of all masked leaves together. ratios: `grasp` (measured), `uniform`, or the share of each leaf.
    """

    sparsity: float = 0.9
    ratios: Literal["grasp", "uniform"] | Mapping[str, float] = "grasp"
    grasp: Grasp = Grasp()  # noqa: RUF009  # frozen
    directions: Law | None = None


class CoordinateOptimizer(PopulationOptimizer):
    """A `PopulationOptimizer` for probes along coordinates (`zeroth.coordinates`).

    Points that move one element are evaluated by writing this element alone (memory `auto`), a chain is run from the perturbed child on
    (`reuse`), and closures that take members evaluate many coordinates of one leaf in one forward.

    Args:
        sparing: how many coordinates masked leaves keep.
        reuse: whether the largest `nn.Sequential` of the model is run from the perturbed child on.
        rest: as `PopulationOptimizer`.
    """

    shares: ClassVar[bool] = False

    def __init__(
        self, params: Any, recipe: Recipe, lr: float | Tensor, *, sparing: Sparing | None = None, reuse: bool = True,
        memory: str | Memory = "auto", model: nn.Module | None = None, **rest: Any,
    ):  # fmt: skip
        self.sparing = sparing
        module = params if isinstance(params, nn.Module) else model
        plan: Memory
        by_element = any(isinstance(t, Directed) and isinstance(t.law, Coordinates) for _, t in recipe.entries)
        if not by_element:
            plan = choose(memory, params if module is None else module) if isinstance(memory, str) else memory
        else:
            inner = (
                memory
                if not isinstance(memory, str)
                else Elements()
                if memory == "auto"
                else choose(memory, module or params)
            )
            plan = Touched(inner, chain_of(module) if reuse else None)
        super().__init__(params, recipe, lr, memory=plan, model=model, **rest)
        if sparing is not None and isinstance(sparing.ratios, Mapping):
            names = [leaf.name for leaf in self.leaves]
            for name in sparing.ratios:
                if name not in names:
                    raise InputError(
                        f"ratios: no leaf is called {name!r}{nearest(name, names)}; names are those of the model"
                    )
        if not any(p.is_meta or is_fake(p) for p in self._entries):
            self._number(self._moved())

    # -- numbering -------------------------------------------------------------------------------------------------------

    def _prepare_laws(self, leaves: list[Moved]) -> None:
        super()._prepare_laws(leaves)
        self._number(leaves)

    def _number(self, leaves: list[Moved]) -> None:
        """Set where each leaf's coordinates begin, how many it keeps as far as that is known, and which are active."""
        first = 0
        if self.sparing is not None and self.sparing.ratios != "grasp":
            self._keep(leaves, counts_from(self._shares(leaves), [leaf.draw(0).leaf for leaf in leaves]))
        active: list[int] = []
        for leaf in leaves:
            law, numel = leaf.directed.law, leaf.parameter.numel()
            if not isinstance(law, Coordinates):
                continue
            leaf.state.raw[FIRST] = first
            places = law.mask.active(leaf.draw(0), leaf.state)
            active += range(first, first + numel) if places is None else (places + first).tolist()
            first += numel
        if isinstance(self.probe, CoordinateWise):
            self.probe = replace(self.probe, active=tuple(active))

    def _shares(self, leaves: list[Moved]) -> Mapping[str, float]:
        assert self.sparing is not None
        if isinstance(self.sparing.ratios, Mapping):
            return self.sparing.ratios
        return {leaf.name: self.sparing.sparsity for leaf in leaves}

    def _keep(self, leaves: list[Moved], counts: Mapping[str, int]) -> None:
        for leaf in leaves:
            if KEPT_COUNT in leaf.state:
                leaf.state.raw[KEPT_COUNT] = counts[leaf.name]

    # -- evaluating ------------------------------------------------------------------------------------------------------

    def _ask(self, leaves: list[Moved], closure: Callable[..., Any], losses: list[float]) -> Estimate | None:
        masked = [leaf for leaf in leaves if KEPT_COUNT in leaf.state]
        if self.sparing is not None and any(leaf.state[KEPT_COUNT] == UNKNOWN for leaf in masked):
            if not self.sparing.sparsity:
                self._keep(masked, {leaf.name: leaf.parameter.numel() for leaf in masked})
            elif self._score(masked, closure, losses) is None:
                return None
            self._number(leaves)
        estimate = super()._ask(leaves, closure, losses)
        if estimate is None or not isinstance(self.probe, CoordinateWise) or not estimate.terms:
            return estimate
        return self._corrected(estimate, leaves)

    def _corrected(self, estimate: Estimate, leaves: list[Moved]) -> Estimate:
        """With the distances that 16-bit weights really went."""
        assert isinstance(self.probe, CoordinateWise)
        kept = {"lr": float(self.param_groups[0]["lr"])}
        mu, shares = self.probe.width(self.steps, kept), dict[int, float]()
        for leaf in leaves:
            weight = leaf.parameter.detach()
            if weight.dtype.itemsize != 2:
                continue
            members = [term.member for term in _own(leaf, estimate.terms)]
            where = subscripts(places_of(members, leaf.state, weight.numel()), weight)
            spans = reached(weight[where], mu, self.probe.two_sided).flatten().tolist()
            shares.update(zip(members, spans, strict=True))
        if not shares:
            return estimate
        terms = [replace(t, coefficient=t.coefficient / shares.get(t.member, 1.0)) for t in estimate.terms]
        return replace(estimate, terms=terms, deltas=[term.coefficient for term in terms])

    def _at_once(self, told: bool, points: int) -> int:
        found = super()._at_once(told, points)
        return min(found, TOGETHER) if self.together is None else found

    def _fitting(self, leaves: list[Moved], points: list[Point], closure: Any, told: bool, dice: Dice) -> list[float]:
        """As many of the first points as lie in one leaf, which run together."""
        plan = self.memory
        if not isinstance(plan, Touched):
            return super()._fitting(leaves, points, closure, told, dice)
        touched = [[leaf.parameter.data_ptr() for leaf in plan.touched(leaves, point)] for point in points]
        count = next((i for i, own in enumerate(touched) if own != touched[0]), len(points)) if touched[0] else 1
        return super()._fitting(leaves, points[:count], closure, told, dice)

    def _together(self, leaves: list[Moved], points: list[Point], told: bool) -> AbstractContextManager[Any]:
        plan = self.memory
        if not isinstance(plan, Touched):
            return super()._together(leaves, points, told)
        own = plan.touched(leaves, points[0])
        if plan.chain is not None and len(own) == 1 and plan.chain.side_by_side(own[0]):
            if own[0].parameter not in self._seen_together:
                self._seen_together.add(own[0].parameter)
                self._compared = False
            return plan.chain.members(own[0], points, told)
        return super()._together(own, points, told)

    @property
    def _seen_together(self) -> set[Tensor]:
        found: set[Tensor] = self.__dict__.setdefault("_together_seen", set())
        return found

    # -- what layers can spare -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, closure: Callable[[], Any]) -> dict[str, Tensor]:
        """Measure the layer ratios anew, from the loss of `closure` (the paper: of 25 samples of each class), and return all scores.

        Without this call it is done at the first step, from its loss.

        Raises:
            InputError: no leaf has a mask, or a loss is not finite.
        """
        leaves = self._moved()
        masked = [leaf for leaf in leaves if KEPT_COUNT in leaf.state]
        if self.sparing is None or not masked:
            raise InputError("score: no leaf has a mask; give sparsity above 0, and leaves that `masked` matches")
        self._prepare_laws(leaves)
        found = self._score(masked, closure, [])
        if found is None:
            raise InputError("score: a loss is not finite; look at the data, or lower grasp's mu")
        self._number(leaves)
        return {leaf.name: scores for leaf, scores in zip(masked, found.scores, strict=True)}

    def _score(self, masked: list[Moved], closure: Callable[..., Any], losses: list[float]) -> Scores | None:
        """ZO-GraSP. None, and the losses told, where one is not finite."""
        assert self.sparing is not None
        how, law = self.sparing.grasp, self.sparing.directions
        assert law is not None
        for leaf in masked:
            if isinstance(leaf.parameter, Int8Weight):
                raise InputError(
                    f"ratios: {leaf.name} is int8 and cannot be measured; give ratios='uniform', or a share for each leaf"
                )
        dice = Dice({leaf.parameter.device for leaf in masked})
        sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
        told, alone = takes_members(closure), Members.of([Point()])

        def loss() -> float:
            self.evaluated += 1
            with dice.throw():
                value = self._losses(closure(alone), 1)[0] if told else numbers([loss_from(closure())])[0]
            return sign * value

        def directions(number: int, j: int) -> list[Tensor]:
            found = []
            for leaf in masked:
                draw = leaf.draw(number * how.q + j)
                draw = replace(draw, name=f"{draw.name}/grasp", step=0)
                found.append(law.draw(draw, leaf.state, leaf.parameter.detach()))
            return found

        try:
            found = score(how, [leaf.parameter.detach() for leaf in masked], directions, loss)
        except RuntimeError as error:
            if (line := explained(error)) is not None:
                raise line from error
            raise
        finally:
            dice.settle(failed=True)
        if found is None:
            losses.append(float("nan"))
            return None
        stays = keep(how, found.scores, self.sparing.sparsity)
        self._keep(masked, {leaf.name: max(1, int(mask.sum())) for leaf, mask in zip(masked, stays, strict=True)})
        return found

    # -- stepping --------------------------------------------------------------------------------------------------------

    def _step_leaf(self, leaf: Moved, record: Record, past: Past | None) -> None:
        """With the leaf's own coordinates alone."""
        if isinstance(leaf.directed.law, Coordinates):
            record = replace(record, terms=tuple(_own(leaf, record.terms)))
        super()._step_leaf(leaf, record, past)

    def ratios(self) -> dict[str, float]:
        """The share of each masked leaf that is left out, as far as it is known."""
        found = {}
        for leaf in self._moved():
            if KEPT_COUNT in leaf.state and leaf.state[KEPT_COUNT] != UNKNOWN:
                found[leaf.name] = 1.0 - leaf.state[KEPT_COUNT] / leaf.parameter.numel()
        return found


def _own(leaf: Moved, terms: Any) -> Any:
    """Those terms, in the order of their members, that are coordinates of a leaf."""
    first = leaf.state[FIRST]
    start = bisect_left(terms, first, key=lambda term: term.member)
    stop = bisect_left(terms, first + leaf.parameter.numel(), lo=start, key=lambda term: term.member)
    return terms[start:stop]
