"""Out of memory in the middle of a run, in one line: what the plan said, what was measured, and the smallest change that needs less."""

import contextlib
import gc
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from tare.core.errors import DoesNotFit
from tare.plan.budget import format_bytes
from tare.train import session
from tare.train.session import Session

LESS = 8  # the change that is looked for makes the planned peak smaller by at least one part in so many


class OutOfMemory(DoesNotFit):
    """The system or the device refused memory. What was saved before is intact, and nothing is saved of the broken step."""


def refusal(fault: BaseException) -> str | None:
    """What the allocator said, in one line; None where it is another fault. Torch tells of CUDA by a class, of the CPU by words alone.

    >>> refusal(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"))
    "can't allocate memory: you tried to allocate 64 bytes"
    >>> refusal(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    """
    text = next(iter(str(fault).strip().splitlines()), "")
    if isinstance(fault, torch.OutOfMemoryError):
        return ". ".join(text.split(". ")[:2])
    if isinstance(fault, MemoryError):
        return text or "no memory left"
    at = text.lower().find("can't allocate memory")
    return text[at:] if isinstance(fault, RuntimeError) and at >= 0 else None


@contextlib.contextmanager
def advising(job: Session, now: Any) -> Iterator[None]:
    """Inside, memory that is refused becomes `OutOfMemory`, with the plan's advice. now: the counters of the run."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if (what := refusal(fault)) is None:
            raise
        traceback.clear_frames(fault.__traceback__)  # they hold the tensors of the step
        said, step = f"step {now.step + 1}: out of memory ({what})", now.step
    else:
        return
    fitted = torch.cuda.max_memory_allocated(job.device) if job.device.type == "cuda" else None
    job.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfMemory(
        f"{said}; {_compared(job, now)}; {_advice(job, fitted)}; nothing of this step was saved, and checkpoints up to step {step} are "
        "intact (--resume)"
    )


def _compared(job: Session, now: Any) -> str:
    planned, measured = job.predicted.get("peak"), now.measured.get("peak")
    plan = f"the plan says {format_bytes(planned)}" if planned else "there is no plan"
    return f"{plan}, {f'{format_bytes(measured)} were measured' if measured else 'nothing was measured yet'}"


def _advice(job: Session, fitted: int | None) -> str:
    """The smallest change whose plan is an eighth below what was planned, and below what a device did give."""
    from tare.plan.search import advise

    try:
        planned = session.plan_of(job.config, [job.config.method.key], job.task, job.crew)
        peak = planned.rows[0].peak
        limit = min(peak - peak // LESS, fitted or peak)
        return f"for {format_bytes(limit)}, {advise(planned.settings, [job.config.method.key], limit).text}"
    except Exception:  # there may be too little memory left even to plan
        return "lower --batch or --seq, add --checkpointing or --release, or give --budget, so that it is checked first"
