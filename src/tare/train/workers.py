"""Workers: the processes of `torchrun` as one run, and how they share its steps.

Methods with gradients share the batch (`train.parallel`: ddp, fsdp, hsdp); forward-only ones share a step's points or its batch
(`train.workers`) and send each other losses, never weights or gradients. Worker 0 alone writes the run's folder and shows what happens.
What goes wrong on one ends all, and one of them says why.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tare.core.errors import InputError
from tare.methods import registry
from tare.parallel import group
from tare.parallel.group import Crew, Elsewhere
from tare.train import compressing, heartbeat
from tare.train.config import RunConfig, TrainConfig
from tare.zeroth.exchange import Workers
from tare.zeroth.optimizer import ForwardOptimizer

__all__ = ["Crew", "Elsewhere", "attach", "enlist", "join", "local", "note", "parts_of"]
NAMES = {"ddp": "DDP", "fsdp": "FSDP2", "hsdp": "HSDP"}


@contextlib.contextmanager
def join(config: RunConfig) -> Iterator[Crew]:
    """The workers of a run, see `parallel.group.join`; while inside they watch each other for signs of life."""
    with group.join(config.run.device) as crew, heartbeat.beating(config.run.patience):
        yield crew


def enlist(config: RunConfig, crew: Crew) -> RunConfig:
    """Checks that a resolved configuration can be shared out, and gives it back with `train.parallel` or `train.workers` settled.

    Raises `InputError` for settings of the other kind of method, for methods that share nothing, and for batches that do not divide.
    """
    key, train = config.method.key, config.train
    forward = registry.card(key).kind == "forward"
    if config.run.resume and train.parallel != "hsdp":
        train = replace(train, shards=None)  # of the run as it was
    _check_settings(key, train, forward)
    if crew.size == 1:
        return config
    if not forward:
        _check_batch(train, crew.size)
        _check_shards(train, crew.size)
        kind = train.parallel or ("ddp" if train.shards is None else "fsdp" if train.shards == crew.size else "hsdp")
        shards = train.shards if kind == "hsdp" else None
        settled = replace(config, train=replace(train, parallel=kind, shards=shards))
        compressing.check(settled)
        return settled
    compressing.check(config)
    if "exchange" not in registry.options(key):
        able = [name for name in registry.keys("forward") if "exchange" in registry.options(name)]
        raise InputError(
            f"method {key!r} shares no points, and workers (torchrun) share the losses of forward passes alone; start it without "
            f"torchrun, or use one of {', '.join(able)}"
        )
    shares = train.workers or "points"
    if shares == "data":
        _check_batch(train, crew.size, " (train.workers: data)")
    return replace(config, train=replace(train, workers=shares))


def _check_settings(key: str, train: TrainConfig, forward: bool) -> None:
    if forward and train.parallel is not None:
        raise InputError(
            f"train.parallel: {key} makes no gradients that {train.parallel} could send; its processes share losses: set train.workers "
            "(--workers points or data) instead"
        )
    if not forward and train.workers is not None:
        raise InputError(
            f"train.workers: {key} steps with gradients; set train.parallel (--parallel ddp, fsdp or hsdp) instead"
        )
    if train.shards is not None and (forward or train.parallel in ("ddp", "fsdp")):
        what = f"{key} makes no gradients" if forward else f"goes with hsdp, not with {train.parallel}"
        raise InputError(f"train.shards: {what}; leave it out, or set train.parallel to hsdp")


def _check_batch(train: TrainConfig, size: int, why: str = "") -> None:
    if train.batch < size:
        raise InputError(
            f"train.batch: {train.batch} sequences are fewer than the {size} processes that share them{why}; give {size} or a multiple of "
            f"it, or start at most {train.batch}"
        )
    if train.batch % size:
        raise InputError(
            f"train.batch: {train.batch} sequences do not divide among {size} workers{why}; give a multiple of {size}"
        )


def _check_shards(train: TrainConfig, size: int) -> None:
    if train.parallel == "hsdp" and train.shards is None:
        raise InputError(
            "train.shards: missing; hsdp cuts the weights among so many processes and repeats that: give a divisor of the "
            f"{size} processes"
        )
    if train.shards is not None and size % train.shards:
        allowed = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        raise InputError(f"train.shards: {train.shards} does not divide the {size} processes; allowed: {allowed}")


def parts_of(train: dict[str, Any], size: int) -> int:
    """How many parts the batches of a run are cut into. train: of its settled configuration; size: its processes."""
    return size if train.get("workers") == "data" or train.get("parallel") is not None else 1


def local(config: RunConfig, crew: Crew) -> RunConfig:
    """The configuration as far as one worker's memory goes: with its own part of the batch."""
    if crew.size == 1 or parts_of({"workers": config.train.workers, "parallel": config.train.parallel}, crew.size) == 1:
        return config
    return replace(config, train=replace(config.train, batch=config.train.batch // crew.size))


def attach(crew: Crew, config: RunConfig, optimizer: Any) -> None:
    """Let the workers share a built optimizer's steps. Raises `InputError` where it asks for fewer points than there are workers."""
    if crew.size == 1:
        return
    if not isinstance(optimizer, ForwardOptimizer):
        crew.shares = "data"
        return
    crew.shares = config.train.workers or "points"
    crew.exchange = Workers(crew.parts)
    optimizer.exchange = crew.exchange
    with contextlib.closing(optimizer.probe.ask(0, {"lr": float(optimizer.param_groups[0]["lr"])})) as asking:
        points = len(next(asking))
    if crew.shares == "points" and points < crew.size:
        raise InputError(
            f"train.workers: {crew.size} workers share the points of a step, and {config.method.key} asks for {points}: start fewer, share "
            "the data (--workers data), or set an option for more points (n, members)"
        )


def note(config: RunConfig, crew: Crew) -> str:
    """A line for the run's beginning."""
    train = config.train
    if train.parallel is None:
        what = "the points of a step" if crew.shares == "points" else "every batch"
        return f"{crew.size} workers share {what}; they send each other losses, no weights and no gradients"
    each = train.batch // crew.size
    cut = f", weights cut among {train.shards or crew.size}" if train.parallel != "ddp" else ""
    return f"{crew.size} processes by {NAMES[train.parallel]}{cut}: each takes {each} of the {train.batch} sequences of a batch"
