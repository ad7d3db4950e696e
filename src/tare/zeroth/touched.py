"""Touched: memory plans for points at which few leaves, or few elements of one, stand away from theta. The rest is not looked at."""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.zeroth.chains import Chain, same_bits
from tare.zeroth.coordinates import FIRST, Coordinates, places_of, subscripts
from tare.zeroth.directions import Directed
from tare.zeroth.memory import Loss, Memory, Moved
from tare.zeroth.probes import Point


class Elements(Memory):
    """Writes the elements that a point moves, and puts them back as they were. Nothing else is read or written."""

    name = "in place, element by element"

    @contextmanager
    def at(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        members = point.members
        with ExitStack() as stack:
            for leaf in leaves:
                weight = leaf.parameter.detach()
                places = places_of(members, leaf.state, weight.numel())
                if places:
                    where = subscripts(places, weight)
                    stack.callback(weight.__setitem__, where, weight[where].clone())
                    leaf.add_(weight, point)
            yield

    def check(self, leaves: Mapping[str, tuple[Tensor, Directed]]) -> None:
        for name, (p, directed) in leaves.items():
            if isinstance(p, Int8Weight):
                raise InputError(
                    f"memory: {name} is int8, its codes are too coarse to be perturbed in place; use 'forward'"
                )
            if not isinstance(directed.law, Coordinates):
                raise InputError(f"memory: directions of {name} are dense; use 'forward' or 'in-place-exact'")

    def describe(self) -> list[str]:
        return [f"perturbed {self.name}: put back bit for bit"]


class Touched(Memory):
    """`inner`, told of the leaves that a point moves only; and a chain, where there is one, that is run from there on."""

    def __init__(self, inner: Memory, chain: Chain | None = None):
        self.inner, self.chain = inner, chain
        self.name, self.drifts = inner.name, inner.drifts
        self._known: tuple[list[Moved], list[Moved], list[int]] | None = None

    def touched(self, leaves: list[Moved], point: Point) -> list[Moved]:
        """The leaves that are away from theta."""
        if self._known is None or self._known[0] is not leaves:
            ordered = sorted(leaves, key=lambda leaf: int(leaf.state[FIRST]))
            self._known = leaves, ordered, [int(leaf.state[FIRST]) for leaf in ordered]
        _, ordered, firsts = self._known
        found = {bisect_right(firsts, member) - 1 for member in point.members}
        return [ordered[number] for number in sorted(found)]

    def evaluate(self, leaves: list[Moved], point: Point, run: Callable[[], Loss]) -> Loss:
        near = self.touched(leaves, point)
        moved = leaves if self.inner.drifts else near
        if self.chain is None or self.chain.why:
            return self.inner.evaluate(moved, point, run)
        chain, place = self.chain, self.chain.place(near)

        def again() -> Loss:
            chain.again()
            return run()

        before = chain.skipped
        with chain.upto(place):
            loss = self.inner.evaluate(moved, point, again)
        if chain.skipped == before or place is None or place in chain.trusted:
            return loss
        chain.trusted.add(place)
        whole = self.inner.evaluate(moved, point, run)
        if not same_bits(loss, whole):
            chain.give_up("a loss was another one than that of the whole model")
            warnings.warn(
                "reuse: the loss of a chain that is run in part differs from that of the whole model; it is run whole from now on",
                stacklevel=8,
            )
        return whole

    @contextmanager
    def at(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        with self.inner.at(leaves if self.inner.drifts else self.touched(leaves, point), point):
            yield

    def restore(self, leaves: list[Moved]) -> None:
        self.inner.restore(leaves)
        self._known = None
        if self.chain is not None:
            self.chain.clear()

    def check(self, leaves: Mapping[str, tuple[Tensor, Directed]]) -> None:
        self.inner.check(leaves)

    def describe(self) -> list[str]:
        return [*self.inner.describe(), *(self.chain.describe() if self.chain is not None else [])]
