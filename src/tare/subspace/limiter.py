"""The norm-growth limiter of Fira (arXiv 2410.01623) and APOLLO (arXiv 2412.05270): a norm may grow by gamma a step, no more."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.tensors import is_fake

_GUARD = 1e-8  # added to the previous norm in both published codes


@dataclass(frozen=True)
class NormGrowth:
    """q = max(|S| / (rho + 1e-8), gamma) / gamma; S <- S / q; rho <- |S| / q. The first norm only sets rho.

    # differs from the published code: a zero or non-finite norm leaves rho alone; `legacy` lets a zero gradient set rho = 0,
    after which the norm restarts from 1e-8 and needs 1,388 steps to come back to 1.
    """

    gamma: float = 1.01
    zero: Literal["skip", "legacy"] = "skip"

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma)
        check_choice("limiter zero policy", self.zero, ("skip", "legacy"))

    def factor(self, norm: Tensor, rho: Tensor) -> Tensor:
        """1 / q as a 0-d tensor, or one for each of a batch, and `rho` moved on in place. No synchronisation. rho starts at
        infinity."""
        if norm.device.type == "cpu" and norm.ndim == 0 and not is_fake(norm):
            return self._factor_of_numbers(norm, rho)
        norm = norm.to(rho.dtype)
        q = (norm / (rho + _GUARD)).clamp_(min=self.gamma).div_(self.gamma)
        usable = torch.isfinite(norm) if self.zero == "legacy" else torch.isfinite(norm) & (norm > 0)
        q = torch.where(usable, q, torch.ones_like(q))
        rho.copy_(torch.where(usable, norm / q, rho))
        return q.reciprocal()

    def _factor_of_numbers(self, norm: Tensor, rho: Tensor) -> Tensor:
        """The same on the CPU, where reading a number costs nothing and fourteen operations on 0-d tensors cost 50 us a leaf."""
        value = float(norm)
        if not math.isfinite(value) or (value <= 0.0 and self.zero == "skip"):
            return torch.ones_like(rho)
        q = max(value / (float(rho) + _GUARD), self.gamma) / self.gamma
        rho.fill_(value / q)
        return torch.full_like(rho, 1.0 / q)
