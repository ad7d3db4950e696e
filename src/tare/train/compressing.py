"""Compressing: what the processes of a DDP run send in place of whole gradients: `train.compress`, a hook of `parallel.hooks`."""

from typing import TYPE_CHECKING, Any

from tare.core.errors import InputError
from tare.train.config import RunConfig

if TYPE_CHECKING:
    from tare.parallel.hooks import Hook
    from tare.train.session import Session
    from tare.train.stored import Content

_OPTIONS = {"fraction": "compress_fraction", "rank": "compress_rank", "start": "compress_start"}


def check(config: RunConfig) -> None:
    """Raise `InputError` where a settled configuration wants gradients compressed and nothing would be, or something else with it."""
    from tare.parallel import hooks

    train, kind = config.train, config.train.compress
    given = {name: getattr(train, setting) for name, setting in _OPTIONS.items() if getattr(train, setting) is not None}
    if kind is None:
        if given:
            setting = _OPTIONS[next(iter(given))]
            raise InputError(
                f"train.{setting}: set, but nothing is compressed; set train.compress too, or leave it out"
            )
        return
    if train.parallel != "ddp":
        what = (
            "forward passes send no gradients"
            if train.parallel is None
            else f"{train.parallel} exchanges gradients by itself"
        )
        raise InputError(f"train.compress: {what}; it goes with train.parallel ddp")
    if config.method.release:
        raise InputError("train.compress: method.release steps inside backward, leaf by leaf; set method.release false")
    if train.sync == "batch" and train.accumulate > 1:
        raise InputError(
            "train.compress: gradients are compressed once a step; leave train.sync out, or set it to step"
        )
    if kind == "projected":
        if given:
            raise InputError(f"train.{_OPTIONS[next(iter(given))]}: projected has no options; leave it out")
        if train.clip is not None:
            raise InputError(
                "train.clip: with train.compress projected no process has whole gradients, whose norm it limits; set train.clip none"
            )
        return
    try:
        hooks.build(kind, **given)
    except InputError as fault:
        raise InputError(
            f"train.{fault}" if str(fault).startswith("compress") else f"train.compress: {fault}"
        ) from None


def attach(job: "Session") -> "Hook | None":
    """Register the hook on the DDP model of a session, if it wants one. Raises `InputError` where the method does not allow it."""
    from tare.parallel import hooks

    train = job.config.train
    if train.compress is None:
        return None
    options: dict[str, Any] = {name: getattr(train, setting) for name, setting in _OPTIONS.items()}
    if job.spread.form != "ddp":
        raise InputError(
            f"train.compress: gradients of {job.config.method.key} with these settings are sent leaf by leaf; leave train.compress out"
        )
    seed = None if train.compress == "projected" else job.config.run.seed
    try:
        hook = hooks.build(train.compress, **options, seed=seed, optimizer=job.optimizer)
        return hook.attach(job.spread.module)
    except InputError as fault:
        raise InputError(f"train.compress: {fault}") from None


def state_of(job: "Session") -> dict[str, Any] | None:
    """What the hook keeps on all processes, on the first one. All call it together."""
    return job.spread.hook.gather_state() if job.spread.hook is not None else None


def restore(job: "Session", content: "Content") -> list[str]:
    """Give the hook what a checkpoint has of it; returns a line where that is nothing, or of another hook.

    Raises `CheckpointError` where it does not fit.
    """
    hook = job.spread.hook
    if hook is None or hook.kind == "projected":
        return []
    held = content.exchange
    if held.get("hook") != hook.kind:
        what = f"is of {held['hook']}" if held else "has nothing"
        return [
            f"train.compress: the checkpoint {what} that {hook.kind} could go on from; gradients not sent before are lost"
        ]
    hook.load_state_dict({name: value.whole() if hasattr(value, "whole") else value for name, value in held.items()})
    return []
