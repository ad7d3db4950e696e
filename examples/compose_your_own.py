"""A method of your own: axes by name, axes as objects, and a basis that is written here. Each learns the same small regression.

python examples/compose_your_own.py
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tare
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.maps import Sign
from tare.subspace.bases import Basis, SVDBasis
from tare.subspace.residual import MappedResidual


@dataclass(frozen=True)
class LargestChannels(Basis):
    """Unit vectors of the channels of one matrix with the largest gradient: P [s, r] of zeros and ones."""

    def compute(self, grad: Tensor, side: str, previous: Tensor | None, key: int, index: int = 0) -> Tensor:
        size = grad.norm(dim=-1 if side == "left" else -2)  # [s]
        chosen = size.topk(self.rank_of(len(size))).indices
        return torch.eye(len(size), dtype=size.dtype, device=size.device)[:, chosen]  # [s, r]


def recipe() -> tare.Recipe:
    """Lion in the top singular directions, half a sign step outside; Adam where there is no matrix to project."""
    outside = MappedResidual(Sign(), scale=0.5)
    low = tare.Subspace(Lion(), SVDBasis(rank=8), tare.every(20, stagger=True), transfer="rotate", residual=outside)
    return tare.Recipe(((("linear", "conv", "expert"), low), ("*", Adam())), decay="before")


def optimizers() -> dict[str, Any]:
    """Name -> a function from a model to its optimizer."""
    axes = {"lr": 1e-2, "rank": 8, "period": 20, "scale": 1.0}
    eight = tare.Storage(moment="int8", min_quantized=256)
    return {
        "cosines, sign outside": lambda m: tare.Compose(m, basis="dct", residual="sign", residual_scale=0.1, **axes),
        "orthonormal APOLLO, 8 bits": lambda m: tare.Compose(
            m, basis="orthonormal", lift="channel", gamma=1.01, storage=eight, **axes
        ),
        "Lion in a recipe": lambda m: tare.Optimizer(m, recipe(), lr=1e-3),
        "a basis of our own": lambda m: tare.Compose(m, basis=LargestChannels(8), transfer="zero", **axes),
    }


def main(steps: int = 60) -> dict[str, tuple[float, float]]:
    """Train with each; returns the loss before and after by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    y = torch.tanh(x @ torch.randn(32, 8, generator=generator) / 6)
    found = {}
    for name, build in optimizers().items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
        optimizer = build(model)
        losses = []
        for _ in range(steps):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found[name] = (losses[0], losses[-1])
        print(f"{name}: {losses[0]:.3f} -> {losses[-1]:.3f}, {optimizer.state_bytes().total:,} bytes of state")
    try:
        tare.Compose(model, lr=1e-2, rank=8, lift="channel", residual="sign")
    except tare.InputError as refusal:
        print(f"refused: {refusal}")
    return found


if __name__ == "__main__":
    main()
