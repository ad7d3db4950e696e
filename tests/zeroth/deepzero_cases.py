"""A small convolutional chain, its batches and its loss, for the tests of DeepZero."""

import torch
from torch import Tensor, nn


def small(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Sequential(nn.Linear(12, 6), nn.Tanh()),
            nn.Linear(6, 4),
        ).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(5, 1, 4, 4, generator=generator).to(dtype), torch.randint(4, (5,), generator=generator)


def loss_of(net: nn.Module, t: int = 0) -> Tensor:
    x, y = batch(t, next(net.parameters()).dtype)
    return nn.functional.cross_entropy(net(x), y)
