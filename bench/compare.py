"""All methods on one small model, data, seed and number of tokens: what `tare compare` does, with a note of where it ran.

    python bench/compare.py [--methods adamw,galore] [--out bench/results/compare-llama-3m.json]

Learning rates are the presets of the cards, swept by `bench/sweep.py`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from tare.methods import registry
from tare.report.compare import compare
from tare.report.provenance import commit, device
from tare.train.config import DataConfig, ModelConfig, RunConfig, RunSection, TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(registry.keys()))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="bench/results/compare-llama-3m.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=ModelConfig(name="llama-3m"),
            data=DataConfig(source="stdlib", seq=128),
            train=TrainConfig(steps=args.steps, batch=8),
            run=RunSection(out=f"{folder}/compare", checkpoint_every=args.steps, eval_every=args.steps // 4, threads=2),
        )
        result = compare(config, args.methods.split(",")).to_json()
    result.pop("out")
    result["config"]["run"].pop("out")
    for row in result["rows"]:
        row.pop("folder")
        row["settings"].pop("run", None)
    sha, changed = commit()
    facts = {
        "command": f"python bench/compare.py --steps {args.steps}", "commit": sha, "uncommitted_changes": changed,
        "date": time.strftime("%Y-%m-%d"),
        "device": device(), "torch": torch.__version__.split("+")[0], "seed": config.run.seed, "threads": 2,
    }  # fmt: skip
    Path(args.out).write_text(json.dumps({**facts, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
