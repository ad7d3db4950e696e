"""Examination of a run's folder: what is whole, what is damaged, what a killed process left, and how the run can go on. Changes nothing."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tare.core.errors import CheckpointError, InputError
from tare.plan.budget import format_bytes
from tare.train import checkpoint, integrity, metrics, run, seedlog
from tare.train.base import KEY as BASE
from tare.train.checkpoint import Snapshot
from tare.train.config import RunConfig
from tare.train.tensorfile import TensorFile

# whole: as it was written. left: of a killed process, harmless, tidied up by the next start. damaged: not as it was written.
Level = Literal["whole", "left", "damaged", "note"]
WHOLE, DAMAGED, LOST = 0, 1, 2  # exit codes


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. what: a path within the run."""

    what: str
    level: Level
    text: str


@dataclass
class Report:
    """What was found. `resumes`: the step that the run would go on from (0: from its beginning), None if it cannot."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    resumes: int | None = None
    steps: int | None = None  # of the whole run
    finished: bool = False
    command: str | None = None
    process: str | None = None  # that works in the folder now

    @property
    def code(self) -> int:
        """0: nothing is damaged. 1: something is, and the run can go on. 2: this is no run, or nothing is left to go on from."""
        if self.resumes is None:
            return LOST
        return DAMAGED if any(finding.level == "damaged" for finding in self.findings) else WHOLE

    @property
    def verdict(self) -> str:
        """One line."""
        if self.resumes is None:
            return "nothing can be resumed here"
        state = "whole" if self.code == WHOLE else "damaged, but it can go on"
        if self.finished:
            return f"{state}; finished at step {self.resumes:,}"
        of = "" if self.steps is None else f" of {self.steps:,}"
        return f"{state}; goes on from {f'step {self.resumes:,}{of}' if self.resumes else 'the beginning'}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": str(self.folder), "code": self.code, "verdict": self.verdict, "resumes": self.resumes, "steps": self.steps,
            "finished": self.finished, "command": self.command, "process": self.process,
            "findings": [asdict(finding) for finding in self.findings],
        }  # fmt: skip


def examine(folder: Path) -> Report:
    """Look at everything in a run's folder; every byte of its checkpoints is read. Raises nothing that a damaged file could cause."""
    report = Report(folder)
    say = report.findings.append
    if not folder.is_dir():
        say(Finding("", "damaged", "no such folder" if not folder.exists() else "a file; a run is a folder"))
        return report
    if not (folder / "config.yaml").exists() and not (folder / "checkpoints").is_dir():
        say(Finding("", "damaged", "no run: it holds neither config.yaml nor checkpoints"))
        return report
    report.process = _lock(folder, say)
    config = _config(folder, say)
    intact, any_there = _checkpoints(folder, say)
    newest = intact[0] if intact else None
    if config is not None:
        report.steps = config.train.steps
    elif newest is not None:
        report.steps = newest.trainer.get("config", {}).get("train", {}).get("steps")
    report.findings += _log(folder, newest, any_there)
    report.findings += _seeds(folder)
    report.findings += _model(folder)
    report.findings += _leftovers(folder, report.process)
    if newest is not None:
        report.resumes = newest.step
    elif not any_there and config is not None:
        report.resumes = 0
    if report.resumes is not None:
        there = (folder / "model" / "config.json").is_file()
        report.finished = there and report.steps is not None and report.resumes >= report.steps
        report.command = _command(folder, newest, config, report.finished)
    return report


def _lock(folder: Path, say: Any) -> str | None:
    """The process that works in the folder."""
    path = folder / "run.lock"
    if not path.exists():
        return None
    owner = run.owner(folder)
    if run.held(path):
        say(Finding("run.lock", "note", f"{owner} works in this run now; what it writes meanwhile may look unfinished"))
        return owner
    say(Finding("run.lock", "left", f"of {owner}, which is gone; the next start takes it over"))
    return None


def _config(folder: Path, say: Any) -> RunConfig | None:
    from tare.train.configfile import load

    try:
        config = load(folder / "config.yaml")
    except InputError as fault:
        say(Finding("config.yaml", "damaged", _line(fault)))
        return None
    say(Finding("config.yaml", "whole", f"{config.method.key} on {config.model.name}, {config.train.steps:,} steps"))
    return config


def _checkpoints(folder: Path, say: Any) -> tuple[list[Snapshot], bool]:
    """The intact ones, newest first, and whether there are any."""
    intact = []
    listed = checkpoint.found(folder / "checkpoints")
    for step, path in listed:
        where = f"checkpoints/{path.name}"
        try:
            snapshot = checkpoint.load(path, step)
        except integrity.NewerFormat as fault:
            say(Finding(where, "damaged", _line(fault).removeprefix(f"{path}: ")))
            return [], True  # a run refuses to go on from an older one then
        except (CheckpointError, OSError) as fault:
            text = _line(fault).removeprefix(f"{path}/").removeprefix(f"{path}: ")
            say(Finding(where, "damaged", text))
            continue
        manifest = snapshot.content.manifest
        size = sum(fact["size"] for fact in manifest["files"].values())
        kind = f"in the pieces of {manifest.get('ranks')} ranks" if snapshot.content.sharded else "whole tensors"
        loss = manifest.get("eval_loss")
        say(
            Finding(
                where,
                "whole",
                f"{format_bytes(size)}, {kind}" + (f", loss {loss:.4f}" if isinstance(loss, float) else ""),
            )
        )
        intact.append(snapshot)
    if intact and (said := intact[0].content.manifest.get(BASE)) is not None:
        say(_base(said))
    return intact, bool(listed)


def _base(said: Any) -> Finding:
    """What the newest checkpoint stands on."""
    name = str(said.get("model")) if isinstance(said, dict) else "?"
    there = (Path(name).expanduser() / "config.json").is_file()
    text = f"the checkpoints hold what is trained, and stand on the weights of {name}"
    return Finding(
        "base", "note" if there else "damaged", text + ("" if there else ", which is not there: put it back")
    )


def _log(folder: Path, newest: Snapshot | None, any_there: bool) -> Iterator[Finding]:
    path = folder / metrics.NAME
    if not path.is_file():
        if any_there:
            yield Finding(metrics.NAME, "damaged", "missing; the run can go on, but what it logged is lost")
        return
    try:
        data = path.read_bytes()
    except OSError as fault:
        yield Finding(metrics.NAME, "damaged", f"cannot be read ({fault.strerror})")
        return
    whole, _, tail = data.rpartition(b"\n")
    rows = whole.split(b"\n") if whole else []
    lines, good = metrics.read(path), True
    if bad := [number for number, row in enumerate(rows, 1) if metrics.parsed(row) is None]:
        good = False
        yield Finding(
            metrics.NAME, "damaged", f"{len(bad)} lines are none, the first is line {bad[0]}; they are passed over"
        )
    steps = [line["step"] for line in lines if line["event"] in ("step", "skip")]
    if back := [step for before, step in pairwise(steps) if step <= before]:
        good = False
        yield Finding(metrics.NAME, "damaged", f"step {back[0]} stands behind a later or an equal one")
    if gaps := [before for before, step in pairwise([0, *steps]) if step > before + 1]:
        good = False
        yield Finding(metrics.NAME, "damaged", f"the steps after {gaps[0]} are missing")
    last = max(steps, default=0)
    if newest is not None and last < newest.step:
        good = False
        yield Finding(metrics.NAME, "damaged", f"ends at step {last}, before the checkpoint of step {newest.step}")
    saved = [line["step"] for line in lines if line["event"] == "checkpoint"]
    if saved and not (folder / "checkpoints" / f"step-{max(saved)}").exists():
        yield Finding(f"checkpoints/step-{max(saved)}", "damaged", "missing; by the log it was the newest")
    if tail:
        yield Finding(metrics.NAME, "left", f"an unfinished last line of {len(tail)} bytes; it is cut off on resume")
    if good:
        ahead = f"; those after step {newest.step} come again on resume" if newest and last > newest.step else ""
        yield Finding(metrics.NAME, "whole", f"{last:,} steps{ahead}")


def _seeds(folder: Path) -> Iterator[Finding]:
    path = folder / seedlog.NAME
    if not path.exists():
        return
    from tare.zeroth.logfile import read

    try:
        log = read(path)
    except (InputError, OSError) as fault:
        yield Finding(seedlog.NAME, "damaged", _line(fault).removeprefix(f"{path}: "))
        return
    sealed = ", sealed with the digest of the trained weights" if log.digest is not None else ""
    yield Finding(seedlog.NAME, "whole", f"{len(log.payloads):,} steps{sealed}")
    if log.torn:
        yield Finding(seedlog.NAME, "left", f"an unfinished last step of {log.torn} bytes; it is left out")


def _model(folder: Path) -> Iterator[Finding]:
    """The model has no checksums; that its files can be opened is what can be said."""
    place = folder / "model"
    if not place.is_dir():
        return
    good = True
    for path in sorted(place.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".safetensors":
                TensorFile(path)
        except (CheckpointError, OSError, ValueError, RecursionError) as fault:
            good = False
            yield Finding(f"model/{path.name}", "damaged", f"cannot be read ({_line(fault).removeprefix(f'{path}: ')})")
    if not (place / "config.json").is_file() and not (place / "adapter_config.json").is_file():
        good = False
        yield Finding("model", "damaged", "lacks config.json")
    if good:
        yield Finding("model", "whole", "every file can be opened; it has no checksums")


def _leftovers(folder: Path, process: str | None) -> Iterator[Finding]:
    for place, prefix in ((folder, ""), (folder / "checkpoints", "checkpoints/")):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            name = path.name
            if integrity.TEMPORARY in name or name == "model.old":
                text = (
                    "being written"
                    if process
                    else "half-written or half-deleted by a killed process; removed at the next start"
                )
                yield Finding(prefix + name, "note" if process else "left", text)
            elif prefix and checkpoint.step_of(name) is None:
                yield Finding(prefix + name, "note", "no checkpoint of this run; left alone")


def _command(folder: Path, newest: Snapshot | None, config: RunConfig | None, finished: bool) -> str:
    """What to type. The number of processes is that of the run, which is not needed for going on."""
    workers = int(newest.trainer.get("workers", 1)) if newest is not None else 1
    start = f"torchrun --nproc-per-node {workers} -m tare" if workers > 1 else "tare"
    given = (
        ""
        if config is not None
        else f" --config FILE (its settings are in {newest.folder.name}/trainer.json)"
        if newest
        else ""
    )
    return f"{start} train --resume --out {folder}{' --steps MORE' if finished else ''}{given}"


def _line(fault: BaseException) -> str:
    return " ".join(str(fault).split())
