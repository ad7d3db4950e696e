"""Feedback: what compression left unsent, kept on each rank and added to the next gradient (Seide et al. 2014; Stich et al. 2018)."""

from typing import Any

import torch
from torch import Tensor

from tare.core.errors import CheckpointError
from tare.parallel.hooks.base import Piece

PREFIX = "error."


class Feedback:
    """The errors E of one rank, by leaf: flat, in fp32, or fp64 for gradients in fp64; zero until a leaf is first sent in part.

    A step sends C(G + E) and keeps E <- G + E - C(G + E): what was sent so far and what is kept add up to all gradients.
    """

    def __init__(self) -> None:
        self.errors: dict[str, Tensor] = {}

    def added(self, piece: Piece) -> Tensor:
        """G + E, in the memory of G where that is wide enough. E stays until `settle`."""
        error = self._of(piece)
        if error.dtype == piece.flat.dtype:
            return piece.flat.add_(error)
        return error + piece.flat

    def settle(self, piece: Piece, total: Tensor, index: Tensor, sent: Tensor, sound: Tensor) -> None:
        """E <- G + E with what was sent at `index` taken off; E as it was where the exchange was not sound (0-d bool)."""
        error = self._of(piece)
        total[index] -= sent.to(total.dtype)
        torch.where(sound, total, error, out=error)

    def _of(self, piece: Piece) -> Tensor:
        error = self.errors.get(piece.name)
        if error is None:
            dtype = torch.promote_types(piece.flat.dtype, torch.float32)
            error = torch.zeros(piece.flat.numel(), dtype=dtype, device=piece.flat.device)
            self.errors[piece.name] = error
        return error

    def rescale(self, factor: float) -> None:
        """Multiply all errors, where the scale of the loss has changed by `factor`."""
        for error in self.errors.values():
            error.mul_(factor)

    def state(self) -> dict[str, Tensor]:
        return {PREFIX + name: error for name, error in self.errors.items()}

    def load(self, state: dict[str, Any], leaves: dict[Tensor, str]) -> None:
        """Take errors out of a state. leaves: the model's, where they are known."""
        by_name = {name: p for p, name in leaves.items()}
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            if not key.startswith(PREFIX):
                continue
            name = key.removeprefix(PREFIX)
            p = by_name.get(name)
            if p is None:
                raise CheckpointError(
                    f"{key}: the model has no such leaf, or the hook is not attached yet; attach it before loading"
                )
            wanted = torch.promote_types(p.dtype, torch.float32)
            if value.numel() != p.numel() or value.dtype != wanted:
                raise CheckpointError(
                    f"{key}: {value.numel()} numbers in {value.dtype}, and the leaf has {p.numel()}, whose errors are {wanted}"
                )
            found[name] = value.to(p.device, copy=True)
        self.errors = found
