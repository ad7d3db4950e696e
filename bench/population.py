"""EGGROLL's throughput against naive evolution strategies at the same population, as shares of plain inference on the same batch.

    python bench/population.py [--width 512,1024] [--members 64] [--rows 1,8] [--out bench/results/population.json]

A stack of bias-free linear layers of one width reads `members` x `rows` inputs. The bar is one forward of all of them with unperturbed
weights. Beside it, each sample between two of the bar, for the same population: members side by side (evaluation alone, and the whole
step), one at a time, and naive evolution strategies, whose noise has full rank, in the two ways there are: a perturbed copy of the weights
for each member in turn, and copies for all members at once with a batched product. Shares are 100 x bar / time; larger is better. Speedups
are over the naive ways that do as much: evaluation alone, or the whole step. Samples that other processes disturbed are repeated for
`--patience` seconds. First the losses side by side are compared with those one at a time.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tare.kernels import native
from tare.methods.eggroll import Eggroll
from tare.report.bench_timing import Patience, clock, no_collector, spread
from tare.report.provenance import commit, device
from tare.zeroth.directions import Gaussian
from tare.zeroth.members import Members
from tare.zeroth.record import Record
from tare.zeroth.side_by_side import SideBySide

SIGMA = 1e-3


@dataclass
class Row:
    """One way to evaluate a population."""

    name: str
    call: Callable[[], object]
    updates: bool = False  # whether the step is part of it
    naive: bool = False  # whether speedups are over it


class Case:
    """A stack of layers and a batch for every member."""

    def __init__(self, width: int, layers: int, members: int, rows: int, where: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.members, self.rows = members, rows
        self.net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)]).to(where, dtype)
        self.x = torch.randn(rows, width, device=where, dtype=dtype)
        self.all = self.x.repeat(members, 1)

    def closure(self, members: Members) -> Tensor:
        return members.mean(self.net(members.repeat(self.x)).float().square())

    def optimizer(self, **own: Any) -> Eggroll:
        """With lr 0: the weights stay where they are through hundreds of steps; all else is done."""
        made = Eggroll(self.net, 0.0, SIGMA, members=self.members, **own)
        made._compared = True  # checked once, below
        return made

    def side_by_side(self, opt: Eggroll) -> None:
        """The forward of all members, without the update."""
        leaves = opt._moved()
        points = next(opt.probe.ask(opt.steps, {}))
        with torch.no_grad(), SideBySide(self.net, leaves, points):
            self.closure(Members.of(points))

    def dense_at_once(self) -> None:
        """Full-rank noise for all members at once: W + sigma E_k for every k, and a batched product."""
        h = self.all.view(self.members, self.rows, -1)
        with torch.no_grad():
            for layer in self.net:
                noise = torch.randn(self.members // 2, *layer.weight.shape, device=h.device, dtype=h.dtype)
                weights = layer.weight + SIGMA * torch.stack([noise, -noise], 1).flatten(0, 1)
                h = torch.bmm(h, weights.mT)
            h.float().square().mean((1, 2)).cpu()

    def dense_in_turn(self) -> None:
        """Full-rank noise, one member after another: noise from torch's generator, written into a copy."""
        with torch.no_grad():
            for _ in range(self.members // 2):
                noise = [torch.randn_like(layer.weight) for layer in self.net]
                for sign in (SIGMA, -SIGMA):
                    h = self.x
                    for layer, z in zip(self.net, noise, strict=True):
                        h = nn.functional.linear(h, torch.add(layer.weight, z, alpha=sign))
                    h.float().square().mean().item()

    def inference(self) -> None:
        with torch.no_grad():
            self.net(self.all).float().square().mean().item()


def rows_of(case: Case, ranks: list[int], largest: int) -> list[Row]:
    """What is timed; copies for all members at once only while they are below `largest` bytes."""
    found = []
    for rank in ranks:
        opt = case.optimizer(rank=rank)
        found += [
            Row(f"side by side, rank {rank}, evaluation", partial(case.side_by_side, opt)),
            Row(f"side by side, rank {rank}, whole step", partial(opt.step, case.closure), True),
        ]
    alone = case.optimizer(together=1)
    found.append(Row("one at a time, rank 1, whole step", partial(alone.step, case.closure), True))
    dense = case.optimizer(together=1, directions=Gaussian())
    found.append(Row("naive, full rank, whole step", partial(dense.step, case.closure), True, True))
    found.append(Row("naive, full rank, in turn", case.dense_in_turn, naive=True))
    copies = 3 * case.members * case.net[0].weight.numel() * case.x.element_size()
    if copies <= largest:
        found.append(Row("naive, full rank, all at once", case.dense_at_once, naive=True))
    return found


def compared(case: Case) -> float:
    """The largest relative difference of a member's loss side by side and alone."""
    records: list[Record] = []
    for together in (None, 1):
        case.optimizer(together=together, on_step=records.append).step(case.closure)
    return max(abs(a - b) / abs(b) for a, b in zip(records[0].losses, records[1].losses, strict=True))


def measure(case: Case, ranks: list[int], rounds: int, waiting: Patience, largest: int) -> list[dict[str, Any]]:
    rows = rows_of(case, ranks, largest)
    for row in rows:
        row.call()
    case.inference()
    found: dict[str, dict[str, list[float]]] = {row.name: {"ms": [], "bar_ms": []} for row in rows}
    with no_collector():
        for number in range(rounds):
            turn = number % len(rows)
            for row in rows[turn:] + rows[:turn]:
                before, own, after = waiting.sample(case.inference, row.call, case.inference)
                found[row.name]["ms"].append(own)
                found[row.name]["bar_ms"].append((before + after) / 2)
    shares = {
        name: [100 * bar / own for bar, own in zip(samples["bar_ms"], samples["ms"], strict=True)]
        for name, samples in found.items()
    }
    result = []
    for row in rows:
        others = [other.name for other in rows if other.naive and not row.naive and other.updates == row.updates]
        speedups = {
            name: spread([a / b for a, b in zip(shares[row.name], shares[name], strict=True)]) for name in others
        }
        own = {"share": spread(shares[row.name]), "speedup_over": speedups, **found[row.name]}
        result.append({"name": row.name, "updates": row.updates, "naive": row.naive, **own})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", default="512,1024", help="of the layers [512,1024]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--rows", default="1,8", help="inputs of each member [1,8]")
    parser.add_argument("--ranks", default="1,4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for repeating disturbed samples [60]")
    parser.add_argument("--largest", type=float, default=4.0, help="GiB that copies for all members may take [4]")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where, dtype = torch.device(args.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    waiting = Patience(args.patience, clock(where))
    load, cases = os.getloadavg()[0], []
    ranks = [int(word) for word in args.ranks.split(",")]
    for width in (int(word) for word in args.width.split(",")):
        for rows in (int(word) for word in args.rows.split(",")):
            case = Case(width, args.layers, args.members, rows, where, dtype)
            difference = compared(case)
            found = measure(case, ranks, args.rounds, waiting, int(args.largest * 2**30))
            cases.append({"width": width, "rows": rows, "loss_difference": difference, "results": found})
            print(f"width {width}, {args.members} members of {rows} rows; losses agree to {difference:.1e}")
            for row in found:
                q = row["share"]
                over = [f"{ratio['median']:.1f} x {name}" for name, ratio in row["speedup_over"].items()]
                print(
                    f"  {row['name']:38} {q['median']:7.2f}  [{q['q1']:.2f}-{q['q3']:.2f}] of inference = 100"
                    + (f"; {', '.join(over)}" if over else ""),
                    flush=True,
                )
    sha, dirty = commit()
    words = [f"--{name} {value}" for name, value in vars(args).items() if name not in ("out", "patience")]
    result = {
        "kind": "bench-population", "format": 1, "command": " ".join(["python bench/population.py", *words]), "commit": sha,
        "changed": dirty, "date": time.strftime("%Y-%m-%d"), "device": device(), "torch": torch.__version__,
        "threads": args.threads, "dtype": args.dtype, "layers": args.layers, "members": args.members, "seed": 0,
        "kernels": native.reason(), "load_before": load, "disturbed": waiting.to_json(), "cases": cases,
    }  # fmt: skip
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
