"""Sinkhorn normalisation of a matrix: rows and columns of unit root mean square at once (Scetbon et al. 2025, arXiv 2502.06742)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tare.core.checks import check_whole
from tare.kernels import native_norms, plain_norms
from tare.rules.postmap import PostMap


@dataclass(frozen=True)
class Sinkhorn(PostMap):
    """X <- sqrt(n) X / row norms, then X <- sqrt(m) X / column norms, `iterations` times (columns last).

    Rows and columns of zeros stay zero; a NaN makes its whole matrix NaN. X itself is read once for each iteration: see
    `kernels/plain_norms.py`.

    iterations: L = 5, as in third-party code (no official one exists); from about 4 on the norms agree to 1e-4.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        check_whole("iterations", self.iterations)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel() == 0:
            return out
        matrix, to = (x, out) if x.ndim > 1 else (x.reshape(1, -1), out.view(1, -1))
        if x.ndim > 2 and x.device.type == "cpu":  # batched products with vectors are slow there
            stack, results = x.reshape(-1, *x.shape[-2:]), to.view(-1, *x.shape[-2:])
            for each, result in zip(stack, results, strict=True):
                self._scale(each, result)
        else:
            self._scale(matrix, to)
        return out

    def _scale(self, x: Tensor, out: Tensor) -> None:
        if not native_norms.sinkhorn(x, self.iterations, out):
            plain_norms.sinkhorn(x, self.iterations, out)

    def describe(self) -> str:
        return f"sinkhorn {self.iterations}"
