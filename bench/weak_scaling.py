"""Weak scaling: `tare train` by one process, and by two that share twice the batch, each with one thread. Writes a JSON.

    python bench/weak_scaling.py [--methods adamw,galore,apollo-mini] [--steps 24] [--out bench/results/weak-scaling.json]

Speed is that of the median step after the first few. Efficiency: tokens a second of two over twice those of one. The cores of one machine
share memory and caches, so some of what is lost is lost to two single processes side by side as well: that is measured beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tare.report.provenance import commit, device

WARM = 4  # steps that are not counted: planning's cache, first allocations, the first basis
WAYS = {"one": [], "ddp": ["--nproc", "2", "--parallel", "ddp"], "fsdp": ["--nproc", "2", "--parallel", "fsdp"]}


def start(given: argparse.Namespace, method: str, way: str, folder: Path) -> subprocess.Popen[bytes]:
    """One run. Its batch is that of one process, or of two."""
    batch = given.batch * (1 if way.startswith("one") else 2)
    words = [
        "train", "--model", given.model, "--data", "stdlib", "--method", method, "--batch", str(batch), "--seq", str(given.seq),
        "--steps", str(given.steps), "--threads", "1", "--eval-every", str(given.steps), "--out", str(folder),
        "--checkpoint-every", str(given.steps), *WAYS[way.partition("-")[0]],
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "tare", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def finish(run: subprocess.Popen[bytes], folder: Path) -> dict[str, float]:
    """Tokens a second by the median step, and bytes that rank 0 sent in a step."""
    _, errors = run.communicate()
    if run.returncode:
        raise SystemExit(errors.decode()[-800:])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"][WARM:]
    tokens = steps[1]["tokens"] - steps[0]["tokens"]
    return {
        "tokens_per_second": tokens / statistics.median(line["seconds"] for line in steps),
        "sent": statistics.median(line.get("sent", 0) for line in steps),
    }


def measure(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """All ways in turn; two single runs at once last."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for way in WAYS:
            folder = Path(place) / way
            found[way] = finish(start(given, method, way, folder), folder)
        pair = [Path(place) / f"one-{number}" for number in range(2)]
        runs = [start(given, method, "one-beside", folder) for folder in pair]
        found["beside"] = {
            "tokens_per_second": sum(finish(*both)["tokens_per_second"] for both in zip(runs, pair, strict=True)),
            "sent": 0,
        }
    alone = found["one"]["tokens_per_second"]
    for way in ("ddp", "fsdp", "beside"):
        found[way]["efficiency"] = found[way]["tokens_per_second"] / (2 * alone)
    return {"method": method, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-9m")
    parser.add_argument("--methods", default="adamw,galore,apollo-mini")
    parser.add_argument("--batch", type=int, default=4, help="sequences of one process")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", default="bench/results/weak-scaling.json")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for method in given.methods.split(","):
        rows.append(measure(given, method))
        print(method, {way: round(rows[-1][way].get("efficiency", 1.0), 3) for way in (*WAYS, "beside")}, flush=True)
    number, dirty = commit()
    result = {
        "what": "weak scaling", "command": f"python bench/weak_scaling.py --methods {given.methods} --steps {given.steps}",
        "commit": number, "dirty": dirty,
        "date": date.today().isoformat(), "device": device(), "torch": torch.__version__, "load": [load, os.getloadavg()[0]],
        "model": given.model, "batch": given.batch, "seq": given.seq, "steps": given.steps, "warm": WARM, "rows": rows,
    }  # fmt: skip
    Path(given.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
