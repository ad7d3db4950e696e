"""Residual: what is done with the part of the gradient outside the subspace. Fira scales it by the low-rank column norm ratio."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice
from tare.core.tensors import column_norms
from tare.kernels import gemm

_GUARD = 1e-8  # added to |R_j| in the published codes of Fira and APOLLO


def norm_ratio(direction: Tensor, projected: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """phi_j = scale |N_j| / (|R_j| + 1e-8) over `dim`, broadcastable against G."""
    return column_norms(direction, dim).mul_(scale).div_(column_norms(projected, dim).add_(_GUARD))


@dataclass(frozen=True)
class NormRatioResidual:
    """Fira's residual, S = (G - a lift(R)) * phi.

    `code` (the repository, default): a = alpha, phi from N before bias correction, so the limiter sees S without it.
    `paper` (Algorithm 1): a = 1, phi from the corrected N, and alpha multiplies S too. Equal at alpha = 1 but for the
    place of the bias correction.
    """

    form: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        check_choice("residual form", self.form, ("code", "paper"))

    def outside(self, grad: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        """G - a * left @ right: the one full-size temporary of this method."""
        a = alpha if self.form == "code" else 1.0
        with gemm.fast_matmul():
            return torch.addmm(grad, left.to(grad.dtype), right.to(grad.dtype), alpha=-a)
