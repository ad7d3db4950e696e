"""From one form of a checkpoint to another: whole tensors in one folder, pieces for many ranks, or a model for `transformers`.

Every kind of run reads both kinds of checkpoint; this is for other programs, for moving, and for looking. Tensors are read one at a time.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tare.core.errors import CheckpointError, InputError
from tare.core.shard.layout import Layout
from tare.train import checkpoint, integrity, tensorfile
from tare.train.checkpoint import Snapshot
from tare.train.config import RunConfig
from tare.train.configfile import PATHS, Given, build
from tare.train.stored import LAYOUT, OPTIMIZER, TENSORS, TRAINER, WEIGHTS, Stored
from tare.train.trees import flatten

Form = Literal["single", "sharded", "model"]
FORMS: tuple[Form, ...] = ("single", "sharded", "model")
_OWN = ("files", "sha256", "format", "ranks")  # of a manifest, said anew


@dataclass(frozen=True)
class Converted:
    """What was written. skipped: newer checkpoints that are damaged, a line each."""

    source: Path
    out: Path
    step: int
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Some rows of a stored tensor."""

    stored: Stored
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.last - self.first, *self.stored.shape[1:]) if self.stored.shape else ()

    @property
    def dtype(self) -> Any:
        return self.stored.dtype

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.first, *(0 for _ in self.stored.shape[1:])) if self.stored.shape else ()

    def whole(self) -> Any:
        """Read them."""
        return self.stored.read(self.offsets, self.shape)


def convert(source: Path, to: Form, out: Path, ranks: int = 2) -> Converted:
    """Write the newest intact checkpoint of a run, or the one given, in another form.

    Args:
        source: the folder of a run, or one of its checkpoints (`.../checkpoints/step-N`). Never changed.
        to: `single`: `out/step-N` with whole tensors; `sharded`: the same in pieces, by rows, for `ranks` ranks; `model`: `out` becomes
            a `transformers` folder, with the tokenizer, for which the run's data must be at hand if it was trained on them.
        out: a folder that is not there yet, or empty.
        ranks: pieces, for `sharded`; the ranks that go on from it may be any number.

    Raises:
        InputError: an `out` that holds something, a source that is neither.
        CheckpointError: damaged, or no space.
    """
    if to not in FORMS:
        raise InputError(f"--to: expected one of {', '.join(FORMS)}, got {to!r}")
    if ranks < 1:
        raise InputError(f"--ranks: expected at least 1, got {ranks}")
    snapshot = opened(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists and is not empty; give another folder")
    size = sum(s.nbytes for s in snapshot.content.weights.values())
    if to != "model":
        size += sum(s.nbytes for s in flatten(snapshot.content.state_dict(_as_stored))[1].values())
    integrity.require_space(out, size + checkpoint.SLACK, "what is converted")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if to == "model":
            _model(snapshot, out)
            return Converted(snapshot.folder, out, snapshot.step, snapshot.skipped)
        out.mkdir(exist_ok=True)
    except OSError as fault:
        raise InputError(f"--out: {out} cannot be written ({fault.strerror})") from fault
    target = out / f"step-{snapshot.step}"
    facts = {key: value for key, value in snapshot.content.manifest.items() if key not in _OWN}
    if to == "single":
        _single(snapshot, target, facts)
    else:
        _sharded(snapshot, target, facts, ranks)
    return Converted(snapshot.folder, target, snapshot.step, snapshot.skipped)


def opened(source: Path) -> Snapshot:
    """The newest intact checkpoint of a run, or the one that was named. Raises as `convert`."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give that of a run, or one of its checkpoints/step-N")
    step = checkpoint.step_of(source.name)
    if step is not None and (source / integrity.MANIFEST).exists():
        return checkpoint.load(source, step)
    place = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    snapshot = checkpoint.load_latest(place)
    if snapshot is None:
        raise InputError(f"{source}: holds no checkpoint; give the folder of a run, or one of its checkpoints/step-N")
    return snapshot


def _single(snapshot: Snapshot, target: Path, facts: dict[str, Any]) -> None:
    plain, tensors = flatten(snapshot.content.state_dict(_as_stored) | _exchange(snapshot))
    integrity.commit(
        target,
        {
            WEIGHTS: lambda path: tensorfile.write(path, snapshot.content.weights),
            TENSORS: lambda path: tensorfile.write(path, tensors),
            OPTIMIZER: lambda path: checkpoint.put_text(path, json.dumps(plain, allow_nan=False)),
            TRAINER: lambda path: _trainer(snapshot, path),
        },
        facts,
    )


def _sharded(snapshot: Snapshot, target: Path, facts: dict[str, Any], ranks: int) -> None:
    content = snapshot.content
    order = [content.order[number] for number in sorted(content.order)]
    if not all(isinstance(leaf, str) for leaf in order):
        raise CheckpointError(
            f"{snapshot.folder / OPTIMIZER}: its parameters have no names, so they cannot be put in pieces"
        )
    named = {"state": content.state, "param_groups": content.groups, "order": order}
    plain, state = flatten(named | _exchange(snapshot))
    layout: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for part, tensors in (("weights", content.weights), ("optimizer", state)):
        layout[part] = {
            name: {"dtype": tensorfile.DTYPES[t.dtype], "shape": list(t.shape), "pieces": []}
            for name, t in tensors.items()
        }
        for rank in range(ranks):
            file = f"{part}-{rank + 1:05}-of-{ranks:05}.safetensors"
            cut = {name: rows for name, t in tensors.items() if (rows := _rows(t, rank, ranks)) is not None}
            if not cut:
                continue
            for name, rows in cut.items():
                layout[part][name]["pieces"].append([file, list(rows.offsets), list(rows.shape)])
            notes = tensorfile.sharding_notes({name: rows.offsets for name, rows in cut.items()})
            files[file] = lambda path, cut=cut, notes=notes: tensorfile.write(path, cut, notes)
    files[LAYOUT] = lambda path: checkpoint.put_text(path, json.dumps(layout))
    files[OPTIMIZER] = lambda path: checkpoint.put_text(path, json.dumps(plain, allow_nan=False))
    files[TRAINER] = lambda path: _trainer(snapshot, path)
    integrity.commit(target, files, {**facts, "format": integrity.SHARDED, "ranks": ranks})


def _rows(stored: Stored, rank: int, ranks: int) -> Rows | None:
    """A rank's part; None where it has none. The first has what cannot be cut."""
    if not stored.shape or 0 in stored.shape:
        return Rows(stored, 0, stored.shape[0] if stored.shape else 1) if rank == 0 else None
    first, last = Layout(stored.shape[0], ranks, rank).own
    return Rows(stored, first, last) if first < last else None


def _exchange(snapshot: Snapshot) -> dict[str, Any]:
    return {"exchange": snapshot.content.exchange} if snapshot.content.exchange else {}


def _trainer(snapshot: Snapshot, path: Path) -> None:
    checkpoint.put_text(path, json.dumps(flatten(snapshot.trainer)[0], allow_nan=False))


def _as_stored(stored: Stored) -> Stored:
    return stored


def config_of(snapshot: Snapshot) -> RunConfig:
    """The configuration that a checkpoint was saved with; settings that its tare did not have yet at their defaults."""
    saved, where = snapshot.trainer["config"], str(snapshot.folder / TRAINER)
    return build(
        [
            Given(f"{section}.{name}", value, where)
            for section, values in saved.items()
            for name, value in values.items()
            if f"{section}.{name}" in PATHS
        ]
    )


def _model(snapshot: Snapshot, out: Path) -> None:
    """As the run writes it at its end."""
    from tare.train import session

    config = config_of(snapshot)
    job = session.build(replace(config, run=replace(config.run, device="cpu")), {})
    checkpoint.restore_weights(job.model, snapshot, job.base)
    with integrity.appearing(out) as place:
        session.save_model(job, place)
