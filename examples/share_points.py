"""Two workers fine-tune without backpropagation and send each other two losses a step: no weight, no gradient.

torchrun --nproc-per-node 2 examples/share_points.py            # + and - of every direction on two workers
torchrun --nproc-per-node 2 examples/share_points.py --data 2   # each worker its own half of every batch
python examples/share_points.py --alone                         # one process: the weights of the first, bit for bit
"""

import argparse
import os

import torch
from torch import distributed, nn
from torch.nn import functional

import tare
from tare.zeroth.digest import combined, digests


class Tagger(nn.Module):
    """Next byte from the last eight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.hidden = nn.Linear(8 * 16, 48)
        self.head = nn.Linear(48, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 128] of tokens [batch, 8]."""
        return self.head(torch.tanh(self.hidden(self.embed(tokens).flatten(1))))


def batch(text: bytes, step: int, part: int, parts: int, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this step that belong to one part of the data."""
    data = torch.tensor(list(text), dtype=torch.long)
    starts = torch.randint(len(data) - 8, (rows,), generator=torch.Generator().manual_seed(step))
    windows = torch.stack([data[s : s + 9] for s in starts.tolist()[part::parts]])
    return windows[:, :8], windows[:, 8]


def main(data: int, alone: bool, steps: int) -> tuple[list[float], str]:
    """Train; returns losses and a digest of the weights."""
    workers = None if alone else tare.Workers(data=data)
    torch.manual_seed(0)
    model = Tagger()
    optimizer = tare.MeZO(model, lr=2e-2, eps=1e-3, n=4, rule="adam", exchange=workers)
    text = __doc__.encode() * 3
    losses = []
    for step in range(steps):
        x, y = batch(text, step, workers.part if workers else 0, data if workers else 1)
        losses.append(optimizer.step(lambda x=x, y=y: functional.cross_entropy(model(x), y)))
    digest = combined(digests(optimizer)).hex()
    if workers is None or distributed.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; weights {digest}")
        if workers is not None:
            print(f"{workers.describe()}; {workers.sent:,} bytes sent in {steps} steps")
    return losses, digest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=1, help="parts of the data [1]")
    parser.add_argument("--alone", action="store_true", help="one process")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    if not args.alone:
        distributed.init_process_group("gloo")
    main(args.data, args.alone, args.steps)
    if "RANK" in os.environ and not args.alone:
        distributed.destroy_process_group()
