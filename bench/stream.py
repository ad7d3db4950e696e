"""`zo2` beside `mezo` in memory: seconds of a step, bytes on the device and bytes moved, on a named LLaMA.

    python bench/stream.py [--model llama-20m] [--seq 128] [--rounds 5] [--device cpu] [--out bench/results/stream.json]

Each sample of a row stands between two of `mezo`, whose model is on the device as a whole; the order turns from round to round, and
disturbed samples are repeated. First a few steps from the same weights are
compared: exact transfer gives mezo's losses to the bit. On the CPU the device is simulated: real copies into memory that is counted;
there the ratio shows what copying and two lanes cost, and nothing overlaps on one core. `--device cuda` measures transfer and compute
on their own streams, and the allocator's peak.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import tare
from tare.plan.activations import causal_loss
from tare.plan.models import build_model
from tare.report.bench_timing import Patience, clock, no_collector, spread
from tare.report.provenance import commit, device

FORMS: dict[str, dict[str, Any]] = {
    "zo2": {}, "zo2, one point a pass": {"together": 1}, "zo2, nothing ahead": {"ahead": 0}, "zo2, bf16 transfer": {"transfer": "bf16"},
    "zo2, int8 transfer": {"transfer": "int8"},
}  # fmt: skip


def made(args: argparse.Namespace, form: str | None) -> tuple[Any, Any]:
    """(optimizer, its step): the same weights and tokens every time."""
    torch.manual_seed(0)
    model = build_model(args.model).eval()
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(args.device)
    if form is None:
        opt: Any = tare.MeZO(model.to(args.device), args.lr, 1e-3)
    else:
        opt = tare.ZO2(model, args.lr, 1e-3, device=args.device, **FORMS[form])
    return opt, lambda: opt.step(lambda: causal_loss(model, tokens))


def compared(args: argparse.Namespace) -> dict[str, float]:
    """The largest difference of losses from mezo's over three steps, by form."""
    _, bar = made(args, None)
    wanted = [bar() for _ in range(3)]
    found = {}
    for form in FORMS:
        _, step = made(args, form)
        found[form] = max(abs(step() - loss) for loss in wanted)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-20m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for repeating disturbed samples [60]")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load, differences = os.getloadavg()[0], compared(args)
    waiting = Patience(args.patience, clock(torch.device(args.device)))
    bar_opt, bar = made(args, None)
    rows = {form: made(args, form) for form in FORMS}
    weights = sum(p.numel() * p.element_size() for p in bar_opt.model.parameters())
    for step in (bar, *(step for _, step in rows.values())):
        step(), step()
    times: dict[str, list[float]] = {form: [] for form in rows}
    ratios: dict[str, list[float]] = {form: [] for form in rows}
    with no_collector():
        for number in range(args.rounds):
            names = list(rows)
            for form in names[number % len(names) :] + names[: number % len(names)]:
                before, own, after = waiting.sample(bar, rows[form][1], bar)
                times[form].append(own)
                ratios[form].append(2 * own / (before + after))
    results = []
    for form, (opt, _) in rows.items():
        report = opt.stream_report()
        results.append(
            {
                "name": form, "ratio": spread(ratios[form]), "ms": spread(times[form]), "loss_difference": differences[form],
                "device_peak": report.peak, "brought": report.brought, "written": report.written, "moves": report.moves,
            }
        )  # fmt: skip
        print(
            f"{form:24} {results[-1]['ratio']['median']:.2f} x mezo; weights on the device {report.peak / 2**20:.1f} of "
            f"{weights / 2**20:.1f} MiB; {report.brought / 2**20:.1f} MiB brought a step; losses differ by {differences[form]:.1e}"
        )
    sha, dirty = commit()
    words = [f"--{name} {value}" for name, value in vars(args).items() if name not in ("out", "patience")]
    result = {
        "kind": "bench-stream", "format": 1, "command": " ".join(["python bench/stream.py", *words]), "commit": sha, "changed": dirty,
        "date": time.strftime("%Y-%m-%d"), "device": device(), "torch": torch.__version__, "threads": args.threads, "model": args.model,
        "tokens": args.batch * args.seq, "weights": weights, "load_before": load, "disturbed": waiting.to_json(), "results": results,
    }  # fmt: skip
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
