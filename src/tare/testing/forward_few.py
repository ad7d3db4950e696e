"""A little problem with few trained numbers and one loss, for methods that learn from all that they have queried."""

import torch
from torch import Tensor, nn

from tare.core.random import make_key, normal
from tare.testing.forward import Problem


class Prompt(nn.Module):
    """Two vectors in front of a frozen layer, and a scale behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(normal(make_key(6, "prompt"), (2, 4)) / 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.zeros(3))
        self.weight = normal(make_key(6, "weight"), (8, 3)) / 2

    def forward(self) -> Tensor:
        out: Tensor = torch.tanh(self.prompt.float().reshape(-1) @ self.weight) * self.scale.float() + self.bias.float()
        return out


def prompt(dtype: torch.dtype = torch.float32) -> Problem:
    """The prompt, scale and bias that give three numbers; the same at every step."""
    net = Prompt().to(dtype)
    target = torch.tensor([0.7, -0.9, 0.4])

    def loss(number: int = 0) -> Tensor:
        return (net() - target).square().mean()

    @torch.no_grad()
    def measure() -> float:
        return float(loss())

    return Problem(net, loss, lambda: dict(net.named_parameters()), measure)
