"""Sweep the learning rate of every method on one small setting, equal tokens and seed, and keep the evaluation loss of each.

    python bench/sweep.py [--methods galore,fira] [--out bench/results/sweep-llama-3m.json]

The presets of the cards for the small models are the best of these, which is what makes `tare compare` a fair comparison. The file
grows run by run; what it holds already is not run again.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tare.train.config import DataConfig, MethodConfig, ModelConfig, RunConfig, RunSection, TrainConfig
from tare.train.loop import train

GRID = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "apollo-mini": (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
    "apollo": (2.5e-3, 5e-3, 1e-2),
    "fira": (1.25e-3, 2.5e-3, 5e-3, 1e-2),
    "galore": (5e-3, 1e-2, 2e-2),
    "adamw-8bit": (5e-4, 1e-3),
    "galore-8bit": (5e-3, 1e-2),
    "galore-adafactor": (2.5e-3, 5e-3, 1e-2),
    "lion": (1.25e-4, 2.5e-4, 5e-4, 1e-3),
    "galore/randomized": (1e-2,),  # one power step and QR, leaves in turn, in place of the exact SVD
}


def setting(method: str, lr: float, out: str) -> RunConfig:
    """The setting of `make demo`, a little shorter, with everything fixed but the method and its learning rate."""
    key, _, basis = method.partition("/")
    return RunConfig(
        model=ModelConfig(name="llama-3m"),
        data=DataConfig(source="stdlib", seq=128, eval_tokens=16_384),
        method=MethodConfig(key=key, lr=lr, options={"basis": basis, "stagger": True} if basis else {}),
        train=TrainConfig(steps=250, batch=8),
        run=RunSection(out=out, checkpoint_every=1000, eval_every=250, threads=1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(GRID))
    parser.add_argument("--out", default="bench/results/sweep-llama-3m.json")
    args = parser.parse_args()
    path = Path(args.out)
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    done = {(row["method"], row["lr"]) for row in result["rows"]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for method in args.methods.split(","):
        for lr in GRID[method]:
            if (method, lr) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                config = setting(method, lr, os.path.join(folder, "run"))
                run = train(config)
            row = {"method": method, "lr": lr, "loss": run.loss, "perplexity": run.perplexity, "tokens": run.tokens}
            print(row, flush=True)
            result["rows"].append(row)
            settings = asdict(config)
            settings["run"].pop("out")
            result |= {
                "command": "python bench/sweep.py", "commit": commit, "date": time.strftime("%Y-%m-%d"),
                "device": platform.processor() or platform.machine(), "torch": torch.__version__.split("+")[0],
                "seed": config.run.seed, "setting": {k: settings[k] for k in ("model", "data", "train")},
            }  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
