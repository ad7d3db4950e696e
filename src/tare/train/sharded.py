"""Checkpoints of runs whose weights are cut across ranks (FSDP2): every rank writes its own part, and any kind of run reads it back.

All ranks call these together. They need one folder that all of them see. Of the state of an optimizer, what lies like its leaf is
saved in its boxes, and what one rank owns is saved by that one; together it is the state of one process, so a checkpoint fits any number
of ranks, plain modules and DDP. On loading each rank reads only what it will hold.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tare.core.errors import CheckpointError
from tare.core.optimizer import Optimizer
from tare.core.shard import layout
from tare.train import checkpoint, integrity, tensorfile
from tare.train.base import NONE, Base
from tare.train.checkpoint import Snapshot, Stage
from tare.train.stored import OPTIMIZER, TRAINER, Stored
from tare.train.trees import flatten


def is_sharded(model: nn.Module) -> bool:
    """Whether any weight of a model is cut across ranks."""
    return any(map(layout.is_sharded, model.parameters()))


def save(folder: Path, step: int, **parts: Any) -> Path:
    """Write `folder/step-N` together with all other ranks: `prepare`, and what it returns, at once."""
    return prepare(folder, step, **parts)()


def prepare(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Any,
    trainer: dict[str, Any],
    facts: dict[str, Any] | None = None,
    keep: int = 2,
    group: Any = None,
    stage: Stage | None = None,
    base: Base = NONE,
) -> Callable[[], Path]:
    """Take down this rank's part of a checkpoint; the function returned writes it, on whichever thread, on all ranks together.

    Args:
        folder: the run's `checkpoints/`, seen by all ranks; made by the first if missing, but not its parent.
        step: number of finished steps.
        model, optimizer: any model after `fully_shard`, any optimizer on it whose state are tensors and plain values.
        trainer: the rest, plain values; the first rank's are saved.
        facts, keep: as of `checkpoint.prepare`; of the first rank.
        group: for what ranks have to tell each other; a writer in the background needs one of its own (gloo). None: the default one.
        stage: as of `checkpoint.prepare`.
        base: weights that are left out, and stated in the manifest.

    Raises:
        CheckpointError: no space, not writable, ranks that disagree on plain state. On every rank, from the function.
        TypeError: a state that is no plain value; it names where.
    """
    from tare.train.dcp import STATE_PART, WEIGHTS_PART, Cut

    plain, state = flatten(named_state(model, optimizer))
    rest, extra = flatten(trainer)
    if extra:
        raise TypeError(f"trainer state holds tensors: {', '.join(extra)}; give lists")
    parts = {WEIGHTS_PART: checkpoint.weights_of(model, base.names), STATE_PART: state}
    cuts = {f"{part}/{name}": Cut.of(t) for part, tensors in parts.items() for name, t in tensors.items()}
    tensorfile.check({name: cut.local for name, cut in cuts.items()})
    if stage is not None:
        copies = stage({name: cut.local for name, cut in cuts.items()})
        cuts = {name: Cut(copies[name], cut.offsets, cut.shape) for name, cut in cuts.items()}
    return lambda: _write(folder, step, cuts, plain, rest, checkpoint.stated(step, facts, base), keep, group)


def _write(
    folder: Path,
    step: int,
    cuts: dict[str, Any],
    plain: dict[str, Any],
    rest: Any,
    facts: dict[str, Any],
    keep: int,
    group: Any,
) -> Path:
    from torch.distributed import checkpoint as stock
    from torch.distributed.checkpoint.api import CheckpointException

    from tare.train.dcp import Planner, Writer

    target = folder / f"step-{step}"
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    planner = Planner(plain)

    def texts(whole: dict[str, Any]) -> dict[str, str]:
        return {OPTIMIZER: json.dumps(whole, allow_nan=False), TRAINER: json.dumps(rest, allow_nan=False)}

    writer = Writer(target, planner, texts, facts, rank, size)
    try:
        stock.save(cuts, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as fault:
        raise _told(target, fault) from fault
    except (RuntimeError, OSError) as fault:  # a rank is gone
        line = str(fault).strip().partition("\n")[0][:160]
        raise CheckpointError(
            f"{target}: could not be saved: a rank is gone ({line}); what was saved before is intact"
        ) from fault
    finally:
        if writer.temporary is not None:
            shutil.rmtree(writer.temporary, ignore_errors=True)  # not there any more, where all went well
    if rank == 0:
        checkpoint.prune(folder, keep)
    return target


def _told(target: Path, fault: Any) -> CheckpointError:
    """One line for what went wrong on one or more ranks: the lowest one's, in its own words if it is ours."""
    rank, (error, _) = min(fault.failures.items())
    if isinstance(error, CheckpointError):
        return CheckpointError(str(error))
    return CheckpointError(
        f"{target}: could not be saved: {integrity.why(error)} (rank {rank}); what was saved before is intact"
    )


def named_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state by names of leaves: `state`, `param_groups` as in `state_dict`, and `order`, the leaf of each number."""
    order = leaves_of(model, optimizer)
    whole = optimizer.state_dict()
    state = {order[number]: raw for number, raw in whole["state"].items()}
    return {"state": state, "param_groups": whole["param_groups"], "order": order}


def latest(folder: Path, crew: Any) -> Snapshot | None:
    """The newest intact checkpoint, the same on all of the workers of a run. crew: a `parallel.group.Crew`."""
    return checkpoint.load_latest(folder) if crew.size == 1 else load_latest(folder, crew.control)


def load_latest(folder: Path, group: Any = None) -> Snapshot | None:
    """The newest checkpoint that verifies, the same on all ranks, which share the reading of its files; None if there is none at all.

    Without a process group it is `checkpoint.load_latest`. Raises the same on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return checkpoint.load_latest(folder)
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def load(path: Path, step: int, skipped: tuple[str, ...]) -> Snapshot:
        snapshot, fault = None, None
        try:
            snapshot = checkpoint.load(path, step, skipped, rank, size)
        except CheckpointError as error:
            fault = error
        newer = isinstance(fault, integrity.NewerFormat)
        rows: list[Any] = [None] * size
        dist.all_gather_object(rows, (str(fault) if fault else None, newer), group=group)
        for text, newer in rows:
            if text is not None:
                raise (integrity.NewerFormat if newer else CheckpointError)(text)
        assert snapshot is not None
        return snapshot

    box = [[(step, str(path)) for step, path in checkpoint.found(folder)]]
    dist.broadcast_object_list(box, 0 if group is None else dist.get_global_rank(group, 0), group=group)
    return checkpoint.newest([(step, Path(path)) for step, path in box[0]], load)


@torch.no_grad()
def restore(model: nn.Module, optimizer: Any, snapshot: Snapshot, base: Base = NONE) -> None:
    """Put a checkpoint of either kind into a model and an optimizer, plain ones or cut across ranks. No rank waits for another.

    base: as of `checkpoint.restore_weights`.

    Raises `CheckpointError` where they do not belong together; the model is untouched unless reading itself fails.
    """
    restore_model(model, snapshot, base)
    restore_optimizer(model, optimizer, snapshot)


@torch.no_grad()
def restore_model(model: nn.Module, snapshot: Snapshot, base: Base = NONE) -> None:
    """The weights alone."""
    from torch.distributed import checkpoint as stock

    from tare.train.dcp import WEIGHTS_PART, Reader

    if not is_sharded(model):
        checkpoint.restore_weights(model, snapshot, base)
        return
    own = checkpoint.wanted(model, snapshot.content, base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no rank needs another for this
        stock.load(dict(own), storage_reader=Reader(snapshot.content, WEIGHTS_PART), no_dist=True)


@torch.no_grad()
def restore_optimizer(model: nn.Module, optimizer: Any, snapshot: Snapshot) -> None:
    """The optimizer's state alone: of each leaf what this rank holds of it. Raises `CheckpointError` where it is another method's."""
    content = snapshot.content
    numbers: dict[Any, int] = {name: number for number, name in enumerate(leaves_of(model, optimizer))}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if content.state and not content.state.keys() <= numbers.keys():
        if all(type(leaf) is int for leaf in content.state):  # saved without names
            numbers = {content.order[number]: number for number in content.order}
        else:
            missing = sorted(map(str, content.state.keys() - numbers.keys()))[0]
            raise CheckpointError(
                f"{content.folder / OPTIMIZER}: belongs to another model: it has state of {missing!r}"
            )
    state = {}
    for leaf, raw in content.state.items():
        state[numbers[leaf]] = _taken(optimizer, params[numbers[leaf]], raw)
    groups = _numbered(content.groups, content.order, numbers)
    optimizer.load_state_dict({"state": dict(sorted(state.items())), "param_groups": groups})


def leaves_of(model: nn.Module, optimizer: Any) -> list[str]:
    """The leaf of each number in the optimizer's groups, by the model's name for it."""
    names = {p: name for name, p in model.named_parameters()}
    found = [names.get(p) for group in optimizer.param_groups for p in group["params"]]
    if None in found:
        raise TypeError("optimizer: a parameter is none of the model's; checkpoints go by their names")
    return [str(name) for name in found]


def _numbered(groups: list[dict[str, Any]], order: dict[int, Any], numbers: dict[Any, int]) -> list[dict[str, Any]]:
    """Saved groups with the numbers that their leaves have here, and numbers for tensors read."""
    found = []
    for group in groups:
        made = {key: value.whole() if isinstance(value, Stored) else value for key, value in group.items()}
        leaves = [order[number] for number in group["params"]]
        found.append({**made, "params": [numbers.get(leaf, leaf) for leaf in leaves]})
    return found


def _taken(optimizer: Any, p: Tensor, raw: dict[str, Any]) -> dict[str, Any]:
    """What this rank holds of a leaf's state."""
    copied = not isinstance(
        optimizer, Optimizer
    )  # torch's keep what they are given, and that lies in a file mapped read-only
    entry = getattr(optimizer, "_entries", {}).get(p)
    place = getattr(entry, "place", None)
    if place is not None:  # of ours: where the leaf is stepped, its state is
        return {name: _like(p, value, place.lies, copied) for name, value in place.take(raw).items()}
    shape = tuple(p.shape)
    return {
        name: _like(p, value, isinstance(value, Stored) and value.shape == shape, copied) for name, value in raw.items()
    }


def _like(p: Any, value: Any, cut: bool, copied: bool) -> Any:
    """A stored tensor read: whole, or the part that lies where the parameter's does."""
    if isinstance(value, dict):
        return {key: _like(p, item, cut, copied) for key, item in value.items()}
    if not isinstance(value, Stored):
        return value
    if not cut or not layout.is_sharded(p):
        found = value.whole()
        return found.clone() if copied else found
    from tare.train.dcp import box_of

    sizes, offsets = box_of(value.shape, p.device_mesh, p.placements)
    local = value.read(offsets, sizes).to(p.to_local().device, copy=copied)
    return layout.distributed(local, value.shape, p.device_mesh, p.placements)
