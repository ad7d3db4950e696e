"""The little problem on which forward-only methods for quantised models are tried."""

import torch

from tare.testing.forward import Problem
from tare.testing.subject import Net, loss_of
from tare.zeroth.quantized import quantize_linear_


def regression(dtype: torch.dtype = torch.float32) -> Problem:
    """`tare.testing.forward.regression` with its linear layers in 4 bits, groups of 8 and a short one; scales in the dtype asked for."""
    net = Net().to(dtype)
    quantize_linear_(net, group=8, targets=("linear", "head"), dtype=dtype)

    @torch.no_grad()
    def measure() -> float:
        return float(loss_of(net))

    return Problem(net, lambda number: loss_of(net, number), lambda: dict(net.named_parameters()), measure)
