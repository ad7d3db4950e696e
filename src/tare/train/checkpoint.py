"""Checkpoints: everything a run needs to go on as if it had never stopped, as safetensors and JSON. Nothing is pickled.

`step-N/` holds `weights.safetensors`, `optimizer.safetensors` + `optimizer.json` (any nesting of tensors and plain values) and
`trainer.json` (counters, random states, configuration); `train.integrity` makes each folder whole or absent. A run whose weights are
cut across ranks writes them in pieces (`train.sharded`); what is read back here may be of either kind.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.errors import CheckpointError
from tare.core.shard.layout import local
from tare.core.weights import plain_parts
from tare.train import integrity, tensorfile
from tare.train.base import NONE, Base, left_out
from tare.train.stored import OPTIMIZER, TENSORS, TRAINER, WEIGHTS, Content, open_content
from tare.train.trees import flatten

SLACK = 1 << 20  # headers, JSON and folder entries, in the free-space check
_NAME = re.compile(r"step-(0|[1-9]\d*)")
Stage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds; tensors are read when they are asked for. `skipped`: why newer ones could not be used, one line each."""

    step: int
    content: Content
    skipped: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.content.folder

    @property
    def trainer(self) -> dict[str, Any]:
        return self.content.trainer

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All weights, whole: views of the mapped file, or on the CPU where a checkpoint has them in pieces."""
        return {name: stored.whole() for name, stored in self.content.weights.items()}

    @cached_property
    def optimizer(self) -> dict[str, Any]:
        """The optimizer's `state_dict()`, whole, as `weights`."""
        return self.content.state_dict()


def save(folder: Path, step: int, **parts: Any) -> Path:
    """Write `folder/step-N`, then delete what is no longer kept: `prepare`, and what it returns, at once."""
    return prepare(folder, step, **parts)()


def prepare(
    folder: Path,
    step: int,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    trainer: dict[str, Any],
    facts: dict[str, Any] | None = None,
    keep: int = 2,
    stage: Stage | None = None,
    base: Base = NONE,
) -> Callable[[], Path]:
    """Take down what a checkpoint is to hold; the function returned writes it, on whichever thread.

    Args:
        folder: the run's `checkpoints/`; made if missing, but not its parent.
        step: number of finished steps.
        weights: name -> tensor, each storage once.
        optimizer: `optimizer.state_dict()`: tensors of any dtype, numbers, texts, None, lists, tuples, dicts.
        trainer: the rest, of the same plain values.
        facts: stated in the manifest; `eval_loss` there decides which checkpoint is the best.
        keep: newest checkpoints kept, at least 2, so that one damaged file never costs the run; the best is kept besides.
        stage: copies tensors, for a writer that runs while they change; None: they are written as they are then.
        base: weights of the model that are not among these, stated in the manifest.

    Raises:
        CheckpointError: no space, or not writable; older checkpoints are untouched. Here, or from the function.
        TypeError: a state that is no plain value; it names where.
    """
    plain, tensors = flatten(optimizer)
    rest, extra = flatten(trainer)
    if extra:
        raise TypeError(f"trainer state holds tensors: {', '.join(extra)}; give lists")
    tensorfile.check(weights)
    tensorfile.check(tensors)
    texts = {OPTIMIZER: json.dumps(plain, allow_nan=False), TRAINER: json.dumps(rest, allow_nan=False)}
    make(folder)
    needed = nbytes(weights) + nbytes(tensors) + sum(map(len, texts.values())) + SLACK
    integrity.require_space(folder, needed, f"the checkpoint of step {step}")
    target = folder / f"step-{step}"
    held = {WEIGHTS: weights, TENSORS: tensors}
    if stage is not None:
        both = stage({f"{file}/{name}": tensor for file, part in held.items() for name, tensor in part.items()})
        held = {file: {name: both[f"{file}/{name}"] for name in part} for file, part in held.items()}

    def write() -> Path:
        integrity.commit(
            target,
            {
                WEIGHTS: lambda path: tensorfile.write(path, held[WEIGHTS]),
                TENSORS: lambda path: tensorfile.write(path, held[TENSORS]),
                OPTIMIZER: lambda path: put_text(path, texts[OPTIMIZER]),
                TRAINER: lambda path: put_text(path, texts[TRAINER]),
            },
            stated(step, facts, base),
        )
        prune(folder, keep)
        return target

    return write


def make(folder: Path) -> None:
    """The folder of checkpoints, if it is not there yet. Raises `CheckpointError` where the run's own has vanished."""
    try:
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            integrity.sync(folder.parent)
    except OSError as fault:  # the run's folder itself has vanished, or may no longer be written
        raise CheckpointError(f"{folder}: cannot be written ({fault.strerror}); the checkpoint is not saved") from fault


def stated(step: int, facts: dict[str, Any] | None, base: Base) -> dict[str, Any]:
    """What the manifest of a checkpoint says besides its files."""
    return {"step": step, "torch": str(torch.__version__), **(facts or {}), **base.facts}


def step_of(name: str) -> int | None:
    """The step that the name of a checkpoint's folder states; None where it is no such name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint by name, newest first; whether they are intact is not asked."""
    if not folder.is_dir():
        return []
    named = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None]
    return sorted(named, reverse=True)


def set_aside(folder: Path, step: int) -> None:
    """Give checkpoints newer than the one that a run goes on from, damaged ones, another name: they are not to count as kept.

    `step-7` becomes `step-7.damaged`, which nothing reads; one of an earlier time goes. Raises `CheckpointError` where it cannot be.
    """
    for newer, path in found(folder):
        if newer > step:
            try:
                shutil.rmtree(aside := path.with_name(f"{path.name}.damaged"), ignore_errors=True)
                path.rename(aside)
            except OSError as fault:
                raise CheckpointError(f"{path}: is damaged and cannot be set aside ({fault.strerror})") from fault


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `max(keep, 2)` and the one with the smallest evaluation loss."""
    losses = {}
    for _, path in found(folder):
        try:
            loss = integrity.read_manifest(path).get("eval_loss")
        except CheckpointError:
            continue
        if isinstance(loss, float):
            losses[path] = loss
    best = min(losses, key=lambda path: losses[path]) if losses else None
    for _, path in found(folder)[max(keep, 2) :]:
        if path != best:
            integrity.remove(path)


def load_latest(folder: Path) -> Snapshot | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Raises:
        integrity.NewerFormat: the newest was written by a later tare.
        CheckpointError: there are checkpoints and every one is damaged; the message names the newest's damage.
    """
    return newest(found(folder), load)


def newest(
    candidates: list[tuple[int, Path]], load: Callable[[Path, int, tuple[str, ...]], Snapshot]
) -> Snapshot | None:
    """The first that `load` takes; as `load_latest`."""
    faults: list[str] = []
    for step, path in candidates:
        try:
            return load(path, step, tuple(faults))
        except integrity.NewerFormat:
            raise
        except CheckpointError as fault:
            faults.append(str(fault))
    if faults:
        more = f" (and {len(faults) - 1} older, damaged too)" if len(faults) > 1 else ""
        raise CheckpointError(f"{faults[0]}{more}; no intact checkpoint is left: start again in another run.out")
    return None


def load(path: Path, step: int, skipped: tuple[str, ...] = (), part: int = 0, parts: int = 1) -> Snapshot:
    """Open one checkpoint, verified first. Raises `CheckpointError`, naming the file that is at fault.

    part, parts: of several processes each verifies the content of its part of the files; all must do so before any trusts it.
    """
    manifest = integrity.verify(path, part, parts)
    if manifest.get("step") != step:
        raise CheckpointError(
            f"{path}: holds step {manifest.get('step')}; the folder was renamed or copied from elsewhere"
        )
    return Snapshot(step, open_content(path, manifest, part, parts), skipped)


def weights_of(model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Every parameter and saved buffer of a model by name, tied ones once; of an int8 weight its codes and scales.

    without: names that are left out.
    """
    saved = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    named = [*model.named_parameters(), *buffers.items()]
    found = {part: inner.detach() for name, tensor in named for part, inner in plain_parts(name, tensor).items()}
    return {name: tensor for name, tensor in found.items() if name not in without}


def held_weights(model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """The same, as far as this process has them: of weights that are cut its rows."""
    return {name: local(tensor) for name, tensor in weights_of(model, without).items()}


def restore_weights(model: nn.Module, snapshot: Snapshot, base: Base = NONE) -> None:
    """Copy the weights into the model, in place.

    base: of the model, where the checkpoint may leave it out. Raises `CheckpointError` unless names, shapes and dtypes are the same.
    """
    own = wanted(model, snapshot.content, base)
    for name, tensor in own.items():
        tensor.copy_(snapshot.content.weights[name].whole())


def wanted(model: nn.Module, content: Content, base: Base) -> dict[str, Tensor]:
    """The weights of a model that a checkpoint is to fill. Raises `CheckpointError` where it holds others."""
    try:
        own = weights_of(model, left_out(content.manifest, base))
    except CheckpointError as fault:
        raise CheckpointError(f"{content.folder}: {fault}") from fault
    check_weights(own, content)
    return own


def check_weights(own: dict[str, Tensor], content: Content) -> None:
    """Raise `CheckpointError` unless a checkpoint holds just these weights, in these shapes and dtypes."""
    where = content.folder / (WEIGHTS if not content.sharded else "")
    for name in sorted(own.keys() ^ content.weights.keys()):
        side = "the checkpoint lacks" if name in own else "the model lacks"
        raise CheckpointError(f"{where}: belongs to another model: {side} {name!r}")
    for name, tensor in own.items():
        kept = content.weights[name]
        if (kept.shape, kept.dtype) != (tuple(tensor.shape), tensor.dtype):
            was, now = (f"{list(t.shape)} {str(t.dtype)[6:]}" for t in (kept, tensor))
            raise CheckpointError(f"{where}: belongs to another model: {name!r} is {was} there, {now} here")


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def put_text(path: Path, text: str) -> None:
    """Write a file of text."""
    path.write_text(text, encoding="utf-8")
