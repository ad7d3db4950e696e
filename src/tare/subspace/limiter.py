"""The norm-growth limiter of Fira (arXiv 2410.01623) and APOLLO (arXiv 2412.05270): a norm may grow by gamma a step, no more."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number

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
        """1 / q as a 0-d tensor, and `rho` moved on in place. No synchronisation. rho starts at infinity."""
        norm = norm.to(rho.dtype)
        q = (norm / (rho + _GUARD)).clamp_(min=self.gamma).div_(self.gamma)
        usable = torch.isfinite(norm) if self.zero == "legacy" else torch.isfinite(norm) & (norm > 0)
        q = torch.where(usable, q, torch.ones_like(q))
        rho.copy_(torch.where(usable, norm / q, rho))
        return q.reciprocal()
