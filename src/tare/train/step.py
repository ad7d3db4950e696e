"""One optimizer step: micro-batches, the check that everything is finite, clipping, the update. A bad step changes nothing."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tare.core.clipping import NotFinite, factor_for, norm_of
from tare.core.shard.layout import local
from tare.parallel.wrap import squares
from tare.plan.activations import autocast
from tare.train.session import Session
from tare.zeroth.exchange import WorkersFailed
from tare.zeroth.optimizer import ForwardOptimizer


@dataclass(frozen=True)
class Outcome:
    """`loss`: mean over the step's tokens; `grad_norm`: before clipping; `clip_factor`: what gradients were multiplied by, None
    without a limit; `problem`: why the step was skipped; `tokens`: of the step's batch, without padding; `forwards`: forward passes
    of a method without gradients, over micro-batches.

    `grad_norm` is None where release mode sums projected gradients over micro-batches and does not clip, and without gradients.
    """

    loss: float
    grad_norm: float | None
    clip_factor: float | None = None
    problem: str = ""
    tokens: int = 0
    forwards: int = 0


def take_step(job: Session, position: int) -> Outcome:
    """Step on the `accumulate x batch` sequences from `position` on. The learning rate has been set.

    The loss is the mean over micro-batches of equal size, so its gradient is that of the whole batch at once. If the loss or
    the gradient norm is not finite, weights and optimizer state stay as they were. (In release mode without two-pass clipping the
    leaves that were stepped before the bad gradient appeared keep their step, on a GPU also those after it, and bases that were
    computed ahead of the step stay; no bad value is ever written.)
    """
    train = job.config.train
    starts = range(position, position + train.accumulate * train.batch, train.batch)
    if isinstance(job.optimizer, ForwardOptimizer):
        return _step_forward(job, job.optimizer, starts)
    parts, tokens = _dealt(job, starts)
    return replace(_step_back(job, [partial(_loss, job, *part) for part in parts]), tokens=tokens)


def _step_forward(job: Session, optimizer: ForwardOptimizer, starts: range) -> Outcome:
    """A step on losses alone. Every evaluation in it sees the same batches; one that is not finite skips the step.

    starts: where each micro-batch begins. Workers that share the data take their part of each.
    """
    train, crew = job.config.train, job.crew
    each, forwards, held = train.batch // crew.parts, 0, list[Any]()

    def closure() -> Tensor:
        nonlocal forwards
        if not held:  # in here, so that the other workers hear of it if it fails
            held.extend(job.order.batch(start + crew.part * each, each).to(job.device) for start in starts)
        total = torch.zeros((), device=job.device)
        for batch in held:
            forwards += 1
            with autocast(train.precision, job.device.type):
                total = total + job.objective(batch).float()
        return total / len(held)

    try:
        loss, problem = optimizer.step(closure), ""
    except NotFinite as fault:
        loss, problem = math.nan, str(fault)
    tokens = crew.parts * sum(map(_tokens, held))
    if problem:
        return Outcome(loss, None, problem=problem, tokens=tokens, forwards=forwards)
    problem = "" if math.isfinite(loss) else "the loss of a probe is not finite"
    return Outcome(loss, None, problem=problem, tokens=tokens, forwards=forwards)


def _tokens(batch: Any) -> int:
    return int(batch.numel() if isinstance(batch, Tensor) else batch.tokens)


def _step_back(job: Session, losses_of: list[Callable[[], Tensor]]) -> Outcome:
    """A step with gradients. losses_of: each micro-batch's share of the loss. Processes decide alike: all they go by is of all of them."""
    train, optimizer = job.config.train, job.optimizer
    try:
        losses = optimizer.backward(*losses_of)
        if job.config.method.release:
            optimizer.step()
            assert optimizer.clipped is not None
            norm, factor = optimizer.clipped.norm, optimizer.clipped.factor
            _require_finite(norm)
        else:
            norm, factor = _clip((p.grad for p in job.model.parameters() if p.grad is not None), train.clip)
            optimizer.step()
        (loss,) = job.crew.sums(sum(map(float, losses)) / job.crew.size)
        return Outcome(loss, norm, None if train.clip is None else factor)
    except NotFinite as fault:
        job.spread.drop()
        return Outcome(math.nan, None, problem=str(fault))
    finally:
        optimizer.zero_grad(set_to_none=True)  # and what earlier micro-batches of a dropped step have gathered


def _dealt(job: Session, starts: range) -> tuple[list[tuple[Any, float, bool]], int]:
    """This process's part of each micro-batch, with its weight in the mean over processes, and whether it is the last; and all tokens.

    A loss is a mean over rows, tokens or answers. Where processes have unequal numbers of them the weight is own number x processes / all,
    so that what they average is the mean over the whole micro-batch. A fault in reading is heard by all.
    """
    crew, each = job.crew, job.config.train.batch // job.crew.parts
    held, fault = list[Any](), None
    try:
        held = [job.order.batch(start + crew.part * each, each).to(job.device) for start in starts]
        counts = [float(sum(map(_tokens, held))), *(float(job.count(batch)) for batch in held)]
    except Exception as error:
        fault, counts = error, [0.0] * (1 + len(starts))
    failed, tokens, *totals = crew.sums(float(fault is not None), *counts)
    if fault is not None:
        raise fault
    if failed:
        raise WorkersFailed("another worker could not read its part of a batch, its own message says why", told=True)
    weights = [own * crew.size / total for own, total in zip(counts[1:], totals, strict=True)]
    return [
        (batch, weight, at == len(held)) for at, (batch, weight) in enumerate(zip(held, weights, strict=True), 1)
    ], int(tokens)


def _loss(job: Session, batch: Any, weight: float, last: bool) -> Tensor:
    """This process's share of a micro-batch's loss, which processes average. Raises `NotFinite` for that of all, hence on all."""
    train, crew = job.config.train, job.crew
    job.spread.micro_batch(last)
    with autocast(train.precision, job.device.type):
        loss = job.loss(batch)
    loss = loss if weight == 1.0 else loss * weight
    (whole,) = crew.sums(float(loss.detach()) / crew.size)
    if not math.isfinite(whole):
        raise NotFinite(f"the loss is {whole}")
    return loss / train.accumulate


def _clip(gradients: Iterable[Tensor], limit: float | None) -> tuple[float, float]:
    """The norm of all gradients, and the factor by which they now are smaller. Raises `NotFinite`, `RuntimeError` for none."""
    found = list(gradients)
    if not found:
        raise RuntimeError("backward gave no gradient to any parameter")
    norm = norm_of(squares(found))
    _require_finite(norm)
    factor = factor_for(norm, limit)
    if factor < 1.0:
        for gradient in found:
            local(gradient).mul_(factor)
    return norm, factor


def _require_finite(norm: float | None) -> None:
    if norm is not None and not math.isfinite(norm):
        raise NotFinite(f"the gradient norm is {norm}")


def finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())) and not bool(tensor.isfinite().all()):
            return name
    return None
