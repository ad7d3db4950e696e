"""Slow, readable twin of AdamW with 4-bit moments: one block of 128 at a time, the nearest of 16 values by distance in fp64.

Moments in fp32, as the method keeps them; the direction and the weight in fp64.
"""

import math

import torch
from torch import Tensor

CELLS = [(0.01, 1), (0.1, 2), (1.0, 4)]  # power and equal cells of [0.1, 1]
MIDDLES = [power * (0.1 + 0.9 * (j + 0.5) / cells) for power, cells in CELLS for j in range(cells)]
SIGNED = torch.tensor(sorted([-x for x in MIDDLES] + MIDDLES + [0.0, 1.0]), dtype=torch.float32)
UNSIGNED = torch.tensor([(k + 1) / 16 for k in range(16)])


class AdamW4bitTwin:
    """Steps one flat fp64 weight; `codes` and `scales` of both moments are plain lists of blocks."""

    def __init__(self, weight: Tensor, betas: tuple[float, float], eps: float, decay: float, block: int = 128):
        self.weight, self.betas, self.eps, self.decay, self.block = weight.double(), betas, eps, decay, block
        self.count = 0
        blocks = -(-weight.numel() // block)
        self.scales = [[0.0] * blocks, [0.0] * blocks]
        self.codes = [[7] * weight.numel(), [0] * weight.numel()]

    def _decode(self, which: int, number: int) -> Tensor:
        part = slice(number * self.block, (number + 1) * self.block)
        values = (SIGNED, UNSIGNED)[which][torch.tensor(self.codes[which][part])]
        return values * self.scales[which][number]

    def _encode(self, which: int, number: int, x: Tensor) -> None:
        peak = x.abs().max()
        y = x * (1 / peak) if peak > 0 else torch.zeros_like(x)
        distance = (y.double().unsqueeze(1) - (SIGNED, UNSIGNED)[which].double()).abs()
        found = distance.argmin(1).tolist() if peak > 0 else [(7, 0)[which]] * len(x)
        self.codes[which][number * self.block : number * self.block + len(x)] = found
        self.scales[which][number] = peak.item()

    def step(self, grad: Tensor, lr: float) -> None:
        self.count += 1
        b1, b2 = self.betas
        first, second = 1 - b1**self.count, 1 - b2**self.count
        for number, g in enumerate(grad.split(self.block)):
            m = self._decode(0, number) * b1 + g * (1 - b1)
            v = self._decode(1, number) * b2 + g * (1 - b2) * g
            direction = (m.double() / first) / ((v.double() / second).sqrt() + self.eps)
            part = slice(number * self.block, number * self.block + len(g))
            self.weight[part] = self.weight[part] * (1 - lr * self.decay) - lr * direction
            self._encode(0, number, m)
            self._encode(1, number, v)

    def bytes(self) -> int:
        """Two codes a byte and a 4-byte scale for each block, twice."""
        return 2 * (math.ceil(self.weight.numel() / 2) + 4 * len(self.scales[0]))
