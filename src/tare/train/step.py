"""One optimizer step: micro-batches, the check that everything is finite, clipping, the update. A bad step changes nothing."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tare.plan.activations import autocast, causal_loss
from tare.train.session import Session


@dataclass(frozen=True)
class Outcome:
    """`loss`: mean over the step's tokens; `grad_norm`: before clipping, None in release mode; `problem`: why it was skipped."""

    loss: float
    grad_norm: float | None
    problem: str = ""


class NotFinite(Exception):
    """A gradient in release mode is not finite; raised inside backward, before its leaf is stepped."""


def take_step(job: Session, position: int) -> Outcome:
    """Step on the `accumulate x batch` sequences from `position` on. The learning rate has been set.

    The loss is the mean over micro-batches of equal size, so its gradient is that of the whole batch at once. If the loss or
    the gradient norm is not finite, weights and optimizer state stay as they were. (In release mode the leaves that were stepped
    before the bad gradient appeared keep their step; no bad value is ever written.)
    """
    train, optimizer = job.config.train, job.optimizer
    total = 0.0
    try:
        for micro in range(train.accumulate):
            tokens = job.order.batch(position + micro * train.batch, train.batch).to(job.device)
            with autocast(train.precision, job.device.type):
                loss = causal_loss(job.model, tokens)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value}")
            total += value / train.accumulate
            last = micro == train.accumulate - 1
            with nullcontext() if last else optimizer.accumulating():
                (loss / train.accumulate).backward()
        norm = None if job.config.method.release else _grad_norm(job.model)
        if norm is not None and not math.isfinite(norm):
            raise NotFinite(f"the gradient norm is {norm}")
        if norm is not None and train.clip is not None:
            gradients = (p for p in job.model.parameters() if p.grad is not None)
            torch.nn.utils.clip_grads_with_norm_(gradients, train.clip, torch.tensor(norm))
        optimizer.step()
        return Outcome(total, norm)
    except NotFinite as fault:
        return Outcome(math.nan, None, str(fault))
    finally:
        optimizer.zero_grad(set_to_none=True)  # and what earlier micro-batches of a dropped step have gathered


@contextmanager
def guarded(job: Session) -> Iterator[None]:
    """In release mode, look at every gradient before its leaf is stepped: afterwards it would be too late."""

    def check(name: str) -> object:
        def hook(grad: Tensor) -> None:
            # The sum is finite exactly when every entry is (overflow aside), and needs no temporary.
            if not math.isfinite(float(grad.sum())):
                raise NotFinite(f"the gradient of {name} is not finite")

        return hook

    handles = []
    if job.config.method.release:
        named = [(name, p) for name, p in job.model.named_parameters() if p.requires_grad]
        handles = [p.register_hook(check(name)) for name, p in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())) and not bool(tensor.isfinite().all()):
            return name
    return None


def _grad_norm(model: nn.Module) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        raise RuntimeError("backward gave no gradient to any parameter")
    return float(torch.nn.utils.get_total_norm(gradients))
