"""`tare bench soak`: a run that goes on for a while, is stopped and resumed, and must not grow: memory, files, folder, time a step.

The process that trains watches itself: resident memory, open files, threads, what lies in the run's folder, and the tokens of each second
of CPU time (so that what else the machine does counts for nothing). The verdict compares the last quarter of the time with the second.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tare.core.errors import InputError
from tare.train.config import RunConfig

FORMAT = 1
GROWTH = 0.02  # of the resident memory, or
GROWTH_BYTES = 16 << 20  # so many bytes, whichever is more: one large allocation more or less is no leak
SPEED = 0.9  # tokens of a CPU second in the last quarter, as a share of those in the second
FILES = 2  # open files and threads more at the end than at the second quarter
LOG_BYTES = 400  # of metrics.jsonl, a step
LOG_ROOM = 1 << 20  # of what else lies in the folder
STEPS = 10**9  # more than any soak takes


@dataclass(frozen=True)
class Sample:
    """One look. seconds: since the beginning; cpu: of this process; folder: bytes in the run's folder without its log, which grows;
    checkpoints: how many are there, with those being written or deleted; largest: bytes of one."""

    seconds: float
    cpu: float
    step: int
    tokens: int
    resident: int
    open_files: int
    threads: int
    folder: int
    checkpoints: int
    largest: int
    log: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tare bench soak`, but for `--json` and the settings of a run."""
    parser.add_argument("--minutes", metavar="X", type=float, default=30.0, help="how long it trains [30]")
    parser.add_argument(
        "--resumes", metavar="N", type=int, default=3, help="times it is stopped and resumed meanwhile [3]"
    )
    parser.add_argument("--every", metavar="X", type=float, default=2.0, help="seconds between looks [2]")
    parser.add_argument("--out", metavar="FILE", help="write the result here, as JSON")


def run_parsed(args: argparse.Namespace) -> int:
    """The command, from parsed arguments."""
    from tare.train.cache import write_atomic
    from tare.train.configfile import build

    if not 0 < args.minutes < 1e5 or not 0 < args.every < args.minutes * 6:
        raise InputError(
            f"--minutes {args.minutes:g}, --every {args.every:g}: expected minutes above 0, and at least ten looks in them"
        )
    if args.resumes < 0:
        raise InputError(f"--resumes: expected 0 or more, got {args.resumes}")
    config = build(args.settings)
    words = [word for given in args.settings for word in (given.where, str(given.value))]
    command = shlex.join(["tare", "bench", "soak", "--minutes", f"{args.minutes:g}", *words])
    result = soak(config, args.minutes, args.resumes, args.every, lambda text: print(text, file=sys.stderr, flush=True))
    result = {**result, "command": command}
    document = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if args.out:
        write_atomic(Path(args.out), document.encode())
    print(document if args.json else text(result), end="" if args.json else "\n")
    return 0 if result["steady"] else 1


def soak(
    config: RunConfig, minutes: float, resumes: int = 3, every: float = 2.0, tell: Any = lambda text: None
) -> dict[str, Any]:
    """Train for so many minutes, stopped and resumed `resumes` times at equal distances; what was seen, and the verdict.

    config: the job; its length, folder and schedule are not used.
    """
    from tare.report.provenance import commit, device
    from tare.train.loop import train
    from tare.train.progress import Event, StepDone

    samples: list[Sample] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tare-soak-") as place:
        out = Path(place) / "run"
        config = replace(
            config,
            train=replace(config.train, steps=STEPS, schedule="constant", warmup=0.0),
            run=replace(config.run, out=str(out)),
        )
        stops = [60 * minutes * (leg + 1) / (resumes + 1) for leg in range(resumes + 1)]

        def listen(event: Event) -> None:
            if not isinstance(event, StepDone):
                return
            now = time.monotonic() - began
            if not samples or now - samples[-1].seconds >= every:
                samples.append(look(out, now, event.step, event.tokens))
            if now >= stops[0]:
                stops.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)

        while stops:
            left = len(stops)
            done = train(replace(config, run=replace(config.run, resume=left <= resumes)), on_event=listen)
            if len(stops) == left:
                raise RuntimeError(f"the run ended by itself at step {done.steps}")
            tell(f"{resumes + 2 - left} of {resumes + 1}: step {done.steps}, {samples[-1].resident / 2**20:.0f} MiB")
    name, changed = commit()
    return {
        "format": FORMAT, "minutes": minutes, "resumes": resumes, "steps": done.steps, "method": done.method,
        "model": config.model.name, **verdict(samples, config.run.keep), "device": device(), "commit": name, "changed": changed,
        "config": {**asdict(done.config), "run": {**asdict(done.config.run), "out": ""}},
        "samples": [asdict(sample) for sample in thinned(samples)],
    }  # fmt: skip


def _sizes(folder: Path) -> dict[Path, int]:
    """Bytes of every file; of those that come and go meanwhile (a save beside the training) what there is."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[Path(place) / name] = (Path(place) / name).stat().st_size
    return found


def look(folder: Path, seconds: float, step: int, tokens: int) -> Sample:
    """What this process holds now."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise InputError("tare bench soak: reads /proc, which this system has not")
    facts = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    sizes = _sizes(folder)
    log = sizes.pop(folder / "metrics.jsonl", 0) + sizes.pop(folder / "run.seeds", 0)
    each: dict[str, int] = {}
    for path, size in sizes.items():
        if path.parent.parent.name == "checkpoints":
            each[path.parent.name] = each.get(path.parent.name, 0) + size
    return Sample(
        round(seconds, 2), round(time.process_time(), 2), step, tokens, int(facts["VmRSS"].split()[0]) * 1024,
        len(os.listdir("/proc/self/fd")), int(facts["Threads"]), sum(sizes.values()), len(each), max(each.values(), default=0), log,
    )  # fmt: skip


def verdict(samples: list[Sample], keep: int) -> dict[str, Any]:
    """The last quarter of the time beside the second (the first is warm-up): each figure, its bound, and whether all hold.

    keep: checkpoints that the run keeps; the best one and one under way come on top.
    """
    end = samples[-1].seconds if samples else 0.0
    second = [sample for sample in samples if end / 4 <= sample.seconds < end / 2]
    last = [sample for sample in samples if sample.seconds >= 3 * end / 4]
    if len(second) < 3 or len(last) < 3:
        raise InputError("tare bench soak: too few looks for a verdict; give more --minutes or a smaller --every")
    middle = lambda name, part: statistics.median(getattr(sample, name) for sample in part)  # noqa: E731
    before, after = middle("resident", second), middle("resident", last)
    hours = (middle("seconds", last) - middle("seconds", second)) / 3600
    speeds = [(p[-1].tokens - p[0].tokens) / max(p[-1].cpu - p[0].cpu, 1e-9) for p in (second, last)]
    most = lambda name, part: max(getattr(sample, name) for sample in part)  # noqa: E731
    figures = {"resident_bytes": (before, after, before + max(GROWTH * before, GROWTH_BYTES))}
    for name in ("open_files", "threads"):
        figures[name] = (middle(name, second), middle(name, last), middle(name, second) + FILES)
    figures["checkpoints"] = (most("checkpoints", second), most("checkpoints", last), keep + 2)
    room = (keep + 2) * most("largest", samples) + LOG_ROOM
    figures["run_folder_bytes"] = (most("folder", second), most("folder", last), room)
    figures["log_bytes_a_step"] = (second[-1].log / second[-1].step, last[-1].log / last[-1].step, LOG_BYTES)
    rows = {
        name: {"second_quarter": a, "last_quarter": b, "at_most": bound, "holds": b <= bound}
        for name, (a, b, bound) in figures.items()
    }
    slow, bound = speeds[1], SPEED * speeds[0]
    rows["tokens_a_cpu_second"] = {
        "second_quarter": speeds[0],
        "last_quarter": slow,
        "at_least": bound,
        "holds": slow >= bound,
    }
    slope = (after - before) / hours if hours else 0.0
    return {"steady": all(row["holds"] for row in rows.values()), "resident_bytes_an_hour": slope, "figures": rows}


def thinned(samples: list[Sample], most: int = 200) -> list[Sample]:
    """At most so many of them, evenly spread."""
    step = max(1, -(-len(samples) // most))
    return samples[::step]


def text(result: dict[str, Any]) -> str:
    """The verdict for eyes."""
    lines = [
        f"{result['method']} on {result['model']}: {result['steps']} steps in {result['minutes']:g} minutes, {result['resumes']} resumes"
    ]
    for name, row in result["figures"].items():
        bound = next(f"{key[3:]} {value:,.1f}" for key, value in row.items() if key.startswith("at_"))
        mark = "" if row["holds"] else "  <- grows" if "most" in bound else "  <- slows down"
        lines.append(
            f"  {name:<22} {row['second_quarter']:>15,.1f} -> {row['last_quarter']:>15,.1f}   (at {bound}){mark}"
        )
    lines.append("steady" if result["steady"] else "NOT steady")
    return "\n".join(lines)
