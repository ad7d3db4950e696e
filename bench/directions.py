"""Random directions that are drawn where they are written, against `torch.randn` and against PyTorch's fused AdamW.

    python bench/directions.py [--elements 58000000] [--threads 2] [--device cpu] [--out bench/results/directions.json]

Every sample of a row stands between two of fused AdamW on as many fp32 elements (28 bytes each, at memory bandwidth), and beside one of
`w.add_(torch.randn(n), alpha=c)`, in the same run; printed are medians of the rounds' ratios. Samples that other processes disturbed are
repeated for `--patience` seconds. First the kernels are compared with their plain twin, bit for bit; last come moments, distribution
function and correlations of as many numbers.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tare.core.leaf import Leaf
from tare.core.random import normal
from tare.core.recipe import Recipe
from tare.core.state import State
from tare.kernels import directions, native, native_directions
from tare.kernels.triton import dispatch
from tare.report.bench_timing import Patience, bandwidth, clock, no_collector, spread
from tare.report.provenance import commit, device
from tare.rules.momentum import Momentum
from tare.zeroth.directions import Directed, Draw, Gaussian, Law, Rademacher
from tare.zeroth.laws import Sphere
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import Term, TwoSided
from tare.zeroth.record import Record

C = 1e-6  # small: weights stay where they are through hundreds of steps


@dataclass
class Row:
    """One thing that is timed. bytes: an element's, read and written."""

    name: str
    call: Callable[[], object]
    bytes: float


class Dense(Gaussian):
    """Without the write in one pass: a gradient is put together by pieces, and the rule adds it."""

    fuses = False


def rows(n: int, where: torch.device) -> list[Row]:
    """Torch's ways first, then ours."""
    w, z = torch.randn(n).to(where), torch.empty(n, device=where)
    half, low = w.bfloat16(), torch.zeros(n, dtype=torch.int8, device=where)
    leaf, nothing = Leaf("w", (n,), torch.float32, "linear"), State({}, {})
    draws = [Draw(leaf, "w", 0, 0, member) for member in range(16)]

    def add(law: Law, target: Tensor, members: int = 1) -> Callable[[], object]:
        return lambda: law.gather_(target, [(draw, C) for draw in draws[:members]], nothing, target)

    def write(target: Tensor, law: Law = Gaussian(), **how: Any) -> Callable[[], object]:  # noqa: B008
        return lambda: law.write_(target, [(draws[0], C)], decay=1.0 - C, alpha=C, **how)

    def plain() -> None:
        directions.write_(w, [draws[0].key], [C])

    return [
        Row("torch: randn, add", lambda: w.add_(torch.randn(n, device=where), alpha=C), 16),
        Row("torch: normal_", lambda: z.normal_(), 4),
        Row("torch: bernoulli_", lambda: z.bernoulli_(), 4),
        Row("torch: add a stored z", lambda: w.add_(z, alpha=C), 12),
        Row("table look-ups (core.random), add", lambda: w.add_(normal(7, (n,), where), alpha=C), 16),
        Row("plain twin: add", plain, 8),
        Row("fill", lambda: Gaussian().draw(draws[0], nothing, w), 4),
        Row("add", add(Gaussian(), w), 8),
        Row("add, 4 members", add(Gaussian(), w, 4), 8),
        Row("add, 16 members", add(Gaussian(), w, 16), 8),
        Row("add to a copy", lambda: Gaussian().moved(w, [(draws[0], C)], nothing, w), 8),
        Row("add, bf16", add(Gaussian(), half), 4),
        Row("add signs", add(Rademacher(), w), 8),
        Row("add signs, 16 members", add(Rademacher(), w, 16), 8),
        Row("add on the sphere, length not known", _fresh(Sphere(), w, leaf), 8),
        Row("SGD step", write(w), 8),
        Row("SGD step, bf16 stochastic", write(half, key=3), 4),
        Row("SGD step, split24", write(half, low=low, key=3), 6),
        Row("SGD step of MeZO", _replayed(w, Gaussian()), 8),
        Row("SGD step of MeZO, by pieces of a gradient", _replayed(w, Dense()), 8),
    ]


def _fresh(law: Law, w: Tensor, leaf: Leaf) -> Callable[[], object]:
    """Another direction every time, so that nothing about it is known yet."""
    steps = iter(range(1 << 30))
    return lambda: law.add_(w, Draw(leaf, "w", 0, next(steps)), State({}, {}), w, C)


def _replayed(w: Tensor, law: Law) -> Callable[[], object]:
    """A recorded step of a whole optimizer: everything but the evaluations."""
    recipe = Recipe((("*", Directed(law, Momentum(0.0))),))
    opt = ForwardOptimizer([("w", w.clone().requires_grad_())], recipe, C, probe=TwoSided(), memory="in-place")
    steps = iter(range(1 << 30))
    return lambda: opt.replay(Record(next(steps), (Term(0, 1.0),), 1.0, ((C, 0.0),), leaves=("w",)))


def bar(n: int, where: torch.device) -> Callable[[], object]:
    """A step of torch's fused AdamW."""
    p = torch.nn.Parameter(torch.randn(n).to(where))
    p.grad = torch.randn(n).to(where)
    return torch.optim.AdamW([p], lr=C, fused=True).step


def check(where: torch.device) -> int:
    """Raise where a kernel and its twin differ in any bit; how many elements were compared."""
    n, compared = 300_000, 0
    for law in ("gaussian", "signs"):
        for dtype, split in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
            ours = torch.linspace(-3, 3, n).to(where, dtype)
            low = torch.zeros(n, dtype=torch.int8, device=where) if split else None
            theirs, rest = ours.clone(), None if low is None else low.clone()
            how: dict[str, Any] = {"law": law, "decay": 0.99, "start": (1 << 32) - 1000, "key": 5}
            assert native_directions.write_(ours, [1, 2], [0.5, -2.0], **how, low=low), "the kernel did not take it"
            directions.write_(theirs, [1, 2], [0.5, -2.0], **how, low=rest)
            assert torch.equal(ours, theirs), f"{law} {dtype}: kernel and twin differ"
            assert low is None or torch.equal(low, rest), f"{law}: corrections differ"
            compared += n
    return compared


def measure(
    n: int, where: torch.device, count: int, patience: Patience, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All rows in interleaved rounds, the order turned from round to round."""
    adamw, known = bar(n, where), rows(n, where)
    randn = known[0].call
    for call in (adamw, *(row.call for row in known)):
        call()
    found: dict[str, dict[str, Any]] = {row.name: {"ms": [], "adamw_ms": [], "randn_ms": []} for row in known}
    with no_collector():
        for number in range(count):
            say(f"round {number + 1} of {count}")
            turn = number % len(known)
            for row in known[turn:] + known[:turn]:
                before, own, after, other = patience.sample(adamw, row.call, adamw, randn)
                found[row.name]["ms"].append(own)
                found[row.name]["adamw_ms"].append((before + after) / 2)
                found[row.name]["randn_ms"].append(other)
    return [_finished(row, found[row.name], n) for row in known]


def _finished(row: Row, samples: dict[str, Any], n: int) -> dict[str, Any]:
    ms = statistics.median(samples["ms"])
    against = {
        f"ratio_to_{other}": spread([a / b for a, b in zip(samples["ms"], samples[f"{other}_ms"], strict=True)])
        for other in ("adamw", "randn")
    }
    speed = {"ms_median": ms, "ns_per_element": ms * 1e6 / n, "gigabytes_per_second": row.bytes * n / ms / 1e6}
    return {"row": row.name, "bytes_per_element": row.bytes, **speed, **against, **samples}


def look(n: int) -> dict[str, Any]:
    """Statistics of n normals of one direction, each in units of its own standard deviation."""
    leaf = Leaf("w", (n,), torch.float32, "linear")
    z = Gaussian().draw(Draw(leaf, "w", 0, 0), State({}, {}), torch.empty(n))
    twice = {1: 1.0, 2: 3.0, 3: 15.0, 4: 105.0}
    moments = {k: (sum(float(part.double().pow(k).sum()) for part in z.split(1 << 22)) / n) for k in twice}
    exact = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    found: dict[str, Any] = {
        f"moment_{k}": (moments[k] - exact[k]) / math.sqrt((twice[k] - exact[k] ** 2) / n) for k in twice
    }
    for lag in (1, 2, 15, 16, 17, 31, 32, 33, 64, 1 << 10, 1 << 20):
        found[f"lag_{lag}"] = float((z[:-lag] * z[lag:]).double().mean()) * math.sqrt(n - lag)
    ordered, worst = z.sort().values, 0.0
    for start in range(0, n, 1 << 22):
        part = torch.special.ndtr(ordered[start : start + (1 << 22)].double())
        at = torch.arange(start, start + part.numel(), dtype=torch.float64) / n
        worst = max(worst, float((part - at).max()), float((at + 1 / n - part).max()))
    return {**found, "kolmogorov_smirnov_root_n_d": worst * math.sqrt(n), "largest": float(z.abs().max())}


def table(document: dict[str, Any]) -> str:
    """For eyes."""
    lines = [f"{'':42s} ns/element    of fused AdamW    of randn + add      GB/s"]
    for row in document["rows"]:
        adamw, randn = row["ratio_to_adamw"], row["ratio_to_randn"]
        lines.append(
            f"{row['row']:42s} {row['ns_per_element']:10.3f}    {adamw['median']:6.2f} ({adamw['q1']:.2f}-{adamw['q3']:.2f})"
            f"    {randn['median']:6.3f} ({randn['q1']:.3f}-{randn['q3']:.3f})  {row['gigabytes_per_second']:6.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--elements", type=int, default=58_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for repeating disturbed samples")
    parser.add_argument("--out", help="write the result here, as JSON")
    args = parser.parse_args()
    where = torch.device(args.device)
    torch.set_num_threads(args.threads)
    say: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: E731
    compared, before = check(where), os.getloadavg()
    patience = Patience(args.patience, clock(where))
    measured = measure(args.elements, where, args.rounds, patience, say)
    sha, changed = commit()
    accelerator = {"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}
    document = {
        "command": f"python bench/directions.py --elements {args.elements} --threads {args.threads} --rounds {args.rounds}"
        f" --device {args.device}",
        "commit": sha, "uncommitted_changes": changed, "date": time.strftime("%Y-%m-%d"), "device": {**device(), **accelerator},
        "torch": torch.__version__.split("+")[0], "threads": args.threads, "elements": args.elements, "rounds": args.rounds,
        "kernels": dispatch.reason() if where.type == "cuda" else native.reason(), "bits_compared_with_twin": compared,
        "load": {"before": before, "after": os.getloadavg()}, "disturbed": patience.to_json(), "bandwidth": bandwidth(where),
        "rows": measured, "statistics": look(args.elements),
    }  # fmt: skip
    say(table(document))
    if args.out:
        Path(args.out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
