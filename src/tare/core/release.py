"""Release: stepping a leaf inside backward, as soon as its gradient is whole, and freeing the gradient at once.

Here are the hooks and the optimizer's own side of it. What micro-batches leave behind is `core.gathering`; the norm of a step whose
gradients are never all there is `core.clipping`.
"""

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tare.core.clipping import NORM, Clipped, Clipping, Mode, Strict, squared_norm
from tare.core.errors import InputError
from tare.core.gathering import Gathering, Source
from tare.core.state import State
from tare.core.write import prepare_leaf

if TYPE_CHECKING:
    from tare.core.optimizer import Entry
    from tare.core.transform import Step, Work


class Release:
    """The hooks of one optimizer, what it has gathered between micro-batches, and its clipping."""

    def __init__(self, step: Callable[[Tensor], None]):
        self._step = step
        self._handles: list[Any] = []
        self._paused = False
        self.more: Callable[[], bool] | None = None  # told by a loop that is not ours
        self.done: set[Tensor] = set()  # leaves stepped since the last `step()`
        self.again = self._warned = False  # one of them twice; and that has been said
        self.gathering = Gathering()
        self.clipping: Clipping | None = None

    def attach(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(self._step))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def accumulating(self) -> bool:
        """Whether more micro-batches of the step follow the one whose backward runs now."""
        return self._paused or (self.more is not None and self.more())

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def note(self, p: Tensor) -> None:
        """A leaf is stepped. One that comes again begins a new step."""
        self.again = self.again or p in self.done
        self.done.add(p)

    def ended(self) -> None:
        """At the end of `step()`. Warns, once, where backward stepped leaves more than once before it."""
        if self.again and not self._warned:
            self._warned = True
            warnings.warn(
                "release: backward ran more than once before step(), and each time it stepped; put every backward of a step but the last "
                "into optimizer.accumulating(), or tell by optimizer.accumulate_while() which those are",
                stacklevel=5,
            )
        self.forget()

    def forget(self) -> None:
        """No leaf is stepped yet."""
        self.done.clear()
        self.again = False


@contextmanager
def rehearsal(devices: Iterable[torch.device]) -> Iterator[None]:
    """Draw random numbers inside as if nothing had been drawn: afterwards the generators of torch (the CPU's and those of the
    CUDA devices given), Python and NumPy stand where they stood, so that the same dropout falls again."""
    numbers = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=numbers):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


class Releasing:
    """The part of `tare.Optimizer` that steps inside backward: accumulation, clipping, and one call for both."""

    if TYPE_CHECKING:
        defaults: dict[str, Any]
        param_groups: list[dict[str, Any]]
        _entries: dict[Tensor, Entry]
        _release: Release | None

        def _raw(self, p: Tensor, entry: Entry) -> dict[str, Any]: ...
        def _step_of(self, p: Tensor, entry: Entry, group: dict[str, Any], count: int) -> Step: ...
        def _work(self, p: Tensor, entry: Entry, group: dict[str, Any], *, ahead: bool = False) -> Work: ...
        def _update(self, ready: Iterable[tuple[Tensor, dict[str, Any]]], compressed: Tensor | None = None) -> None: ...

    @torch.no_grad()
    def _step_in_backward(self, p: Tensor) -> None:
        assert self._release is not None
        clipping, gathering = self._release.clipping, self._release.gathering
        if clipping is not None and clipping.measuring:
            clipping.measure(p, more=self._release.accumulating)
        elif gathering.share is not None:
            if p in gathering.share and self._release.accumulating:
                return
            if p in gathering.share:
                self._prepare_from_sum(p)
            p.grad = None
        elif self._release.accumulating:
            self._gather(p)
        else:
            self._release.note(p)
            self._step_released(p)

    def _gather(self, p: Tensor) -> None:
        """One micro-batch of several: keep the projected gradient where that is enough, else the whole one in p.grad."""
        entry, release = self._entries[p], self._release
        assert release is not None
        assert p.grad is not None
        if entry.projects and (release.gathering.source == "first" or entry.transform.drawn):
            self._prepare(p, whole=False)
        part = self._compressed(p)
        if release.clipping is not None and release.clipping.strict == "leaf":
            # Nothing has been stepped yet: a bad micro-batch is best seen now. It shows in its projection too.
            release.clipping.require_finite(squared_norm(p.grad if part is None else part), entry.leaf.name)
        if part is not None:
            release.gathering.add(p, part)
            p.grad = None

    def _compressed(self, p: Tensor) -> Tensor | None:
        """The projection of p.grad that micro-batches may leave instead of it, or None."""
        entry = self._entries[p]
        if not entry.transform.accumulates:
            return None
        assert p.grad is not None
        return entry.transform.compress(p.grad, *self._coming(p))

    def _coming(self, p: Tensor) -> tuple[State, "Step"]:
        """A leaf's state, to read, and its coming step."""
        entry = self._entries[p]
        raw = self._raw(p, entry)
        return State(raw, entry.slots), self._step_of(p, entry, entry.group, raw["step"] + 1)

    def _due(self, p: Tensor) -> bool:
        """Whether micro-batches cannot be summed as projections in the coming step, because a basis is computed from their sum."""
        return self._entries[p].projects and self._entries[p].transform.due(*self._coming(p))

    def _prepare(self, p: Tensor, whole: bool) -> None:
        """Compute the basis of the coming step from p.grad, if it is due and p.grad can give one."""
        if self._due(p):
            entry = self._entries[p]
            prepare_leaf(entry.transform, self._work(p, entry, entry.group, ahead=True), whole)

    def _prepare_from_sum(self, p: Tensor) -> None:
        """The same, from the sum of all micro-batches as the step itself would see it: clipped."""
        assert self._release is not None
        factor = self._release.clipping.factor() if self._release.clipping else 1.0
        if 0.0 < factor < 1.0:
            assert p.grad is not None
            p.grad.mul_(factor)
        if factor > 0.0:
            self._prepare(p, whole=True)

    def _step_released(self, p: Tensor) -> None:
        assert self._release is not None
        entry, part = self._entries[p], self._release.gathering.take(p)
        clipping = self._release.clipping
        if clipping is None or clipping.admit(p, part, entry.leaf.name):
            self._update([(p, entry.group)], part)
        p.grad = None

    def clip_release(
        self, max_norm: float | None, mode: Mode = "previous", *, parts: int = 1, strict: bool | Strict = False
    ) -> None:
        """Clip by the norm of all gradients although release mode never has them together; any method.

        `two-pass`: a first backward only gathers the norm (`measuring`), the second one steps: what `clip_grad_norm_` and an
        ordinary step do, in twice the time. A norm that is not finite then drops the whole step, before anything has moved.
        `previous`: by the norm of the step before, gathered while it was taken: no further pass. A norm that was not finite
        is not remembered. The first step is clipped only if it was measured, as `backward` does. The norm is kept in
        the parameter groups, hence in checkpoints.

        Args:
            max_norm: the largest norm a step may have; None: the norm is only gathered, for `clipped`, and with two-pass
                still drops a step whose norm is not finite.
            mode: `previous` or `two-pass`.
            parts: two-pass with micro-batches: measuring passes, each of which holds 1/parts of the summed gradients.
            strict: what becomes of a gradient that is not finite where no first pass has found it. `leaf`, or True: raise
                `tare.core.clipping.NotFinite` inside backward, before its leaf is stepped; on a GPU the host waits for each
                leaf. `step`: it counts as zero, without waiting, and `step` raises at its end, when all leaves are stepped.

        Raises:
            InputError: not in release mode, or a value out of range.
        """
        if self._release is None:
            raise InputError("clip_release: the optimizer has release=False; use torch.nn.utils.clip_grad_norm_ there")
        how: Strict | None = "leaf" if strict is True else strict or None
        self._release.clipping = Clipping(self.param_groups, max_norm, mode, parts, how)
        for group in (self.defaults, *self.param_groups):
            group.setdefault(NORM, 0.0)

    @property
    def clipped(self) -> Clipped | None:
        """Norm and factor of the last finished step in release mode; None without `clip_release`, or before it."""
        return self._release.clipping.last if self._release and self._release.clipping else None

    def refresh_release(self, source: Source = "sum", *, parts: int = 1) -> None:
        """What a new basis is computed from where a step has several micro-batches; only back-projecting methods have a choice.

        `sum`: from the sum of their whole gradients, as without release. With parts=1 all of them are held until the step. With
        more, a step that computes bases runs its micro-batches `parts` times and holds 1/parts of them each time: the same
        bases, and a lower peak for more time at a refresh. `first`: from the first micro-batch that gives the leaf a usable
        gradient: neither memory nor time, but a noisier basis than the published one.

        A basis that is drawn from its key needs no gradient, and is drawn before the first micro-batch in any case.

        Args:
            source: `sum` or `first`.
            parts: with `sum`, passes over the micro-batches of such a step, the one that steps included.

        Raises:
            InputError: not in release mode, or a value out of range.
        """
        if self._release is None:
            raise InputError("refresh_release: the optimizer has release=False; there, gradients are whole anyway")
        self._release.gathering = Gathering(source, parts)

    @property
    def refresh_passes(self) -> int:
        """How many passes inside `refreshing` the coming step needs before the one that steps, if it has several micro-batches."""
        if self._release is None or self._release.gathering.parts == 1:
            return 0
        return max(0, len(self._release.gathering.split(*self._projected())) - 1)

    def _projected(self) -> tuple[list[Tensor], int]:
        """The leaves whose basis the coming step computes from a gradient, and the bytes of all leaves that ever do."""
        own = [p for p, e in self._entries.items() if p.requires_grad and e.projects and not e.transform.drawn]
        return [p for p in own if self._due(p)], sum(p.numel() * p.element_size() for p in own)

    @contextmanager
    def refreshing(self, part: int = 0) -> Iterator[None]:
        """Backward inside this only computes the bases of one share of the leaves, from the sum of whole gradients; it steps nothing.

        All micro-batches of the step belong inside, all but the last in `accumulating`; after `measuring`, before the pass that
        steps. part: which of `refresh_passes` passes.

        Raises:
            InputError: there is no such pass.
        """
        if self._release is None:
            raise InputError("refreshing: the optimizer has release=False; there, gradients are whole anyway")
        gathering = self._release.gathering
        if part == 0:
            gathering.begin(*self._projected())
        with gathering.watch(part) as leaves:
            try:
                yield
                with torch.no_grad():
                    for p in leaves:  # what only earlier micro-batches gave
                        if p.grad is not None:
                            self._prepare_from_sum(p)
            finally:
                for p in leaves:
                    p.grad = None

    @contextmanager
    def measuring(self, part: int = 0) -> Iterator[None]:
        """Backward inside this only measures: it adds to the norm of the coming step, frees gradients, and steps nothing.

        All micro-batches of the step belong inside, all but the last in `accumulating`. part: which of `parts` passes.

        Raises:
            InputError: `clip_release` was not called.
        """
        clipping = self._release.clipping if self._release else None
        if clipping is None:
            raise InputError("measuring: nothing to measure for; build with release=True and call clip_release first")
        with clipping.watch([p for p in self._entries if p.requires_grad], part):
            yield

    def backward(self, *losses: Callable[[], Tensor]) -> list[Tensor]:
        """Forward and backward of one step in any mode, clipped if `clip_release` says so; then call `step()`.

        Args:
            losses: one function for each micro-batch, which returns its share of the loss. Called once more for each measuring
                pass and each pass that computes bases (`refresh_release`), with the same random numbers, so that dropout falls
                the same. What forward changes besides (the statistics of a batch norm) changes that often.

        Returns:
            The losses, detached. If the measured norm is not finite they are those of the measuring pass, and nothing was stepped.

        >>> from torch import nn
        >>> from tare import AdamW
        >>> net = nn.Linear(4, 2)
        >>> optimizer = AdamW(net, lr=0.1, release=True)
        >>> optimizer.clip_release(1.0, "two-pass")
        >>> losses = optimizer.backward(lambda: (100 * net(torch.ones(1, 4))).square().mean())
        >>> optimizer.step()
        >>> optimizer.clipped.factor < 1 and net.weight.grad is None
        True
        """
        if not losses:
            raise InputError("backward: no loss given; pass a function that returns it for each micro-batch")
        clipping = self._release.clipping if self._release else None
        devices = {p.device for p in self._entries}
        if clipping is not None and clipping.wants_pass:
            for part in range(clipping.parts):
                with rehearsal(devices), self.measuring(part):
                    values = self._backward(losses)
            if not math.isfinite(clipping.measured or 0.0):
                return values
        for part in range(self.refresh_passes if len(losses) > 1 else 0):
            with rehearsal(devices), self.refreshing(part):
                self._backward(losses)
        return self._backward(losses)

    def _backward(self, losses: tuple[Callable[[], Tensor], ...]) -> list[Tensor]:
        values = []
        for number, loss_of in enumerate(losses, 1):
            with nullcontext() if number == len(losses) else self.accumulating():
                loss = loss_of()
                loss.backward()
                values.append(loss.detach())
                del loss  # and with it the graph, before the next forward
        return values

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around every backward but the last of a step. Only release mode needs it; elsewhere it does nothing.

        Raises:
            InputError: in release mode, where the algebra does not allow it; see `accumulation_refused`.
        """
        if self._release is None:
            yield
            return
        self._require_accumulation()
        with self._release.pause():
            yield

    def accumulate_while(self, more: Callable[[], bool] | None) -> None:
        """Every backward for which `more()` is true counts as one inside `accumulating`: for a loop that is somebody else's, and knows.

        Only release mode needs it; elsewhere it does nothing. None: no longer.

        Raises:
            InputError: as `accumulating`.
        """
        if self._release is not None:
            if more is not None:
                self._require_accumulation()
            self._release.more = more

    def _require_accumulation(self) -> None:
        assert self._release is not None
        clipping = self._release.clipping
        by_previous = clipping is not None and clipping.max_norm is not None and clipping.mode == "previous"
        if reason := self.accumulation_refused(by_previous):
            raise InputError(reason)

    def accumulation_refused(self, by_previous: bool = False) -> str:
        """Why release mode cannot step on several micro-batches, in one line; empty where it can.

        by_previous: with clipping by the norm of the step before.
        """
        for entry in self._entries.values():
            whole = [t for t in entry.phases if t.sharding != "elementwise" and not t.accumulates]
            if whole:
                return (
                    f"release with accumulation: {whole[0].describe()} scales the raw gradient of "
                    f"{entry.leaf.name}, so it needs the whole one; use release=False or one micro-batch per step"
                )
            if by_previous and entry.projects:
                return (
                    f"release with accumulation: of {entry.leaf.name} only a projected gradient is summed, which has not "
                    "the norm of the whole one, so no step can be clipped by the one before; clip by two-pass, or use "
                    "one micro-batch per step"
                )
        return ""
