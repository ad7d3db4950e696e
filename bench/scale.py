"""What a rank needs and what ranks send each other at 8, 64 and 1,024 GPUs: arithmetic from the plan of one rank, nothing is run.

    python bench/scale.py [--model llama-7b] [--gpus 8,64,1024] [--methods adamw,galore,...] [--out bench/results/scale.json]

Every rank has `--batch` sequences. Times follow from stated speeds of links (`tare.plan.links`); none is measured.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tare.plan.links import parse_links
from tare.plan.models import plannable
from tare.plan.ranks import Ranks
from tare.plan.rows import PlanRow, Settings, plan_row
from tare.report.provenance import commit

PARTS = ("weights", "gradients", "state", "activations", "temporaries", "gathered", "peak")


def measured_row(settings: Settings, method: str) -> dict[str, Any]:
    """One method on the ranks of some settings."""
    row: PlanRow = plan_row(settings, method)
    ranks = settings.ranks
    said: dict[str, Any] = {
        "gpus": ranks.gpus if ranks else 1,
        "parallel": ranks.parallel if ranks else "alone",
        "method": method,
    }
    said |= {part: getattr(row, part) for part in PARTS} | {"event": row.event, "events": row.events, "note": row.note}
    if row.ranks is not None:
        said |= {
            "shards": ranks.cut if ranks else 1,
            "first": asdict(row.ranks.first), "worst": asdict(row.ranks.worst),
            "traffic": [{**asdict(m), "seconds": s} for m, s in zip(row.ranks.traffic, row.ranks.seconds, strict=True)],
        }  # fmt: skip
    return said


def main() -> None:
    """Write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--gpus", default="8,64,1024")
    parser.add_argument("--methods", default="adamw,adamw-8bit,galore,apollo-mini,muon")
    parser.add_argument("--batch", type=int, default=1, help="sequences of each rank")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--link", default="nvlink4,infiniband-ndr")
    parser.add_argument("--node", type=int, default=8, help="GPUs of one machine")
    parser.add_argument("--out", default="bench/results/scale.json")
    given = parser.parse_args()
    start = time.monotonic()
    alone = Settings(
        plannable(given.model), given.model, given.batch, given.seq, "bf16", "bf16", checkpointing=True, alone=False, follow=False,
        links=parse_links(given.link),
    )  # fmt: skip
    rows = [measured_row(alone, method) for method in given.methods.split(",")]
    for gpus in map(int, given.gpus.split(",")):
        forms = [Ranks(gpus, "ddp", None, given.node), Ranks(gpus, "fsdp", None, given.node)]
        if gpus > given.node:
            forms.append(Ranks(gpus, "hsdp", given.node, given.node))
        for ranks in forms:
            rows += [measured_row(replace(alone, ranks=ranks), method) for method in given.methods.split(",")]
    revision, changed = commit()
    flags = {"model": given.model, "gpus": given.gpus, "methods": given.methods, "batch": given.batch, "seq": given.seq}
    flags |= {"link": given.link, "node": given.node}
    command = " ".join(["python bench/scale.py", *(f"--{name} {value}" for name, value in flags.items())])
    found = {
        "kind": "plan-scale", "format": 1, "command": command, "commit": revision,
        "changed": changed, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "measured": "nothing: computed from shapes",
        "seconds": round(time.monotonic() - start, 1), "model": given.model, "batch_of_rank": given.batch, "seq": given.seq,
        "precision": "bf16", "checkpointing": True, "node": given.node, "links": [asdict(link) for link in alone.links or ()], "rows": rows,
    }  # fmt: skip
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
