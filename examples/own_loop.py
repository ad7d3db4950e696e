"""Any model, any loop: a `tare` optimizer is a `torch.optim.Optimizer`. Trains a small classifier with 8-bit states and a scheduler.

python examples/own_loop.py
"""

import torch
from torch import nn

import tare


def main(steps: int = 60) -> tuple[float, float]:
    """Train on points of a spiral; returns the loss before and after."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(512, 1, generator=generator) * 6
    label = (torch.rand(512, generator=generator) > 0.5).long()
    angle = t + label[:, None] * torch.pi
    points = torch.cat([t * angle.cos(), t * angle.sin()], dim=1)  # [512, 2]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2))
    optimizer = tare.GaLore(model, lr=1e-2, rank=16, period=20, scale=1.0, storage=tare.Storage(moment="int8"))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    print(optimizer.explain())

    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(points), label)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {optimizer.state_bytes().total:,} bytes of state")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
