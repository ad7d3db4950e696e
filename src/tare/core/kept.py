"""Kept: the forms of a weight that is more or less than its float tensor, and how each is read and written, exactly, in fp32.

`Stochastic`: 16 bits, rounded at random. `Split24`: bf16 and an 8-bit correction in the state, rounded at random below that. `Int8`:
codes, encoded anew at random.
`Master`: 16 bits and an fp32 copy in the state.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tare.core.int8_weight import Int8Weight
from tare.kernels import native, native16, rounding, split24


class Kept(Protocol):
    """How one leaf's weight is kept. Elements are counted row-major."""

    form: ClassVar[str]  # as `Storage.weight` names it

    @property
    def align(self) -> int:
        """Pieces start at multiples of it."""

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 as fp32, flat."""

    def write(self, start: int, update: Tensor, decay: float, alpha: float) -> None:
        """W <- decay W - alpha U for the elements from `start` on that fp32 `update` [n] has."""

    def write_strided(self, update: Tensor, decay: float, alpha: float) -> None:
        """The same for all of a weight that is not contiguous; `update` has its shape."""

    def rounding(self, start: int, stop: int) -> dict[str, Any] | None:
        """What a kernel that forms and writes U in one pass must be told of these elements; None where there is no such kernel."""


@dataclass(frozen=True)
class Stochastic:
    """bf16; the mean of what is written is exact."""

    weight: Tensor
    key: int
    form: ClassVar[str] = "stochastic"
    align: ClassVar[int] = 1

    def read(self, start: int, stop: int) -> Tensor:
        return self.weight.reshape(-1)[start:stop].float()

    def write(self, start: int, update: Tensor, decay: float, alpha: float) -> None:
        part = self.weight.view(-1)[start : start + update.numel()]
        if not native.write_stochastic_(part, update, decay=decay, alpha=alpha, key=self.key, start=start):
            rounding.write_stochastic_(part, update, decay=decay, alpha=alpha, key=self.key, start=start)

    def write_strided(self, update: Tensor, decay: float, alpha: float) -> None:
        rounding.write_stochastic_(self.weight, update, decay=decay, alpha=alpha, key=self.key)

    def rounding(self, start: int, stop: int) -> dict[str, Any] | None:
        return {"key": self.key, "start": start}


@dataclass(frozen=True)
class StochasticHalf(Stochastic):
    """fp16, likewise; no fused kernel writes it."""

    form: ClassVar[str] = "stochastic half"

    def rounding(self, start: int, stop: int) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Split24:
    """bf16 `weight` and int8 `low`, which is contiguous whatever the weight is."""

    weight: Tensor
    low: Tensor
    key: int | None  # of stochastic rounding at the 24th bit
    form: ClassVar[str] = "split24"
    align: ClassVar[int] = 1

    def read(self, start: int, stop: int) -> Tensor:
        return split24.join(self.weight.reshape(-1)[start:stop], self.low.view(-1)[start:stop])

    def write(self, start: int, update: Tensor, decay: float, alpha: float) -> None:
        at = slice(start, start + update.numel())
        part, low = self.weight.view(-1)[at], self.low.view(-1)[at]
        if not native16.write_split_(part, low, update, decay=decay, alpha=alpha, key=self.key, start=start):
            split24.write_split_(part, low, update, decay=decay, alpha=alpha, key=self.key, start=start)

    def write_strided(self, update: Tensor, decay: float, alpha: float) -> None:
        split24.write_split_(self.weight, self.low, update, decay=decay, alpha=alpha, key=self.key)

    def rounding(self, start: int, stop: int) -> dict[str, Any] | None:
        return {"low": self.low.view(-1)[start:stop], "key": self.key, "start": start}


@dataclass(frozen=True)
class Int8:
    """Codes in groups: each piece of whole groups is decoded, stepped and encoded with new scales, rounded stochastically."""

    weight: Int8Weight
    key: int | None
    form: ClassVar[str] = "int8"

    @property
    def align(self) -> int:
        return self.weight.group

    def read(self, start: int, stop: int) -> Tensor:
        return self.weight.read(start, stop)

    def write(self, start: int, update: Tensor, decay: float, alpha: float) -> None:
        self.weight.step(start, update, decay, alpha, self.key)
        torch.autograd.graph.increment_version(self.weight)

    def write_strided(self, update: Tensor, decay: float, alpha: float) -> None:
        raise AssertionError("codes are contiguous")

    def rounding(self, start: int, stop: int) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Master:
    """16-bit `weight`, the rounding to nearest of fp32 `master`, which is contiguous whatever the weight is.

    Where the weight is no longer that rounding (it was loaded, or changed by hand) the weight counts; so does it where the master is
    new, which needs no filling in therefore.
    """

    weight: Tensor
    master: Tensor
    form: ClassVar[str] = "master"
    align: ClassVar[int] = 1

    def read(self, start: int, stop: int) -> Tensor:
        weight, master = self.weight.reshape(-1)[start:stop], self.master.view(-1)[start:stop]
        exact = weight.float()
        return torch.where(master.to(weight.dtype) == weight, master, exact, out=exact)

    def write(self, start: int, update: Tensor, decay: float, alpha: float) -> None:
        stop = start + update.numel()
        exact = self.read(start, stop).mul_(decay).sub_(update, alpha=alpha)
        self.master.view(-1)[start:stop] = exact
        self.weight.view(-1)[start:stop] = exact

    def write_strided(self, update: Tensor, decay: float, alpha: float) -> None:
        exact = self.read(0, self.master.numel()).mul_(decay).sub_(update.reshape(-1), alpha=alpha)
        self.master.view(-1).copy_(exact)
        self.weight.copy_(exact.view(self.master.shape))

    def rounding(self, start: int, stop: int) -> dict[str, Any] | None:
        return None


def kept_as(weight: Tensor, low: Tensor | None, key: int | None, master: Tensor | None = None) -> Kept | None:
    """How a parameter is kept; None where it is just a tensor. key: of stochastic rounding."""
    if isinstance(weight, Int8Weight):
        return Int8(weight, key)
    if low is not None:
        return Split24(weight, low, key)
    if master is not None:
        return Master(weight, master)
    if key is None:
        return None
    return (StochasticHalf if weight.dtype == torch.float16 else Stochastic)(weight, key)
