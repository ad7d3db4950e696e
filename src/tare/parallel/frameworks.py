"""Release mode inside loops that are somebody else's: which backward is the last of a step is asked of whoever knows."""

from typing import Any, TypeVar

from tare.core.errors import InputError
from tare.core.optimizer import Optimizer

Any_optimizer = TypeVar("Any_optimizer")


def follow_accelerate(optimizer: Any_optimizer) -> Any_optimizer:
    """Let `accelerate`, and `transformers`' Trainer which runs on it, tell an optimizer in release mode which micro-batches are summed.

    They say so before every backward (`accelerator.accumulate(model)`, `gradient_accumulation_steps`); every backward but the last of a
    step then only gathers, as inside `optimizer.accumulating()`. Without release nothing is to be done, and nothing is.

    Args:
        optimizer: of `tare`, bare or as `accelerator.prepare` gave it back.

    Returns:
        The same.

    Raises:
        InputError: no optimizer of `tare`; a method that needs whole gradients; `accelerate` is not installed.

    >>> import torch, tare
    >>> optimizer = follow_accelerate(tare.AdamW(torch.nn.Linear(4, 2), lr=1e-3, release=True))
    """
    try:
        from accelerate.state import GradientState
    except ImportError:
        raise InputError("follow_accelerate: accelerate is not installed; pip install accelerate") from None
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # within accelerate's own wrapper
    if not isinstance(inner, Optimizer):
        raise InputError(f"follow_accelerate: expected an optimizer of tare, got a {type(inner).__name__}")
    inner.accumulate_while(lambda: not GradientState().sync_gradients)
    return optimizer
