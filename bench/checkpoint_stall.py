"""How long a save stops the training: at once, and beside it. Writes a JSON; `python bench/checkpoint_stall.py --out bench/results`.

In a round the same number of steps is made three times, in turns: without a save, with saves at once, with saves in the background.
`stalled`: time inside the calls that save, by the clock of the training thread, over that of all steps. `stalled_cpu`: the same in the
thread's own processor time, which other processes of a busy machine do not lengthen, nor does waiting for the disk. `slowed` also counts
what the steps beside a writing thread lose: the time with saves over the time without, less one.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tare
from tare.methods import registry
from tare.plan.activations import causal_loss
from tare.plan.models import build_model
from tare.plan.models import parameter_count as count
from tare.train import checkpoint
from tare.train.saving import Saver

MODES = ("none", "at once", "background")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-9m", help="a named size (llama-9m, the model of the README)")
    parser.add_argument("--method", default="adamw", help="a registered method (adamw: two moments, the most to save)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--saves", type=int, default=2, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the training; a core should be left for the writer")
    parser.add_argument("--folder", default=None, help="where checkpoints go; a temporary folder if left out")
    parser.add_argument("--out", default=None, help="folder of the JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = build_model(given.model, seed=0)
    optimizer = registry.build(given.method, model, lr=1e-4)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    batch = torch.randint(vocabulary, (given.batch, given.seq), generator=torch.Generator().manual_seed(0))
    place = Path(tempfile.mkdtemp(dir=given.folder))

    def step() -> None:
        causal_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    savers = {mode: Saver(place / "checkpoints", model, optimizer, background=mode == "background") for mode in MODES}
    steps = given.every * given.saves

    def timed(mode: str) -> dict[str, float]:
        saver, stalled, own = savers[mode], 0.0, 0.0
        began, began_own = time.perf_counter(), time.thread_time()
        for number in range(1, steps + 1):
            step()
            if mode == "none":
                continue
            at, at_own = time.perf_counter(), time.thread_time()
            if number % given.every == given.every // 2:
                saver.save(number, {"counters": {"step": number}})
            saver.finished()
            stalled += time.perf_counter() - at
            own += time.thread_time() - at_own
        taken = {
            "seconds": time.perf_counter() - began,
            "cpu": time.thread_time() - began_own,
            "stalled": stalled,
            "stalled_cpu": own,
        }
        saver.wait()
        return taken

    rounds: list[dict[str, dict[str, float]]] = []
    load = os.getloadavg()[0]
    try:
        step()
        timed("background")  # memory for the copies, which is used again, and files that the next ones replace
        for number in range(given.rounds):
            order = MODES[number % 3 :] + MODES[: number % 3]
            found = {mode: timed(mode) for mode in order}
            rounds.append({mode: found[mode] for mode in MODES})
    finally:
        shutil.rmtree(place, ignore_errors=True)

    def median(mode: str, what: str) -> float:
        return statistics.median(row[mode][what] for row in rounds)

    size = checkpoint.nbytes(checkpoint.weights_of(model)) + int(optimizer.state_bytes())
    result: dict[str, Any] = {
        "what": "share of the training time that saving takes", "tare": tare.__version__, "torch": torch.__version__,
        "model": given.model, "parameters": count(model), "method": given.method, "bytes": size, "batch": given.batch, "seq": given.seq,
        "every": given.every, "saves": given.saves, "threads": given.threads, "cores": os.cpu_count(),
        "load": [load, os.getloadavg()[0]], "rounds": rounds,
        "stalled": {m: statistics.median(r[m]["stalled"] / r[m]["seconds"] for r in rounds) for m in MODES[1:]},
        "stalled_cpu": {m: statistics.median(r[m]["stalled_cpu"] / r[m]["cpu"] for r in rounds) for m in MODES[1:]},
        "slowed": {m: median(m, "seconds") / median("none", "seconds") - 1 for m in MODES[1:]},
        "stall_seconds_per_save": {m: median(m, "stalled") / given.saves for m in MODES[1:]},
        "step_seconds": median("none", "seconds") / steps,
    }  # fmt: skip
    for mode in MODES[1:]:
        wall, own, each = (result[key][mode] for key in ("stalled", "stalled_cpu", "stall_seconds_per_save"))
        print(
            f"{mode:<11} stalled {wall:.2%} of the time ({own:.2%} of the thread's processor time), {each:.3f} s a save"
        )
        print(
            f"{'':<11} of {size / 2**20:.0f} MiB; steps and saves took {result['slowed'][mode]:.1%} longer than the steps alone"
        )
    if given.out:
        target = Path(given.out) / "checkpoint-stall.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
        print(target)


if __name__ == "__main__":
    main()
