"""accelerate: prepare, accumulate, clip, save_state and load_state, with 8-bit state in a subspace; and the same in release mode.

pip install accelerate; python examples/hf_accelerate.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import tare
from tare.parallel.frameworks import follow_accelerate

STEPS, MICRO = 6, 2


def build(release: bool) -> tuple[nn.Module, Any]:
    """A net and its optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = tare.GaLore(
        net, lr=1e-2, rank=8, period=4, release=release, storage=tare.Storage(moment="int8", min_quantized=256)
    )
    if release:
        optimizer.clip_release(1.0, "two-pass")  # accelerator.clip_grad_norm_ would find no gradients
    return net, optimizer


def batches(start: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of all steps from one on."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * MICRO, 32, 16, generator=generator)
    return [(a, a[:, :4].argmax(1)) for a in x[start * MICRO :]]


def run(folder: Path, release: bool, first: int = 0, last: int = STEPS) -> nn.Module:
    """Steps `first` to `last`; the state is loaded before and saved after, by accelerate."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    net, optimizer = accelerator.prepare(*build(release))
    if release:
        follow_accelerate(optimizer)
    if first:
        accelerator.load_state(str(folder))
    held = batches(first)[: (last - first) * MICRO]
    for number, (x, y) in enumerate(held):
        with accelerator.accumulate(net):
            if release and number % MICRO == 0:  # two-pass: the whole step is measured before any of it is taken
                with optimizer.optimizer.measuring():
                    for a, b in held[number : number + MICRO]:
                        (nn.functional.cross_entropy(net(a), b) / MICRO).backward()
            accelerator.backward(nn.functional.cross_entropy(net(x), y))
            if accelerator.sync_gradients and not release:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(folder))
    return net


def main(folder: Path, release: bool = False) -> tuple[nn.Module, nn.Module]:
    """Train six steps; and three, then three more from what accelerate saved. Returns both nets."""
    whole = run(folder / "whole", release)
    run(folder / "cut", release, last=3)
    resumed = run(folder / "cut", release, first=3)
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"release {release}: the resumed run has the same bits: {same}")
    return whole, resumed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place) / "a")
        main(Path(place) / "b", release=True)
