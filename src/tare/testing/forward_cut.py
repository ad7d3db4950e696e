"""The little problem on which methods with a black box at the end are tried: nobody has the gradient of its loss."""

import torch
from torch import Tensor, nn

from tare.core.random import make_key, normal
from tare.testing.forward import Problem
from tare.testing.subject import Net, loss_of
from tare.zeroth.cut import BlackBox


class Judge(nn.Module):
    """A frozen layer [8] -> [8] in fp32, asked only for answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(make_key(7, "judge"), (8, 8)) / 8**0.5

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight)


class Judged(Net):
    """`Net` with a black box before its head."""

    def __init__(self) -> None:
        super().__init__()
        self.box = BlackBox(Judge(), q=6, mu=1e-2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.square(x + self.down(torch.tanh(self.up(self.norm(x)))))
        out: Tensor = self.head(x + self.box(x.float()).to(x.dtype))
        return out


def regression(dtype: torch.dtype = torch.float32) -> Problem:
    """`tare.testing.forward.regression` with a black box in it."""
    net = Judged().to(dtype)

    @torch.no_grad()
    def measure() -> float:
        return float(loss_of(net))

    return Problem(net, lambda number: loss_of(net, number), lambda: dict(net.named_parameters()), measure)
