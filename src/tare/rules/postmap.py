"""PostMap: what may be done to a whole direction before it is written: a stateless map on matrices [..., m, n].

Leading dimensions are a batch (experts): each matrix is mapped by itself. The kinds live in `maps`, the larger ones in files of their own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tare.core.transform import Sharding


@dataclass(frozen=True)
class PostMap:
    """Base of all maps. A zero matrix gives zero; a NaN stays visible, at least in its own matrix; x is not changed.

    `sharding` says how much of the matrix one call must see. Vectors and scalars count as one row where a map needs a matrix.
    """

    sharding: ClassVar[Sharding] = "matrix"

    def __call__(self, x: Tensor) -> Tensor:
        """The mapped x, in its shape and dtype (32 bits or more)."""
        raise NotImplementedError

    def consume(self, x: Tensor) -> Tensor:
        """The same for an x that nobody reads afterwards: the result may take its memory, and may be narrower."""
        return self(x)

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In what dtype a direction that is computed in `dtype` is best built when it is to be consumed."""
        return dtype

    @property
    def workspace(self) -> float:
        """How many matrices of the size of x a step may need beside it, the result included."""
        return 1.0

    def describe(self) -> str:
        """A few words for tables."""
        return type(self).__name__.lower()


def safe_divide_(x: Tensor, norm: Tensor) -> Tensor:
    """x / norm in place, where 0 / 0 counts as 0 and a NaN stays one; norm broadcasts over x and is overwritten."""
    return x.div_(norm.masked_fill_(norm == 0, 1.0))
