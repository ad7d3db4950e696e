"""Checkpoints: everything a run needs to go on as if it had never stopped, as safetensors and JSON. Nothing is pickled.

`step-N/` holds `weights.safetensors`, `optimizer.safetensors` + `optimizer.json` (any nesting of tensors and plain values) and
`trainer.json` (counters, random states, configuration); `train.integrity` makes each folder whole or absent.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tare.core.errors import CheckpointError
from tare.core.weights import plain_parts
from tare.train import integrity

WEIGHTS, TENSORS, OPTIMIZER, TRAINER = "weights.safetensors", "optimizer.safetensors", "optimizer.json", "trainer.json"
SLACK = 1 << 20  # headers, JSON and folder entries, in the free-space check
_NAME = re.compile(r"step-(0|[1-9]\d*)")
_SPECIAL = {math.inf: "inf", -math.inf: "-inf"}


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, read back. `skipped`: why newer ones could not be used, one line each."""

    step: int
    folder: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    skipped: tuple[str, ...] = ()


def save(
    folder: Path,
    step: int,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    trainer: dict[str, Any],
    facts: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder/step-N`, then delete what is no longer kept.

    Args:
        folder: the run's `checkpoints/`; made if missing, but not its parent.
        step: number of finished steps.
        weights: name -> tensor, each storage once.
        optimizer: `optimizer.state_dict()`: tensors of any dtype, numbers, texts, None, lists, tuples, dicts.
        trainer: the rest, of the same plain values.
        facts: stated in the manifest; `eval_loss` there decides which checkpoint is the best.
        keep: newest checkpoints kept, at least 2, so that one damaged file never costs the run; the best is kept besides.

    Raises:
        CheckpointError: no space, or not writable; older checkpoints are untouched.
        TypeError: a state that is no plain value; it names where.
    """
    plain, tensors = flatten(optimizer)
    rest, extra = flatten(trainer)
    if extra:
        raise TypeError(f"trainer state holds tensors: {', '.join(extra)}; give lists")
    files = {OPTIMIZER: json.dumps(plain, allow_nan=False), TRAINER: json.dumps(rest, allow_nan=False)}
    try:
        folder.mkdir(exist_ok=True)
    except OSError as fault:  # the run's folder itself has vanished, or may no longer be written
        raise CheckpointError(f"{folder}: cannot be written ({fault.strerror}); the checkpoint is not saved") from fault
    needed = nbytes(weights) + nbytes(tensors) + sum(map(len, files.values())) + SLACK
    integrity.require_space(folder, needed, f"the checkpoint of step {step}")
    target = folder / f"step-{step}"
    if target.exists():  # same step after a resume, or a damaged one that was passed over: never written over in place
        integrity.remove(target)
    integrity.commit(
        target,
        {
            WEIGHTS: lambda path: _save_tensors(weights, path),
            TENSORS: lambda path: _save_tensors(tensors, path),
            OPTIMIZER: lambda path: _write(path, files[OPTIMIZER]),
            TRAINER: lambda path: _write(path, files[TRAINER]),
        },
        {"step": step, "torch": str(torch.__version__), **(facts or {})},
    )
    prune(folder, keep)
    return target


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint by name, newest first; whether they are intact is not asked."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(named, reverse=True)


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
    faults: list[str] = []
    for step, path in found(folder):
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


def load(path: Path, step: int, skipped: tuple[str, ...] = ()) -> Snapshot:
    """Read one checkpoint, verified first. Raises `CheckpointError`, naming the file that is at fault."""
    manifest = integrity.verify(path)
    for name in (WEIGHTS, TENSORS, OPTIMIZER, TRAINER):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path / name}: missing from the checkpoint")
    if manifest.get("step") != step:
        raise CheckpointError(
            f"{path}: holds step {manifest.get('step')}; the folder was renamed or copied from elsewhere"
        )
    name = OPTIMIZER
    try:
        optimizer = unflatten(json.loads((path / OPTIMIZER).read_text("utf-8")), _load_tensors(path / TENSORS))
        name = TRAINER
        trainer = unflatten(json.loads((path / TRAINER).read_text("utf-8")), {})
    except (KeyError, TypeError, ValueError, RecursionError) as fault:
        raise CheckpointError(f"{path / name}: damaged ({type(fault).__name__}: {fault})") from fault
    return Snapshot(step, path, _load_tensors(path / WEIGHTS), optimizer, trainer, skipped)


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree of plain values and tensors as JSON values plus named tensors; `unflatten` gives back an equal tree.

    >>> flatten({"lr": 0.1, "betas": (0.9, 0.999), 0: [None, torch.ones(2)]})
    ({'$dict': [['lr', 0.1], ['betas', {'$tuple': [0.9, 0.999]}], [0, [None, {'$tensor': '0.1'}]]]}, {'0.1': tensor([1., 1.])})
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, where: str) -> Any:
        if isinstance(node, Tensor):
            tensors[where] = node.detach()
            return {"$tensor": where}
        if isinstance(node, float) and not math.isfinite(node):
            return {"$float": _SPECIAL.get(node, "nan")}
        if node is None or type(node) in (bool, int, float, str):
            return node
        if type(node) in (list, tuple):
            items = [walk(item, f"{where}.{index}".lstrip(".")) for index, item in enumerate(node)]
            return items if type(node) is list else {"$tuple": items}
        if isinstance(node, dict) and all(type(key) in (str, int) for key in node):
            pairs = [[key, walk(item, f"{where}.{key}".lstrip("."))] for key, item in node.items()]
            simple = all(isinstance(key, str) and not key.startswith("$") for key in node)
            return dict(pairs) if simple else {"$dict": pairs}
        raise TypeError(f"state {where or 'tree'}: a {type(node).__name__} cannot be checkpointed; use plain values")

    return walk(tree, ""), tensors


def unflatten(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`. Raises KeyError, TypeError or ValueError if the two parts do not belong together."""
    if isinstance(plain, list):
        return [unflatten(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "$tensor" in plain:
        return tensors[plain["$tensor"]]
    if "$float" in plain:
        return float(plain["$float"])
    if "$tuple" in plain:
        return tuple(unflatten(item, tensors) for item in plain["$tuple"])
    if "$dict" in plain:
        return {key: unflatten(item, tensors) for key, item in plain["$dict"]}
    return {key: unflatten(item, tensors) for key, item in plain.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer of a model by name, tied ones once; of an int8 weight its codes and scales."""
    saved = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    named = [*model.named_parameters(), *buffers.items()]
    return {part: inner.detach() for name, tensor in named for part, inner in plain_parts(name, tensor).items()}


def restore_weights(model: nn.Module, snapshot: Snapshot) -> None:
    """Copy the weights into the model, in place. Raises `CheckpointError` unless names, shapes and dtypes are the same."""
    own = weights_of(model)
    where = snapshot.folder / WEIGHTS
    for name in sorted(own.keys() ^ snapshot.weights.keys()):
        side = "the checkpoint lacks" if name in own else "the model lacks"
        raise CheckpointError(f"{where}: belongs to another model: {side} {name!r}")
    for name, tensor in own.items():
        kept = snapshot.weights[name]
        if (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            was, now = (f"{list(t.shape)} {str(t.dtype)[6:]}" for t in (kept, tensor))
            raise CheckpointError(f"{where}: belongs to another model: {name!r} is {was} there, {now} here")
        tensor.copy_(kept)


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    # The tensors are views of the mapped file, so reading costs no memory: who keeps them copies them.
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"{path}: damaged ({str(fault).splitlines()[0]})") from fault


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
