"""The folder of a run: who may write it, what it holds, and which settings a resumed run may change.

    config.yaml   metrics.jsonl   checkpoints/step-N/   model/   run.lock (only while a process works in it)

Every file is written atomically; `model/` is a whole `transformers` folder or absent.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from tare.core.errors import CheckpointError, InputError
from tare.train import integrity
from tare.train.cache import write_atomic
from tare.train.config import RunConfig

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are then not told apart
    fcntl = None  # type: ignore[assignment]

Change = Literal["free", "warn", "refuse"]

# What a resumed run may change. free: no effect on the weights. warn: goes on, differently from an uninterrupted run.
# refuse: the saved state has no meaning under the new value.
CHANGES: dict[str, Change] = {
    **dict.fromkeys(("model.checkpointing", "run.out", "run.budget", "run.resume", "run.checkpoint_every"), "free"),
    **dict.fromkeys(
        ("train.clip_parts", "run.eval_every", "run.keep", "run.tensorboard", "train.max_bad_steps", "train.workers"),
        "free",
    ),
    **dict.fromkeys(("data.eval_tokens", "method.lr", "method.weight_decay", "method.release", "run.device"), "warn"),
    **dict.fromkeys(("run.threads", "train.steps", "train.batch", "train.accumulate", "train.schedule"), "warn"),
    **dict.fromkeys(("train.warmup", "train.final_lr_ratio", "train.clip", "train.clip_mode"), "warn"),
    **dict.fromkeys(("train.refresh_from", "train.refresh_parts", "train.spike", "train.spike_memory"), "warn"),
    **dict.fromkeys(("train.spike_limit", "run.patience", "run.checkpoint_async"), "free"),
    **dict.fromkeys(("train.parallel", "train.shards", "train.sync"), "free"),
    **dict.fromkeys(("train.compress", "train.compress_fraction", "train.compress_start"), "warn"),
    **dict.fromkeys(("train.compress_rank",), "refuse"),
    **dict.fromkeys(("model.name", "model.tokenizer", "data.source", "data.eval_source", "data.text_column"), "refuse"),
    **dict.fromkeys(("data.seq", "data.eval_fraction", "method.key", "method.rank", "method.options"), "refuse"),
    **dict.fromkeys(("method.storage", "train.precision", "run.seed", "model.kind", "task.name"), "refuse"),
    **dict.fromkeys(("model.quantize", "train.match", "adapter.kind", "adapter.rank", "adapter.alpha"), "refuse"),
    **dict.fromkeys(("adapter.targets", "adapter.tokens"), "refuse"),
    **dict.fromkeys(("adapter.dropout",), "warn"),
    **dict.fromkeys(("adapter.merge", "data.bad_rows"), "free"),
    **dict.fromkeys(("task.template", "task.words", "task.label_column", "task.shots"), "refuse"),
    **dict.fromkeys(("task.objective", "task.eval_examples"), "warn"),
}
_INHERITED = (
    "method.lr",
    "method.rank",
    "method.weight_decay",
    "run.threads",
    "train.workers",
    "train.parallel",
)  # None = as it was


class RunFolder:
    """The open folder of one run, locked against a second process until `close`."""

    def __init__(self, out: str | Path, resume: bool = False, own: bool = True) -> None:
        """Take the folder. own: False where another process has taken it and writes; this one then only reads.

        Raises:
            InputError: it is a file, cannot be written, holds something while `resume` is off, or another run works in it.
            CheckpointError: `resume` is on and there is nothing to resume.
        """
        self.path = Path(out).expanduser().absolute()
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.checkpoints, self.model = self.path / "checkpoints", self.path / "model"
        self._created: list[Path] = []
        self._lock: int | None = None
        self.own = own
        if not own:
            return
        self._check(out, resume)
        try:
            for parent in reversed([self.path, *self.path.parents]):
                if not parent.exists():
                    parent.mkdir()
                    self._created.append(parent)
                    integrity.sync(parent.parent)
            self._lock = self._acquire()
        except OSError as fault:
            self._undo()
            raise InputError(f"run.out: {out} cannot be written ({fault.strerror}); choose another folder") from fault
        self._tidy()

    def close(self) -> None:
        """Give the folder free for other processes."""
        if self._lock is None:  # of another process, or given free already: the file may be that of the next owner
            return
        with contextlib.suppress(OSError):
            (self.path / "run.lock").unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def abandon(self) -> None:
        """Close, and remove the folders made by this object if nothing has been put there."""
        self.close()
        self._undo()

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration; `tare train --config` reads it back."""
        from tare.train.configfile import dump

        write_atomic(self.config, dump(config).encode())

    def write_model(self, save: Callable[[Path], None]) -> None:
        """Put what `save(folder)` writes in the place of `model/`, whole; the old one stays until then."""
        new, old = integrity.aside(self.model), self.model.with_name(f"{self.model.name}.old")
        try:
            new.mkdir()
            save(new)
            integrity.sync_tree(new)
            integrity.reach("before_model")
            if self.model.exists():
                os.rename(self.model, old)
                integrity.reach("between_models")
            os.rename(new, self.model)
            integrity.sync(self.path)
        except Exception as fault:  # safetensors has a class of its own for a full disk
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(fault, CheckpointError):
                raise
            raise CheckpointError(f"{self.model}: could not be saved: {integrity.why(fault)}") from fault
        shutil.rmtree(old, ignore_errors=True)

    def _check(self, out: str | Path, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run.out: {out} is a file; give a folder")
        if not self.path.exists():
            if resume:
                raise CheckpointError(
                    f"run.resume: there is no run in {out}; start it without resume, or check run.out"
                )
            return
        try:
            content = [name for name in sorted(os.listdir(self.path)) if not _own_leftover(name)]
        except OSError as fault:
            raise InputError(f"run.out: {out} cannot be read ({fault.strerror}); choose another folder") from fault
        if held(self.path / "run.lock"):
            raise InputError(
                f"run.out: {out} is in use by another run ({owner(self.path)}); wait for it, or choose another folder"
            )
        if content and not resume:
            raise InputError(f"run.out: {out} is not empty; resume the run in it (--resume), or choose another folder")
        if content and resume and not self.config.exists() and not self.checkpoints.exists():
            raise CheckpointError(f"run.resume: there is no run in {out} (it holds {content[0]!r}); check run.out")

    def _acquire(self) -> int | None:
        """Lock `run.lock`. The kernel drops the lock with the process, so one left by a dead process is simply taken over."""
        path = self.path / "run.lock"
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise InputError(f"run.out: {self.path} is in use by another run ({owner(self.path)})") from None
            # The owner before us may have removed the file between our opening and locking it.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
            os.close(handle)

    def _tidy(self) -> None:
        """Remove what a killed process left, and put back a model whose replacement never came."""
        for place in (self.path, self.checkpoints):
            if place.is_dir():
                integrity.sweep(place, ("config.yaml", "metrics.jsonl", "model", "step-", "report.html", "row.json"))
        old = self.model.with_name(f"{self.model.name}.old")
        if old.exists() and not self.model.exists():
            os.rename(old, self.model)
        shutil.rmtree(old, ignore_errors=True)

    def _undo(self) -> None:
        for path in reversed(self._created):
            with contextlib.suppress(OSError):
                path.rmdir()


def changes(saved: dict[str, dict[str, Any]], config: RunConfig) -> list[str]:
    """What differs between a saved configuration and the one to go on with: a warning each, where the run may go on.

    Raises `CheckpointError`, naming the setting and both values, where it may not.
    """
    warnings = []
    for section, values in asdict(config).items():
        for name, value in values.items():
            key = f"{section}.{name}"
            was = saved.get(section, {}).get(name, value)  # a setting that the older tare did not know
            if was == value or CHANGES[key] == "free":
                continue
            if CHANGES[key] == "refuse":
                raise CheckpointError(
                    f"{key}: the run was started with {was!r}, not {value!r}, and cannot go on with another; "
                    "set it back, or start a new run in another run.out"
                )
            warnings.append(f"{key} was {was!r} and is now {value!r}: the run goes on, but not as if uninterrupted")
    return warnings


def inherit(saved: dict[str, dict[str, Any]], config: RunConfig) -> RunConfig:
    """The configuration with what it leaves open (`auto`, none) taken from the saved one."""
    open_ = [key for key in _INHERITED if getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) is None]
    if config.method.key == "auto":
        open_.append("method.key")
    for key in open_:
        section, name = key.split(".")
        if name in saved.get(section, {}):
            part = replace(getattr(config, section), **{name: saved[section][name]})
            config = replace(config, **{section: part})
    kept = saved.get("method", {})
    options = {**kept.get("options", {}), **config.method.options}
    storage = {**kept.get("storage", {}), **config.method.storage}
    return replace(config, method=replace(config.method, options=options, storage=storage))


def _own_leftover(name: str) -> bool:
    """Whether a killed process of ours leaves such a name before the run has begun."""
    return name == "run.lock" or name.startswith(("run.launch", "config.yaml" + integrity.TEMPORARY))


def held(lock: Path) -> bool:
    """Whether a living process has taken a run's lock."""
    if fcntl is None or not lock.is_file():
        return False
    with contextlib.suppress(OSError), open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def owner(folder: Path) -> str:
    """Who has, or had, the lock of a run, in words."""
    try:
        return f"process {int((folder / 'run.lock').read_text())}"
    except (OSError, ValueError):
        return "process unknown"
