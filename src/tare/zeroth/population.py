"""Populations: evolution strategies within the frame; and the engine that evaluates several members in one forward."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.errors import InputError
from tare.core.recipe import Recipe
from tare.zeroth.assembly import Assembly
from tare.zeroth.dice import Dice
from tare.zeroth.fitness import Shaping, ZScore
from tare.zeroth.members import Asked, Members, as_losses, takes_members
from tare.zeroth.memory import InForward, Moved
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import Asking, Estimate, Point, Term
from tare.zeroth.record import Record
from tare.zeroth.side_by_side import SideBySide


@dataclass(frozen=True)
class Antithetic:
    """N members in pairs: member k stands at theta + sigma E_(k // 2) for even k, at theta - sigma E_(k // 2) for odd.

    The gradient is -s sum_k +-f_k E_(k // 2), f the shaped fitness of the rewards -loss. scaling: `code` s = sigma / sqrt(N), so that a
    step's entries are about lr sigma whatever N; `paper` s = 1 / N. They agree for lr_code = lr_paper / (sigma sqrt(N)).

    Args:
        members: N, even. sigma: how far members stand off.
        shaping: fitness from rewards. prompts: how many prompts every member answers, each by an evaluation of its own.
    """

    members: int = 64
    sigma: float = 1e-3
    shaping: Shaping = ZScore()  # noqa: RUF009  # frozen
    prompts: int = 1
    scaling: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        if check_whole("members", self.members, 2) % 2:
            raise InputError(f"Invalid members: {self.members}; expected an even number: members come in pairs")
        check_number("sigma", self.sigma, 0.0)
        check_whole("prompts", self.prompts, 1)
        check_choice("scaling", self.scaling, ("code", "paper"))
        self.shaping.check(self.members)
        if self.prompts > 1 and self.shaping.prompt(self.members - 1) > 0:
            raise InputError("prompts: groups answer one prompt each already; give group or prompts")

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        losses = yield [self.place(k, prompt) for prompt in range(self.prompts) for k in range(self.members)]
        n = self.members
        fitness = self.shaping([[-loss for loss in losses[p * n : (p + 1) * n]] for p in range(self.prompts)])
        scale = self.sigma / math.sqrt(n) if self.scaling == "code" else 1.0 / n
        pairs = range(self.shaping.spared // 2, n // 2)
        return Estimate([Term(j, -scale * (fitness[2 * j] - fitness[2 * j + 1])) for j in pairs], fitness)

    def place(self, member: int, prompt: int) -> Point:
        """Where a member stands."""
        offset = (member // 2, -self.sigma if member % 2 else self.sigma)
        return Asked(
            () if member < self.shaping.spared else (offset,), (), member, prompt or self.shaping.prompt(member)
        )

    @property
    def evaluations(self) -> float:
        return float(self.members * self.prompts)

    def describe(self) -> str:
        return (
            f"{self.members} antithetic members, sigma {self.sigma:g}, fitness by {type(self.shaping).__name__.lower()}"
        )


class PopulationOptimizer(ForwardOptimizer):
    """A `ForwardOptimizer` that can evaluate several points of a step in one forward, side by side.

    Args:
        together: points in one forward. 1: one at a time, as any forward-only method; None: all of them where the closure takes the
            members as its argument, else one at a time. Halved, for good, where a GPU's memory does not hold so many.
        rest: as `ForwardOptimizer`.

    `step(closure)` takes closures of three kinds:

    - `closure()` returns one loss: evaluated at one point at a time.
    - `closure(members)` evaluates all `members` in one call of the model, and returns a loss for each: `members.repeat(batch)`
      repeats a batch for them, `members.pick(prompts)` gives each its own, `members.mean(losses)` averages over each one's rows.
    - `closure()` with `together` above 1: what the model is called with is repeated for the members, and its output has their rows
      one after another; the closure returns one loss for each member or for each row.

    Side by side, linear layers share one product with their weights (see `zeroth.side_by_side`). The first time, one member is also
    evaluated alone; if the two losses differ the model does not keep its rows apart, and all is evaluated one at a time from then on.
    """

    def __init__(
        self,
        params: Any,
        recipe: Recipe,
        lr: float | Tensor,
        *,
        together: int | None = None,
        model: nn.Module | None = None,
        **rest: Any,
    ):
        self.together = None if together is None else check_whole("together", together, 1)
        super().__init__(params, recipe, lr, model=model, **rest)
        if self.model is None and self.together not in (None, 1):
            raise InputError(
                "together: members run side by side inside the modules; give the model itself as params, or model="
            )
        if self.shared:
            if self.together not in (None, 1):
                raise InputError(
                    "together: members side by side need whole weights, and fully_shard has cut them; use together=1"
                )
            self.together = 1
        self._compared = False
        self._least: int | None = None  # what was found to fit

    def _evaluate(
        self, leaves: list[Moved], points: list[Point], closure: Callable[..., Any], losses: list[float], dice: Dice
    ) -> list[float]:
        told = takes_members(closure)
        if any(point.along for point in points) or (not told and self._at_once(told, len(points)) == 1):
            return super()._evaluate(leaves, points, closure, losses, dice)
        asked = [p if isinstance(p, Asked) else Asked(p.offsets, (), i) for i, p in enumerate(points)]

        def losses_at(some: list[Point]) -> list[float]:
            found: list[float] = []
            while len(found) < len(some):
                part = some[len(found) : len(found) + self._at_once(told, len(some))]
                found += self._fitting(leaves, part, closure, told, dice)
            return found

        values = losses_at(list(asked)) if self.exchange is None else self.exchange.evaluate(list(asked), losses_at)
        losses += values
        return values

    def _at_once(self, told: bool, points: int) -> int:
        wanted = self.together if self.together is not None else (points if told and self.model is not None else 1)
        return min(wanted, points, self._least or points)

    def _fitting(
        self, leaves: list[Moved], points: list[Point], closure: Callable[..., Any], told: bool, dice: Dice
    ) -> list[float]:
        """The losses of some points in one forward, or of the first of them, as many as memory holds."""
        if len(points) == 1:
            return self._alone(leaves, points, closure, told, dice)
        try:
            return self._side_by_side(leaves, points, closure, told, dice)
        except torch.OutOfMemoryError:
            self._least = len(points) // 2
            warnings.warn(f"memory: {len(points)} members at once do not fit, {self._least} from now on", stacklevel=6)
            return self._fitting(leaves, points[: self._least], closure, told, dice)

    def _alone(
        self, leaves: list[Moved], points: list[Point], closure: Callable[..., Any], told: bool, dice: Dice
    ) -> list[float]:
        """One point, by the memory plan."""

        def run() -> float:
            self.evaluated += 1
            with dice.throw():
                return self._losses(closure(Members.of(points)) if told else closure(), 1)[0]

        return [float(self.memory.evaluate(leaves, points[0], run))]

    def _side_by_side(
        self, leaves: list[Moved], points: list[Point], closure: Callable[..., Any], told: bool, dice: Dice
    ) -> list[float]:
        assert self.model is not None
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in self.model.modules()):
            raise InputError(
                "dropout: members side by side would each drop something else; call model.eval(), or evaluate one at a time (together=1)"
            )
        self.evaluated += len(points)
        with self._together(leaves, points, told), dice.throw():
            values = self._losses(closure(Members.of(points)) if told else closure(), len(points))
        if self._compared:
            return values
        (alone,) = self._alone(leaves, points[-1:], closure, told, dice)
        why = self._untrusted(values[-1], alone, leaves)
        self._compared = True
        if not why:
            return values
        self.together = 1
        warnings.warn(f"together: {why}; members are evaluated one at a time", stacklevel=7)
        return [*(self._alone(leaves, [point], closure, told, dice)[0] for point in points[:-1]), alone]

    def _together(self, leaves: list[Moved], points: list[Point], told: bool) -> AbstractContextManager[Any]:
        """In which one forward of the model evaluates all points. told: whether the closure repeats the batch for them."""
        assert self.model is not None
        return SideBySide(self.model, leaves, points, repeat=not told)

    def _losses(self, value: Any, count: int) -> list[float]:
        if isinstance(value, Tensor):
            self._watch.loss(value)
        return as_losses(value, count)

    def _untrusted(self, together: float, alone: float, leaves: list[Moved]) -> str:
        """Why losses of members side by side are not theirs; nothing where they are."""
        elsewhere = self.memory.elsewhere.values() if isinstance(self.memory, InForward) else ()
        for name, reason in elsewhere:
            if "not called" not in reason:
                return f"{name}: {reason}"
        if not math.isfinite(together) or not math.isfinite(alone):
            return "" if together == alone or (math.isnan(together) and math.isnan(alone)) else "a loss is not finite"
        bound = max(_AGREES[leaf.parameter.dtype.itemsize] for leaf in leaves) * max(abs(alone), abs(together), 1e-6)
        if abs(together - alone) <= bound:
            return ""
        return (
            f"a member's loss is {together:.7g} among others and {alone:.7g} alone: the model does not keep rows apart"
        )


_AGREES = {8: 1e-9, 4: 1e-4, 2: 5e-2, 1: 5e-2}  # relative, by bytes of a weight: what rounding may do to a loss


def clipped(record: Record, leaves: list[Moved], limit: float) -> Record:
    """The record with its gradient scaled to a norm of at most `limit` over all leaves: one more drawing of the directions."""
    if record.skipped or not record.terms:
        return record
    squares = [Assembly(leaf, record.terms).whole().double().square().sum().item() for leaf in leaves]
    norm = math.sqrt(math.fsum(squares))
    if norm <= limit or not math.isfinite(norm):
        return record
    return replace(record, terms=tuple(Term(t.member, t.coefficient * (limit / norm)) for t in record.terms))
