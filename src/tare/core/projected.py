"""Projected: gradients that cross a link as their projection R [r, n] instead of [m, n], and are stepped from that.

A communication hook asks for R of one rank's gradient, exchanges it, and leaves the result in the memory of the gradient itself: R
first, then zeros. So what scales or tests gradients between backward and the step (clipping, loss scaling, looking for NaN) acts on
R as well.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.core.state import State

if TYPE_CHECKING:
    from tare.core.optimizer import Entry
    from tare.core.transform import Step


class Projecting:
    """The part of `tare.Optimizer` that takes projections in place of gradients."""

    if TYPE_CHECKING:
        _entries: dict[Tensor, Entry]
        _held: dict[
            Tensor, tuple[tuple[int, ...], torch.dtype]
        ]  # leaves whose p.grad is a projection: its shape and dtype
        _release: Any

        def _raw(self, p: Tensor, entry: Entry) -> dict[str, Any]: ...
        def _step_of(self, p: Tensor, entry: Entry, group: dict[str, Any], count: int) -> Step: ...

    def projection_refused(self, p: Tensor) -> str:
        """Why a leaf is never stepped from its projected gradient, in a few words; empty where it can be."""
        entry = self._entries.get(p)
        if entry is None:
            return "not a parameter of this optimizer"
        if self._release is not None:
            return "release=True steps it inside backward, before ranks have exchanged anything"
        if p.numel() == 0 or not p.is_contiguous():
            return "empty" if p.numel() == 0 else "not contiguous in memory"
        if entry.place is not None:
            return "cut by fully_shard"
        if entry.rotating is not None:
            return "takes turns with others"
        if entry.projects:
            return ""
        transform = entry.transform
        whole = (
            "uses the whole gradient"
            if transform.sharding == "matrix"
            else "goes element by element through the gradient"
        )
        return f"{transform.describe()} {whole}" + (f"; {entry.why}" if entry.why else "")

    @torch.no_grad()
    def project_gradient(self, p: Tensor, grad: Tensor) -> Tensor | None:
        """R of `grad`, one rank's gradient of the coming step; None where this leaf, or a step that computes a basis, needs the whole.

        Linear in `grad`: the mean of what ranks find is the projection of their mean gradient. The answer depends on no number in
        `grad`, so all ranks get a tensor, or all None. A basis that is drawn from its key is drawn here, when it is due.

        grad: of the shape of the leaf.
        """
        if self.projection_refused(p):
            return None
        entry = self._entries[p]
        raw = self._raw(p, entry)
        step = self._step_of(p, entry, entry.group, raw["step"] + 1)
        state = State(raw, entry.slots, key=step.random_key(step.count, "state"))
        if entry.transform.drawn:
            entry.transform.prepare(grad, state, step, False)
            state.flush()
        return entry.transform.compress(grad, State(raw, entry.slots), step)

    def hold_projection(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Tell that p.grad of the coming step will hold a projection of `shape`, flat, and zeros after it.

        Raises:
            InputError: it holds one already, which no step has taken: a second backward has mixed it with a gradient.
        """
        if p in self._held:
            raise InputError(
                f"{self._entries[p].leaf.name}: p.grad already held a projection, and backward has added a gradient to it; put all "
                "micro-batches but the last inside ddp.no_sync(), and drop a step with optimizer.zero_grad()"
            )
        self._held[p] = (shape, dtype)

    def drop_projections(self, *, all_leaves: bool = False) -> None:
        """Forget projections whose gradients are gone (p.grad is None); or all of them."""
        for p in list(self._held):
            if all_leaves or p.grad is None:
                del self._held[p]

    @property
    def holds_projections(self) -> bool:
        """Whether gradients wait that are projections."""
        return bool(self._held)

    def _take_projection(self, p: Tensor) -> Tensor:
        """R out of p.grad, which is zero afterwards."""
        shape, dtype = self._held.pop(p)
        assert p.grad is not None
        flat = p.grad.view(-1)
        part = flat[: math.prod(shape)].clone().view(shape)
        flat.zero_()
        return part.to(dtype)
