"""Ranking: only the order of the best few points is seen (ZO-RankSGD, arXiv 2303.03751), by a program or by a person in the loop."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.errors import InputError
from tare.core.random import make_key
from tare.core.release import rehearsal
from tare.zeroth.directions import Draw
from tare.zeroth.inforward import InForward, ReadElsewhere
from tare.zeroth.memory import Moved
from tare.zeroth.population import PopulationOptimizer
from tare.zeroth.probes import THETA, Asking, Estimate, Point, Term, away
from tare.zeroth.record import KEPT
from tare.zeroth.wrapped import Redrawn


class Question(list[Point]):
    """Points to be ranked; `best`: how many of them, in order, the answer has to name."""

    def __init__(self, points: list[Point], best: int):
        super().__init__(points)
        self.best = best


@dataclass(frozen=True)
class Ranking:
    """g = (1 / |E|) sum over edges (better i, worse j) of (xi_j - xi_i); |E| = k (k - 1) / 2 + k (m - k) pairs whose order is known.

    The point ranked t-th weighs -(m - 1 - 2 t) / |E|, any unranked one k / |E|. Losses enter by their order alone.

    Args:
        m: points asked about, theta + mu xi_i. k: how many of the best are told in order.
        mu: how far they stand off.
        weights: `zero-sum` as above; `published`: m - 2 t, whose sum is k, as the released code has.
        line_search: l: then theta - lr gamma^i g for i < l is ranked too, and the first of these steps is taken; 0: lr g is.
        gamma: ratio of the lengths.
        keep_best: the released line search: the best of the m points and theta itself are candidates too. While theta wins, directions
            are averaged with those of the rounds before.
        higher: whether larger values are better.
    """

    m: int = 6
    k: int = 3
    mu: float = 1e-3
    weights: Literal["zero-sum", "published"] = "zero-sum"
    line_search: int = 0
    gamma: float = 0.5
    keep_best: bool = True
    higher: bool = False

    def __post_init__(self) -> None:
        check_whole("m", self.m, 2)
        if check_whole("k", self.k, 1) > self.m:
            raise InputError(f"Invalid k: {self.k}; expected at most m = {self.m}, the points there are to rank")
        check_number("mu", self.mu, 0.0)
        check_choice("weights", self.weights, ("zero-sum", "published"))
        check_whole("line_search", self.line_search, 0)
        check_number("gamma", self.gamma, 0.0, below=1.0)

    @property
    def recalls(self) -> bool:
        """Whether directions of former steps may be part of this one's."""
        return self.line_search > 0 and self.keep_best

    def weigh(self, ranked: Sequence[int]) -> list[float]:
        """What each point weighs in the direction to go, given the best k in order."""
        places = {point: t for t, point in enumerate(ranked)}
        top = self.m - 1 if self.weights == "zero-sum" else self.m
        edges = self.k * (self.k - 1) / 2 + self.k * (self.m - self.k)
        return [(top - 2 * places[i] if i in places else -self.k) / edges for i in range(self.m)]

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        values = yield Question([away(i, self.mu) for i in range(self.m)], self.k)
        ranked = self.order(values)[: self.k]
        if not self.line_search:
            weights = self.weigh(ranked)
            return Estimate([Term(i, -w) for i, w in enumerate(weights)], [float(i) for i in ranked])
        if "lr" not in kept:
            raise InputError(
                "line_search: the steps that are tried need one learning rate for all groups; use one group"
            )
        directions = {place: w for place, w in kept.items() if "/" in place} if self.keep_best else {}
        directions |= {f"{step}/{i}": w for i, w in enumerate(self.weigh(ranked))}
        rounds = len({place.partition("/")[0] for place in directions})
        way = [(self._member(place, step), w / rounds) for place, w in directions.items()]
        lr, best = kept["lr"], away(ranked[0], self.mu)
        tried = [Point(tuple((i, lr * self.gamma**j * w) for i, w in way)) for j in range(self.line_search)]
        values = yield Question([*tried, best, THETA] if self.keep_best else tried, 1)
        picked = self.order(values)[0]
        told = [*(float(i) for i in ranked), float(picked)]
        if picked < self.line_search:
            return Estimate([Term(i, -w) for i, w in way], told, {}, self.gamma**picked)
        if picked == self.line_search and lr > 0:
            return Estimate([Term(ranked[0], -self.mu / lr)], told, {})
        return Estimate([], told, dict(directions), moves=False)

    def order(self, values: Sequence[float]) -> list[int]:
        """Numbers of the points, the best first; equal ones as they come."""
        return sorted(range(len(values)), key=lambda i: -values[i] if self.higher else values[i])

    def _member(self, place: str, step: int) -> int:
        """The number under which `Recalling` finds a direction of this step or a former one."""
        when, _, number = place.partition("/")
        return (step - int(when)) * self.m + int(number)

    @property
    def worst(self) -> float:
        """The loss of a point without one: it comes last."""
        return -math.inf if self.higher else math.inf

    def bearable(self, points: Sequence[Point]) -> int:
        """Finite losses that are enough: those that are told in order."""
        return points.best if isinstance(points, Question) else len(points)

    @property
    def evaluations(self) -> float:
        return self.m + self.line_search + (2.0 if self.recalls else 0.0)

    def describe(self) -> str:
        search = f", line search of {self.line_search}" if self.line_search else ""
        return f"order of the best {self.k} of {self.m}, mu {self.mu:g}{search}"


@dataclass(frozen=True)
class Recalling(Redrawn):
    """`law`, whose member b m + i is member i of b steps ago."""

    m: int

    def meant(self, draw: Draw) -> Draw:
        back, member = divmod(draw.member, self.m)
        return replace(draw, step=draw.step - back, member=member)


class Candidate:
    """One of the points to be ranked: a context in which the model stands there. Evaluate as often as you like, without gradients.

    Random numbers drawn inside are the same for all candidates of a step, and those outside are not moved on.

    Raises:
        ReadElsewhere: on leaving, once: a weight was read past its module, so that it was not perturbed; enter the candidate again.
    """

    def __init__(self, owner: "RankingOptimizer", number: int, point: Point, leaves: list[Moved]):
        self.owner, self.number, self.point, self.leaves = owner, number, point, leaves

    def __enter__(self) -> "Candidate":
        devices = {leaf.parameter.device for leaf in self.leaves}
        key = make_key(int(self.owner.param_groups[0]["seed"]), "candidates", self.owner.steps) >> 1
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(rehearsal(devices))
            torch.manual_seed(key)
            random.seed(key)
            memory = self.owner.memory
            stack.callback(memory.restore, self.leaves)
            stands = memory.watched if isinstance(memory, InForward) else memory.at
            stack.enter_context(stands(self.leaves, self.point))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *fault: Any) -> None:
        self._stack.__exit__(*fault)


class _Open(NamedTuple):
    """A step that waits for an answer."""

    asking: Asking
    leaves: list[Moved]
    question: Question


class RankingOptimizer(PopulationOptimizer):
    """Steps by orders: of losses (`step(closure)`), from a program (`step(ranker=...)`), or from whoever answers (`ask`, `tell`)."""

    _open: _Open | None = None

    def step(  # type: ignore[override]
        self,
        closure: Callable[..., Any] | None = None,
        *,
        ranker: Callable[[list[Candidate]], Sequence[int]] | None = None,
    ) -> float:
        """One update.

        Args:
            closure: as `PopulationOptimizer`; its losses are ranked and otherwise not read.
            ranker: given the candidates, each a context in which the model stands there, returns the numbers of the best, the best
                first: k of them, and one where a line search asks. It is called once, or twice with a line search.

        Returns:
            The mean of the losses; NaN with a ranker.

        Raises:
            InputError: neither or both are given; an order that is none.
        """
        if (closure is None) == (ranker is None):
            raise InputError("step: give a closure that returns losses, or ranker=, which orders candidates")
        if ranker is None:
            self._drop()
            return super().step(closure)
        done = False
        while not done:
            try:
                order = ranker(self.ask())
            except ReadElsewhere:  # found out once
                order = ranker(self.ask())
            done = self.tell(order)
        return math.nan

    @torch.no_grad()
    def ask(self) -> list[Candidate]:
        """The candidates to be ranked next: the same ones until `tell`, also in a process that resumed from a state saved before it."""
        if self._open is None:
            self._begin()
            leaves = self._moved()
            self._watch.model()
            self._prepare_laws(leaves)
            kept = dict(self.param_groups[0][KEPT])
            if len(rates := {float(group["lr"]) for group in self.param_groups}) == 1:
                (kept["lr"],) = rates
            asking = self.probe.ask(self.steps, kept)
            self._open = _Open(asking, leaves, _question(next(asking)))
        return [Candidate(self, i, point, self._open.leaves) for i, point in enumerate(self._open.question)]

    @torch.no_grad()
    def tell(self, order: Sequence[int]) -> bool:
        """The answer to `ask`.

        Args:
            order: numbers of candidates, the best first; at least as many as the question wants (k, or 1 in a line search), further
                ones are not read.

        Returns:
            Whether the step is done; if not, there is a line search: `ask` again.

        Raises:
            InputError: nothing was asked, or the order is none. The question stays open.
        """
        if self._open is None:
            raise InputError("tell: nothing was asked; call ask() first")
        asking, leaves, question = self._open
        best = _checked(order, len(question), question.best)
        places = {number: float(place) for place, number in enumerate(best)}
        worse = float(len(question))
        sign = -1.0 if getattr(self.probe, "higher", False) else 1.0
        try:
            following = asking.send([sign * places.get(number, worse) for number in range(len(question))])
        except StopIteration as done:
            self._open = None
            record = self._record(done.value, [], leaves)
            self._take(leaves, record)
            if self.on_step is not None:
                self.on_step(record)
            self.stepped()
            self._opt_called = True  # what torch's schedulers look for
            return True
        self._open = _Open(asking, leaves, _question(following))
        return False

    @property
    def wanted(self) -> int:
        """How many of the candidates that `ask` gave the answer has to name, in order: k, or 1 in a line search."""
        if self._open is None:
            raise InputError("wanted: nothing was asked; call ask() first")
        return self._open.question.best

    def _drop(self) -> None:
        """Forget a question that nobody answered."""
        if self._open is not None:
            self._open.asking.close()
            self._open = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drop()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open": None}


def _question(points: list[Point]) -> Question:
    return points if isinstance(points, Question) else Question(points, len(points))


def _checked(order: Sequence[int], count: int, best: int) -> list[int]:
    """The first `best` numbers of an order of `count` candidates."""
    numbers = [_whole(number) for number in _each(order)]
    if len(numbers) < best or len(set(numbers)) < len(numbers) or not all(0 <= number < count for number in numbers):
        raise InputError(
            f"tell: expected the numbers of the best {best} of {count} candidates, the best first, each once and from 0 to {count - 1}; "
            f"got {numbers}"
        )
    return numbers[:best]


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise InputError(
            f"tell: expected numbers of candidates, whole ones, got {number!r}; scores are ranked by step(ranker=...)"
        )
    return int(number)


def _each(order: Any) -> Iterator[Any]:
    try:
        yield from order.tolist() if isinstance(order, Tensor) else order
    except TypeError:
        raise InputError(f"tell: expected a sequence of numbers, got {type(order).__name__}") from None
