"""Clients tune one prompt of a frozen model together, each on data of its own, from losses alone; no data and no query leaves its process.

torchrun --nproc-per-node 3 examples/federated_prompt.py     # a process for each client
python examples/federated_prompt.py --alone 3                # simulated in one process: the same prompt, bit for bit
"""

import argparse
import os

import torch
from torch import distributed, nn
from torch.nn import functional

import tare


class Prompted(nn.Module):
    """A frozen classifier of 8 numbers that reads a prompt of 6 more beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(14, 32), nn.Tanh(), nn.Linear(32, 3)).requires_grad_(requires_grad=False)
        self.body[2].weight.mul_(10.0)  # so that it is sure of its answers
        self.prompt = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [rows, 3] of x [rows, 8]."""
        return self.body(torch.cat([x, self.prompt.expand(len(x), 6)], 1))


def data_of(client: int, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """What one client has: inputs around a place of its own, labelled by the model under a prompt that nobody knows."""
    draw = torch.Generator().manual_seed(100 + client)
    x = torch.randn(rows, 8, generator=draw) + torch.randn(8, generator=draw)
    with torch.no_grad():
        model = Prompted()
        model.prompt.copy_(torch.tensor([1.0, -0.8, 0.6, 0.9, -1.0, 0.5]))
        return x, model(x).argmax(1)


def main(alone: int, rounds: int) -> tuple[list[float], list[float]]:
    """Tune; returns the mean loss of every round, and the prompt. alone: clients that are simulated here; 0: each is a process."""
    clients = alone or distributed.get_world_size()
    here = range(alone) if alone else [distributed.get_rank()]
    model = Prompted()
    exchange = None if alone else tare.Clients()
    optimizer = tare.FZooS(
        model, clients=clients, local_steps=5, local_lr=0.05, near=12, active=2, components=500, exchange=exchange
    )

    def closure_of(client: int):
        x, y = data_of(client)
        return lambda: functional.cross_entropy(model(x).double(), y)

    closures = [closure_of(client) for client in here]
    losses = [optimizer.step(closures) for _ in range(rounds)]
    if 0 in here:
        print(f"mean loss of {clients} clients {losses[0]:.4f} -> {losses[-1]:.4f}")
        print("prompt " + " ".join(f"{number:.6f}" for number in model.prompt.tolist()))
        if exchange is not None:
            print(exchange.describe())
    return losses, model.prompt.tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", type=int, default=0, metavar="N", help="simulate N clients in one process")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    if not args.alone:
        distributed.init_process_group("gloo")
    main(args.alone, args.rounds)
    if "RANK" in os.environ and not args.alone:
        distributed.destroy_process_group()
