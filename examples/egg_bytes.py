"""Train a recurrent language model without a single float: int8 weights, integer forwards, steps of +-1 (EGGROLL's EGG, arXiv 2511.16652).

Reads the source of Python's standard library as bytes. The loss is in bits per byte; knowing nothing costs 8.

python examples/egg_bytes.py
"""

import sysconfig
from pathlib import Path

import torch

from tare.zeroth.egg import EggNet
from tare.zeroth.egg_training import Alpha, EggTrainer


def library(files: int = 60) -> torch.Tensor:
    """Bytes of some modules, each after a 0, which clears the net's state."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(b"\0" + path.read_bytes() for path in sorted(folder.glob("*.py"))[:files])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def main(
    steps: int = 60, members: int = 128, streams: int = 16, stretch: int = 12, width: int = 48
) -> tuple[float, float]:
    """Train; returns bits per byte of text that was not read, before and after."""
    data = library()
    each = len(data) // (streams + 1)
    held_out = data[streams * each : streams * each + 64 * 33].view(64, 33)

    net = EggNet(vocabulary=256, width=width, layers=1)
    trainer = EggTrainer(net, members, alpha=Alpha(rate=0.05), table_bits=20)

    def bits() -> float:
        scores, _ = net.read(held_out)
        return -float(scores.sum()) / (16 * 64 * 32)

    before = bits()
    for step in range(steps):
        start = step * stretch % (each - stretch - 1)
        tokens = torch.stack([data[s * each + start : s * each + start + stretch + 1] for s in range(streams)])
        told = trainer.step(tokens)
        if step % 10 == 0:
            print(f"step {step:3d}: {told.bits:.2f} bits a byte, {told.changed:.0%} of the weights moved")
    after = bits()
    assert all(weight.dtype == torch.int8 for weight in net.weights().values())
    print(f"text that was not read: {before:.2f} -> {after:.2f} bits a byte")
    return before, after


if __name__ == "__main__":
    main()
