"""Projected: for methods that step from P^T G alone: the projection [r, n] is exchanged in place of the gradient [m, n]."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.projected import Projecting
from tare.parallel.hooks.base import GradBucket, Hook, Piece
from tare.parallel.hooks.wire import used_here


class Projected(Hook):
    """Sends R of every leaf whose step needs nothing else, in steps that keep its basis; the rest whole. No error: exact.

    The mean of projections is the projection of the mean, so parameters are those of plain DDP up to the rounding of one sum. A step
    that computes a basis from the gradient sends that leaf whole; a basis drawn from its key never does. Leaves that are stepped
    element by element, and methods that use what the projection leaves out (the residual of Fira, the raw gradient of APOLLO), are
    sent whole: `why` says so, leaf by leaf.

    Between backward and the step, `p.grad` of such a leaf has its usual shape and holds R, then zeros; after the step zeros. A norm of
    all gradients is then one of projections: clipping to a norm is not that of plain DDP. Micro-batches but the last belong in
    `ddp.no_sync()`.

    Args:
        optimizer: a tare optimizer over the leaves of the model, built with release=False.
        group: as for `Hook`.

    Raises:
        InputError: another optimizer, or (when attached) no leaf that qualifies.
    """

    kind: ClassVar[str] = "projected"

    def __init__(self, optimizer: Any, *, group: Any = None):
        super().__init__(group)
        if not isinstance(optimizer, Projecting):
            raise InputError(
                f"Projected: expected an optimizer of tare, got {type(optimizer).__name__}; use RandK, TopK or PowerSGD with it"
            )
        self.optimizer = optimizer

    def name_leaves(self, model: nn.Module) -> "Projected":
        super().name_leaves(model)
        why = self.why()
        if all(why.values()):
            # the most telling one: a matrix that could have been projected
            name = max(why, key=lambda n: ("uses the whole" in why[n], "; rank" in why[n], "weight" in n))
            reason = why[name]
            raise InputError(
                f"Projected: no leaf can be stepped from its projection ({name}: {reason}); use RandK, TopK or PowerSGD, or a method that "
                "projects and keeps no residual, such as galore"
            )
        model.register_forward_pre_hook(self._begin)
        return self

    def why(self) -> dict[str, str]:
        """By leaf: why it is always sent whole; empty where its projection is sent."""
        return {name: self.optimizer.projection_refused(p) for p, name in self._names.items()}

    def _begin(self, model: Any, _: Any) -> None:
        """Before forward: gradients that were taken away were projections no more."""
        self.optimizer.drop_projections()
        if self.optimizer.holds_projections and torch.is_grad_enabled() and not model.require_backward_grad_sync:
            raise InputError(
                "Projected: gradients wait for a step already, and no_sync() would add to their projections; put all micro-batches but "
                "the last inside ddp.no_sync()"
            )

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        jobs: list[tuple[Piece, bool]] = []  # leaf, whether projected
        parts: list[Tensor] = []
        for piece in self.pieces(bucket):
            part = self.optimizer.project_gradient(piece.parameter, piece.grad)
            if part is None or part.numel() >= piece.flat.numel():
                jobs.append((piece, False))
                parts.append(piece.flat)
                continue
            self.optimizer.hold_projection(piece.parameter, tuple(part.shape), part.dtype)
            jobs.append((piece, True))
            parts.append(part.reshape(-1).to(buffer.dtype))
        if not any(projected for _, projected in jobs):
            return self.send_whole(buffer)

        @torch.no_grad()
        def spread(done: torch.futures.Future[Any]) -> Tensor:
            means, start = done.value()[0], 0
            used_here(means)
            for (piece, projected), part in zip(jobs, parts, strict=True):
                length = part.numel()
                piece.flat[:length] = means[start : start + length]
                if projected:
                    piece.flat[length:] = 0
                start += length
            return buffer

        return self.wire.mean(torch.cat(parts)).then(spread)

    def describe(self) -> str:
        refused = [bool(reason) for reason in self.why().values()] if self._names else []
        return f"projections of {len(refused) - sum(refused)} leaves, {sum(refused)} whole"
