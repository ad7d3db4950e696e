"""Chains: a perturbed module changes nothing before it, so an `nn.Sequential` is run from there on (feature reuse of DeepZero).

What goes into each child is kept during one step. The loss is the same, bit for bit: that is compared once for each child.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from tare.zeroth.memory import Moved
from tare.zeroth.probes import Point


class Seen(NamedTuple):
    """What went into a child, and how often it had been written then."""

    value: Tensor
    version: int


class Chain:
    """Runs a sequential module from the child that is perturbed.

    Only what goes in is assumed: a call with another input than the first of the step runs whole. A model that draws random numbers as it
    runs, works in place on what goes into a child, or passes anything but tensors is run whole from then on.

    Args:
        chain: the module. model: what it is part of; weights that are read outside of the chain too have all of it run.
    """

    def __init__(self, chain: nn.Sequential, model: nn.Module):
        self.chain, self.model = chain, model
        self.why = ""  # not used any more, because of this
        self.trusted: set[int] = set()  # children at which it was compared
        self.skipped = 0  # children that did not have to run, since the beginning
        self.clear()

    def clear(self) -> None:
        """Forget what was kept: the next step has other weights."""
        self._children: list[nn.Module] = []
        self._places: dict[Tensor, tuple[int, int] | None] = {}
        self._kept: list[list[Seen]] = []  # one for each call of the chain in an evaluation
        self._calls = 0
        self._upto: int | None = None
        self._members: tuple[Moved, list[Point], bool] | None = None

    def give_up(self, why: str) -> None:
        """Run whole from now on."""
        self.why = self.why or why
        self._kept = []

    # -- who is where ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """The children and where they have which weights; once a step."""
        if self._children:
            return
        self._children = list(_flat(self.chain))
        inside = set(self.chain.modules())
        for number, child in enumerate(self._children):
            for p in child.parameters():
                first, _ = self._places.get(p) or (number, number)
                self._places[p] = (first, number)
        for module in self.model.modules():
            if module not in inside:
                self._places.update(dict.fromkeys(module._parameters.values()))  # type: ignore[arg-type]

    def place(self, leaves: list[Moved]) -> int | None:
        """The first child that a perturbation of these leaves changes; one past the last for none; None: outside of the chain too."""
        self._look()
        spots = [self._places.get(leaf.parameter) for leaf in leaves]
        if any(spot is None for spot in spots):
            return None
        return min((spot[0] for spot in spots if spot is not None), default=len(self._children))

    def side_by_side(self, leaf: Moved) -> bool:
        """Whether members that differ in this leaf can run from its child on in one batch."""
        self._look()
        spot = self._places.get(leaf.parameter)
        return not self.why and spot is not None and spot[0] == spot[1]

    # -- running ---------------------------------------------------------------------------------------------------------

    def again(self) -> None:
        """Before each evaluation."""
        self._calls = 0

    @contextmanager
    def upto(self, place: int | None) -> Iterator[None]:
        """Inside, the chain runs from child `place` on where it knows what goes in, and keeps what goes into those up to it."""
        if self.why or place is None:
            yield
            return
        self._upto = place
        with self._standing():
            yield

    @contextmanager
    def members(self, leaf: Moved, points: list[Point], repeated: bool) -> Iterator[None]:
        """Inside, one call of the chain gives the outputs of all points, one after another; they differ in `leaf` alone.

        repeated: whether what goes in is already repeated for them.
        """
        self._members = leaf, points, repeated
        self.again()
        with self._standing():
            yield

    @contextmanager
    def _standing(self) -> Iterator[None]:
        before = self.chain.__dict__.get("forward")
        self.chain.forward = self._forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            if before is None:
                del self.chain.forward
            else:
                self.chain.forward = before  # type: ignore[method-assign]
            self._upto, self._members = None, None

    def _forward(self, x: Any) -> Any:
        number, self._calls = self._calls, self._calls + 1
        self._look()
        if self._members is not None:
            return self._forward_members(x, number)
        kept = self._cache(x, number)
        assert self._upto is not None
        if kept is None or self.why:
            return self._run(x, 0)
        start = max(0, min(self._upto, len(kept) - 1))
        state = _random(x) if start == 0 else None
        h = kept[start].value if kept else x
        for place in range(start, len(self._children)):
            if place == len(kept) and place <= self._upto:
                kept.append(Seen(h, _version(h)))
            h = self._call(place, h, kept)
            if not isinstance(h, Tensor):
                self.give_up("a child gives something else than a tensor")
                return self._run(h, place + 1)
        if state is not None and not _same_random(state, _random(x)):
            self.give_up("the model draws random numbers")
        if any(_version(seen.value) != seen.version for seen in kept):
            self.give_up("a child writes on what goes into it")
        self.skipped += start
        return h

    def _cache(self, x: Any, number: int) -> list[Seen] | None:
        """What is kept of this call; empty where it is the first like it, None where it cannot be used."""
        if not isinstance(x, Tensor) or x.is_inference():
            return None
        if number == len(self._kept):
            self._kept.append([])
        if number > len(self._kept):
            return None
        kept = self._kept[number]
        return kept if not kept or _equal(kept[0], x) else None

    def _run(self, h: Any, start: int) -> Any:
        for child in self._children[start:]:
            h = child(h)
        return h

    def _call(self, place: int, h: Tensor, kept: list[Seen]) -> Any:
        child = self._children[place]
        spoils = getattr(child, "inplace", False) and kept and place <= len(kept)
        return child(h.clone() if spoils else h)

    def _forward_members(self, x: Any, number: int) -> Tensor:
        assert self._members is not None
        leaf, points, repeated = self._members
        if repeated:
            x = x[: x.shape[0] // len(points)]
        spot = self._places[leaf.parameter]
        assert spot is not None
        place, child = spot[0], self._children[spot[0]]
        kept = self._cache(x, number) or []
        if len(kept) > place:
            h = kept[place].value
        else:
            h = x
            for before in range(place):
                h = self._call(before, h, kept)
        name = next(name for name, p in child.named_parameters() if p is leaf.parameter)
        weights = torch.stack([leaf.perturbed(point) for point in points])

        def one(weight: Tensor) -> Tensor:
            found: Tensor = functional_call(
                child, {name: weight}, (h.clone() if getattr(child, "inplace", False) else h,)
            )
            return found

        try:
            out = vmap(one)(weights)
        except RuntimeError:  # an operation without a batched form
            out = torch.stack([one(weight) for weight in weights])
        return self._run(out.flatten(0, 1), place + 1)

    def describe(self) -> list[str]:
        if self.why:
            return [f"features are not reused: {self.why}"]
        return ["features reused: a chain is run from the perturbed child on"]


def chain_of(model: nn.Module | None) -> Chain | None:
    """The largest `nn.Sequential` in a model, by its weights; the outermost of equals. None: there is none."""
    if model is None:
        return None
    found = [m for m in model.modules() if type(m) is nn.Sequential and len(m) > 1]
    compiled = any(type(m).__module__.startswith("torch._dynamo") for m in model.modules())
    if not found or compiled:
        return None
    return Chain(max(found, key=lambda m: sum(p.numel() for p in m.parameters())), model)


def _flat(chain: nn.Sequential) -> Iterator[nn.Module]:
    """Children, those of sequential children in their place, as long as nobody listens to these."""
    for child in chain:
        if type(child) is nn.Sequential and not child._forward_hooks and not child._forward_pre_hooks:
            yield from _flat(child)
        else:
            yield child


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _equal(seen: Seen, other: Tensor) -> bool:
    one = seen.value
    if one._version != seen.version:
        return False
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other)


def _random(x: Any) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if isinstance(x, Tensor) and x.is_cuda:
        states.append(torch.cuda.get_rng_state(x.device))
    return states


def _same_random(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def same_bits(one: Any, other: Any) -> bool:
    """Whether two losses are one and the same number; NaN is itself."""
    a, b = float(one), float(other)
    return a == b or (math.isnan(a) and math.isnan(b))
