"""Spreading: how a configuration wants its model laid over processes, and when that is done: around the building of the optimizer."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from tare.core.errors import InputError
from tare.core.leaf import named_roles
from tare.core.weights import is_quantized
from tare.parallel import wrap
from tare.parallel.group import Crew
from tare.parallel.wrap import Spread
from tare.train import compressing
from tare.train.config import RunConfig

if TYPE_CHECKING:
    from tare.train.session import Session


def before(config: RunConfig, model: nn.Module, crew: Crew, device: torch.device) -> Spread:
    """Lay a model over the processes, as far as that comes before its optimizer: cut weights, and hooks that run before the optimizer's.

    Raises `InputError` where the model or the device does not allow it.
    """
    train = config.train
    if crew.size == 1 or train.parallel is None:
        return Spread(model)
    if train.parallel == "ddp":
        return wrap.leaf_by_leaf(model, crew)
    if config.adapter.kind == "prefix":
        raise InputError(
            "adapter.kind: a prefix is made anew at every forward and cannot be cut among processes; use ddp, or lora"
        )
    return wrap.shard(model, crew, device, shards=train.shards, each=train.sync != "step")


def after(job: "Session") -> None:
    """The rest. Averaging leaf by leaf stays where leaves step inside backward, take turns, or are int8; else it is DDP's buckets."""
    if job.spread.form != "leaves":
        return
    train, model = job.config.train, job.model
    experts = next((name for name, _, role in named_roles(model) if role == "expert"), None)
    if job.config.method.release or job.optimizer.trained_sets() or is_quantized(model):
        if experts is not None:
            raise InputError(
                f"train.parallel: {job.config.method.key} with these settings averages gradients leaf by leaf, and {experts} is an expert, "
                "which has none on a process whose rows do not reach it; use method.release false, another method, or one process"
            )
        compressing.attach(job)  # refuses
        return
    job.spread.close()
    partial = experts is not None or not wrap.always_reached(job.loss(job.order.batch(0, 1).to(job.device)), model)
    job.spread = wrap.replicate(model, partial=partial, each=train.sync == "batch")
    job.spread.hook = compressing.attach(job)
