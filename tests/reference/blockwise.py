"""Slow, readable twins of the block-wise codec: nearest of all 256 values by distance, one block at a time."""

import torch
from torch import Tensor


def nearest_by_distance(y: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of `values` for each of `y`, the first one on a tie. Distances in fp64, where they are exact."""
    distance = (y.double().unsqueeze(-1) - values.double()).abs()
    return distance.argmin(-1)  # the first of equals


def nearest_by_midpoints(y: Tensor, values: Tensor) -> Tensor:
    """The same by a search among the midpoints of neighbours, in fp64."""
    exact = values.double()
    return torch.bucketize(y.double(), (exact[1:] + exact[:-1]) / 2)  # a number on a midpoint belongs to the lower side


def encode(x: Tensor, values: Tensor, block: int) -> tuple[list[int], list[float]]:
    """Codes and scales of finite fp32 numbers."""
    codes: list[int] = []
    scales: list[float] = []
    for part in x.reshape(-1).split(block):
        peak = part.abs().max()
        scales.append(peak.item())
        y = part * (1 / peak) if peak > 0 else torch.zeros_like(part)
        codes += nearest_by_distance(y, values).tolist()
    return codes, scales
