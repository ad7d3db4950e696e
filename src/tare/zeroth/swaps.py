"""Swaps: perturbed copies in the place of a module's weights while its forward runs, and where in a module these are."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tare.zeroth.moved import Moved
from tare.zeroth.probes import Point
from tare.zeroth.reads import Reads


@dataclass(frozen=True, eq=False)
class Site:
    """Where a module reads a leaf: an entry of its parameters, buffers or attributes, or a part of one.

    part: names from a tensor made of others down to the leaf, such as ("scale",) of an int8 weight; () where the entry is the leaf.
    """

    module: nn.Module
    name: str
    part: tuple[str, ...] = ()

    @property
    def _home(self) -> dict[str, Any]:
        module = self.module
        return next((h for h in (module._parameters, module._buffers) if self.name in h), module.__dict__)

    def get(self) -> Any:
        return self._home.get(self.name)

    def put(self, value: Any) -> None:
        self._home[self.name] = value


@dataclass
class Trial:
    """What was seen of one evaluation."""

    reads: Reads | None
    entered: set[Tensor] = field(default_factory=set)  # leaves whose copy was in a module that ran
    swaps: list["Swap"] = field(default_factory=list)


class Swap:
    """Leaves of one module, perturbed while its forward runs. A module that calls itself keeps the outer copy."""

    def __init__(
        self, own: list[tuple[Site, Moved]], point: Point, trial: Trial, module: nn.Module | None = None
    ) -> None:
        self.own, self.point, self.trial, self.module = own, point, trial, module
        self.expected = [site.get() for site, _ in own]
        self.depth, self.closed, self.traced = 0, False, False
        self.begin, self.end = self._begin, self._end
        self._handles: list[Any] = []
        self._before: list[tuple[Site, Any]] = []

    def attach(self) -> None:
        """Enter before and leave after any other hook, so that these see one and the same weight."""
        assert self.module is not None
        if (
            "torch._dynamo" in sys.modules
        ):  # code that is compiled while the hooks are there must not take in what they do
            self.begin, self.end = torch.compiler.disable(self._begin), torch.compiler.disable(self._end)
        self._handles = [
            self.module.register_forward_pre_hook(self._before_forward, prepend=True),
            self.module.register_forward_hook(self._after_forward, always_call=True),
        ]

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling():
            self.traced = True
        self.begin(module)

    def _after_forward(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.end(module)

    def _begin(self, module: nn.Module) -> None:
        if module is self.module and not self.closed:  # a replica shares the hooks, but not the weights
            self.depth += 1
            if self.depth == 1:
                self.enter()

    def _end(self, module: nn.Module) -> None:
        if module is self.module and self.depth:
            self.depth -= 1
            if self.depth == 0:
                self.leave()

    def enter(self) -> None:
        reads = self.trial.reads
        with ExitStack() as stack:
            if reads is not None:
                stack.enter_context(reads.paused())
            copies: dict[Tensor, Tensor] = {}
            for (site, leaf), expected in zip(self.own, self.expected, strict=True):
                if site.get() is not expected:  # somebody else has put another weight there
                    continue
                p = leaf.parameter
                if p not in copies:
                    copies[p] = leaf.perturbed(self.point)
                self._before.append((site, expected))
                site.put(_wrapped(copies[p], expected, site.part))
                self.trial.entered.add(p)

    def leave(self) -> None:
        while self._before:
            site, value = self._before.pop()
            site.put(value)

    def suspend(self) -> tuple[int, list[tuple[Site, Any, Any]]]:
        """As if it had left, for the time in which another run of the model goes on; what `resume` wants."""
        held = self.depth, [(site, value, site.get()) for site, value in self._before]
        self.leave()
        self.depth = 0
        return held

    def resume(self, held: tuple[int, list[tuple[Site, Any, Any]]]) -> None:
        """As it stood when it was suspended."""
        self.depth, copies = held
        for site, value, copy in copies:
            self._before.append((site, value))
            site.put(copy)

    def close(self) -> None:
        self.closed = True
        self.leave()
        for handle in self._handles:
            handle.remove()


def _wrapped(copy: Tensor, original: Any, part: tuple[str, ...]) -> Any:
    """What stands in the place of `original`: a parameter where that is one, or a tensor like it that shares all but one part."""
    if part:
        return rebuilt(original, part, copy)
    return nn.Parameter(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy


def rebuilt(whole: Tensor, part: tuple[str, ...], value: Tensor) -> Tensor:
    """A tensor made of others, as `whole` but for one part: nothing is copied."""
    names, context = whole.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: getattr(whole, name) for name in names}
    inner[part[0]] = rebuilt(inner[part[0]], part[1:], value) if len(part) > 1 else value
    made: Tensor = type(whole).__tensor_unflatten__(inner, context, whole.shape, whole.stride())  # type: ignore[attr-defined]
    return made
