"""One optimizer step: micro-batches, the check that everything is finite, clipping, the update. A bad step changes nothing."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tare.core.clipping import NotFinite, factor_for, norm_of, squared_norm
from tare.plan.activations import autocast, causal_loss
from tare.train.session import Session


@dataclass(frozen=True)
class Outcome:
    """`loss`: mean over the step's tokens; `grad_norm`: before clipping; `clip_factor`: what gradients were multiplied by, None
    without a limit; `problem`: why the step was skipped.

    `grad_norm` is None only where release mode sums projected gradients over micro-batches and does not clip.
    """

    loss: float
    grad_norm: float | None
    clip_factor: float | None = None
    problem: str = ""


def take_step(job: Session, position: int) -> Outcome:
    """Step on the `accumulate x batch` sequences from `position` on. The learning rate has been set.

    The loss is the mean over micro-batches of equal size, so its gradient is that of the whole batch at once. If the loss or
    the gradient norm is not finite, weights and optimizer state stay as they were. (In release mode without two-pass clipping the
    leaves that were stepped before the bad gradient appeared keep their step, on a GPU also those after it, and bases that were
    computed ahead of the step stay; no bad value is ever written.)
    """
    train, optimizer = job.config.train, job.optimizer
    try:
        starts = range(position, position + train.accumulate * train.batch, train.batch)
        losses = optimizer.backward(*(partial(_loss, job, start) for start in starts))
        if job.config.method.release:
            optimizer.step()
            assert optimizer.clipped is not None
            norm, factor = optimizer.clipped.norm, optimizer.clipped.factor
            _require_finite(norm)
        else:
            norm, factor = _clip((p.grad for p in job.model.parameters() if p.grad is not None), train.clip)
            optimizer.step()
        return Outcome(sum(map(float, losses)), norm, None if train.clip is None else factor)
    except NotFinite as fault:
        return Outcome(math.nan, None, problem=str(fault))
    finally:
        optimizer.zero_grad(set_to_none=True)  # and what earlier micro-batches of a dropped step have gathered


def _loss(job: Session, position: int) -> Tensor:
    """The share of one micro-batch in the loss. Raises `NotFinite`."""
    train = job.config.train
    tokens = job.order.batch(position, train.batch).to(job.device)
    with autocast(train.precision, job.device.type):
        loss = causal_loss(job.model, tokens)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NotFinite(f"the loss is {value}")
    return loss / train.accumulate


def _clip(gradients: Iterable[Tensor], limit: float | None) -> tuple[float, float]:
    """The norm of all gradients, and the factor by which they now are smaller. Raises `NotFinite`, `RuntimeError` for none."""
    found = list(gradients)
    if not found:
        raise RuntimeError("backward gave no gradient to any parameter")
    norm = norm_of([squared_norm(gradient) for gradient in found])
    _require_finite(norm)
    factor = factor_for(norm, limit)
    if factor < 1.0:
        for gradient in found:
            gradient.mul_(factor)
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
