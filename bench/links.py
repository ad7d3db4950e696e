"""Gradients over slow links: bytes that two processes send each other in a step, and what that does to the loss.

    python bench/links.py [--steps 60] [--rows "whole,randk 1%"] [--out bench/results/links.json]
    python bench/links.py --docs                                # the table of docs/links.md, from the file

Two gloo processes on one machine train the 3M llama on the standard library's text, each on half of every batch, from the same
weights, with the same data and learning rate in all rows of a method; only the communication hook differs. The losses are measured, the
bytes counted. The times over links are not measured: they are bytes / speed of the link, without latency and without overlap with
backward, which this machine cannot show. The file grows row by row; what it holds already is not run again.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tare.methods import registry
from tare.parallel import hooks
from tare.plan.activations import causal_loss
from tare.plan.models import build_model
from tare.train.config import DataConfig
from tare.train.data import open_corpus
from tare.train.evaluate import evaluate

MODEL, SEQ, BATCH, RANKS, SEED = "llama-3m", 64, 4, 2, 0
LR = {"adamw": 1e-3, "galore": 1e-2}
METHODS: dict[str, dict[str, Any]] = {"adamw": {}, "galore": {"rank": 64, "period": 20}}
ROWS: dict[
    str, tuple[str, str, dict[str, Any]]
] = {  # method, hook, its options; PowerSGD starts after a tenth of the steps
    "whole": ("adamw", "whole", {}),
    "randk 1%": ("adamw", "randk", {"fraction": 0.01}),
    "topk 1%": ("adamw", "topk", {"fraction": 0.01}),
    "galore whole": ("galore", "whole", {}),
    "galore projected": ("galore", "projected", {}),
    "powersgd 4": ("adamw", "powersgd", {"rank": 4}),
    "randk 10%": ("adamw", "randk", {"fraction": 0.1}),
    "randk 1% unbiased": ("adamw", "randk", {"fraction": 0.01, "error_feedback": False}),
}
BEGIN, END = "<!-- links: begin -->\n", "<!-- links: end -->"
LINKS = {"100 Mbit/s": 12.5e6, "1 Gbit/s": 125e6, "10 Gbit/s": 1.25e9}  # bytes a second each way


def one(rank: int, name: str, steps: int) -> dict[str, Any]:
    """Train one row on this process; numbers that are the same on both, but for the seconds."""
    method, kind, options = ROWS[name]
    options = {**options, **({"start": max(2, steps // 10)} if kind == "powersgd" else {})}
    model = build_model(MODEL, seed=SEED)
    corpus = open_corpus(DataConfig(source="stdlib", seq=SEQ, eval_tokens=4_096), model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    order = corpus.dataset(SEED, BATCH * RANKS)
    optimizer = registry.build(method, model, LR[method], **METHODS[method])
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    hook = hooks.build(kind, seed=SEED if kind == "randk" else None, optimizer=optimizer, **options).attach(ddp)
    warm = max(1, steps // 10)
    sent, seconds, losses = [], [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR[method] * min(1.0, (step + 1) / warm) * (1.0 - 0.9 * step / steps)
        started = time.monotonic()
        loss = causal_loss(ddp, order.batch((step * RANKS + rank) * BATCH, BATCH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - started)
        sent.append(hook.last.sent)
        losses.append(float(loss.detach()))
    found = evaluate(model, corpus.eval_batches(2 * BATCH)).loss if rank == 0 else 0.0
    weights = sum(p.numel() for p in model.parameters())
    row = {
        "row": name, "method": method, "lr": LR[method], "hook": hook.describe(), "options": options, "steps": steps, "loss": found,
        "train_loss_first": losses[0], "bytes_a_step": statistics.mean(sent), "bytes_a_step_whole": hook.bytes_whole / steps,
        "bytes_a_step_least": min(sent), "bytes_a_step_most": max(sent), "collectives_a_step": hook.traffic.calls / steps,
        "seconds_a_step_here": statistics.median(seconds), "parameters": weights,
    }  # fmt: skip
    row["share"] = row["bytes_a_step"] / row["bytes_a_step_whole"]
    row["seconds_on_links_computed"] = {link: row["bytes_a_step"] / speed for link, speed in LINKS.items()}
    return row


def serve(rank: int, store: str, names: list[str], steps: int, out: str) -> None:
    """What each of the two processes does: all rows, one after another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for name in names:
        row = one(rank, name, steps)
        gc.collect()  # a DDP model that is alive at the end may abort the process
        dist.barrier()
        if rank == 0:
            put(Path(out), row)
    dist.destroy_process_group()


def put(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file, or replace the one of its name."""
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = {each["row"]: each for each in result["rows"]} | {row["row"]: row}
    result = {
        "what": "losses measured, bytes counted (collectives as rings), seconds on links computed as bytes / speed",
        "command": f"python bench/links.py --steps {row['steps']}", "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__.split("+")[0],
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "device": platform.processor() or platform.machine(), "backend": "gloo", "ranks": RANKS, "threads": 1, "seed": SEED,
        "setting": {"model": MODEL, "data": "stdlib", "seq": SEQ, "batch_of_each": BATCH, "links_bytes_a_second": LINKS},
        "rows": [rows[name] for name in ROWS if name in rows],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{row['row']}: loss {row['loss']:.4f}, {row['bytes_a_step']:,.0f} bytes a step ({100 * row['share']:.2f} %)",
        flush=True,
    )


def table(result: dict[str, Any]) -> str:
    """The rows as markdown."""
    lines = [
        "| method | sent as | loss after training | bytes a step, of each process | of whole gradients | "
        + " | ".join(f"s on {link}, computed" for link in LINKS) + " |",
        "|---" * (5 + len(LINKS)) + "|",
    ]  # fmt: skip
    for row in result["rows"]:
        times = " | ".join(f"{seconds:.3g}" for seconds in row["seconds_on_links_computed"].values())
        lines.append(
            f"| {row['method']} | {row['hook']} | {row['loss']:.3f} | {row['bytes_a_step']:,.0f} | {100 * row['share']:.3g} % | {times} |"
        )
    setting = result["setting"]
    lines += [
        "",
        f"{result['rows'][0]['steps']} steps of {result['ranks']} x {setting['batch_of_each']} sequences of {setting['seq']} tokens, seed "
        f"{result['seed']}, {result['rows'][0]['parameters']:,} weights; loss at the start {result['rows'][0]['train_loss_first']:.3f}. "
        f"Made by `{result['command']}`, {result['date']}, torch {result['torch']}, {result['backend']}.",
    ]
    return "\n".join(lines) + "\n"


def write_docs(result: dict[str, Any], page: Path) -> None:
    """Put the table between the marks of docs/links.md."""
    before, rest = page.read_text("utf-8").split(BEGIN)
    page.write_text(before + BEGIN + table(result) + END + rest.split(END)[1], "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, by commas")
    parser.add_argument("--out", default="bench/results/links.json")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/links.md and train nothing")
    args = parser.parse_args()
    if args.docs:
        return write_docs(json.loads(Path(args.out).read_text()), Path(__file__).parent.parent / "docs" / "links.md")
    names = args.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"--rows: {unknown[0]!r} is unknown; known: {'; '.join(ROWS)}")
    path = Path(args.out)
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {row["row"] for row in held if row["steps"] == args.steps}
    todo = [name for name in names if name not in done]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (os.path.join(folder, "store"), todo, args.steps, args.out), nprocs=RANKS)


if __name__ == "__main__":
    main()
