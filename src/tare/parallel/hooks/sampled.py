"""Sampled: what Rand-k and Top-k share: which leaves are sent in part, how many numbers of each, and what is kept of the rest."""

import math
from typing import Any

import torch
from torch import Tensor

from tare.core.checks import check_whole
from tare.core.errors import InputError
from tare.parallel.hooks.base import Hook, Piece
from tare.parallel.hooks.feedback import Feedback


class Sampled(Hook):
    """A hook that sends k numbers of each large leaf.

    Args:
        fraction: k over the number of elements of a leaf, in (0, 1]; rounded up. At 1 all is sent, as DDP itself does.
        error_feedback: whether what was not sent is kept, and added to the next gradient.
        min_compressed: leaves with fewer elements are sent whole.
        group: as for `Hook`.
    """

    def __init__(self, fraction: float, error_feedback: bool, min_compressed: int, group: Any = None):
        super().__init__(group)
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if not (number and 0.0 < fraction <= 1.0):
            raise InputError(
                f"Invalid fraction: {fraction!r}; expected a number > 0 and <= 1, such as 0.01 for one element in a hundred"
            )
        self.fraction = float(fraction)
        self.feedback = Feedback() if error_feedback else None
        self.min_compressed = check_whole("min_compressed", min_compressed, 0)

    def count(self, numel: int) -> int | None:
        """k for a leaf of so many elements; None: it is sent whole."""
        k = math.ceil(self.fraction * numel)
        return None if numel < max(1, self.min_compressed) or k >= numel else k

    def total(self, piece: Piece) -> Tensor:
        """What is to be sent of a leaf: its gradient, and what is owed."""
        return piece.flat if self.feedback is None else self.feedback.added(piece)

    def rescale(self, factor: float) -> None:
        """Multiply what is kept: call it with new / old when a gradient scaler has changed the scale of the loss."""
        if self.feedback is not None:
            self.feedback.rescale(factor)

    def own_state(self) -> dict[str, Any]:
        return {} if self.feedback is None else dict(self.feedback.state())

    def load_own(self, state: dict[str, Any]) -> None:
        if self.feedback is not None:
            self.feedback.load(state, self._names)


def spoilt(values: Tensor, total: Tensor) -> Tensor:
    """`values`, or NaN in their place if `total` has a number that is not finite: so all ranks learn of it, wherever it was."""
    sound = torch.linalg.vector_norm(total, math.inf).isfinite()
    return torch.where(sound, values, math.nan)
