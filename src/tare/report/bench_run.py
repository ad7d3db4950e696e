"""One training run of `tare bench quality`: the session and the steps of `tare train`, without its folder, checkpoints and log."""

import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tare.core.errors import InputError
from tare.core.leaf import named_roles
from tare.plan.measure import StepMeter
from tare.train import session
from tare.train.config import RunConfig
from tare.train.evaluate import evaluate
from tare.train.schedule import set_lr
from tare.train.step import take_step
from tare.train.trainer import METERED

INNER = ("linear", "conv", "expert")  # what low-rank methods project, so that its rate is another than the rest's
POINTS = 40  # of the curve that is kept

Tell = Callable[[int, int, float, float], None]  # step, steps, loss, seconds left


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Sizes are bytes.

    loss: token-weighted mean over the held-out tokens; None if it diverged. legacy_loss: the biased one that the published scripts print.
    legacy_loss is None unless asked for. seconds: wall time of the steps that were not metered, scaled to all of them; evaluation and
    start-up do not count.
    """

    status: str  # "done" or "diverged"
    loss: float | None
    legacy_loss: float | None
    eval_tokens: int
    tokens: int
    epochs: float
    seconds: float
    tokens_per_second: float
    state_bytes: int
    measured_peak: int
    predicted_peak: int | None
    curve: list[tuple[int, float]] = field(default_factory=list)
    reason: str = ""


def train_once(
    config: RunConfig, dense_lr: float = 1.0, predict: bool = False, legacy: bool = False,
    tell: Tell = lambda step, steps, loss, left: None,
) -> Outcome:  # fmt: skip
    """Trains as configured and evaluates once, at the end.

    Args:
        config: the run; its folder is not used. Equal configurations give equal numbers on the same machine.
        dense_lr: the learning rate of what is no matrix of the layers, as a multiple of theirs.
        predict: also ask the planner for the peak. legacy: also evaluate as the published scripts do.
        tell: hears of every step.

    Raises:
        InputError: options that do not go together, or data that cannot be read.
    """
    config = session.resolve(config)
    with session.threads(config.run.threads or 1):
        predicted = session.check_budget(config).get("peak") if predict else None
        job = session.build(config, {})
        if dense_lr != 1.0:
            _separate_rates(job, dense_lr)
        try:
            return _train(job, predicted, legacy, tell)
        finally:
            if job.device.type == "cuda":  # the next run's peak is measured from what is held now
                del job
                gc.collect()
                torch.cuda.empty_cache()


def _separate_rates(job: session.Session, factor: float) -> None:
    """Build the optimizer again with two groups, the second at its own learning rate."""
    if job.config.method.lr is None:
        raise InputError("dense_lr: the method has no learning rate to multiply")
    listed = list(named_roles(job.model))
    low = [(name, p) for name, p, role in listed if role in INNER]
    rest = [(name, p, role) for name, p, role in listed if role not in INNER]
    lr = job.config.method.lr
    groups: list[dict[str, Any]] = [{"params": low, "lr": lr}]
    for role in sorted({role for _, _, role in rest}):  # a group for each role, which names alone might not tell
        members = [(name, p) for name, p, r in rest if r == role]
        groups.append({"params": members, "lr": lr * factor, "role": role})
    job.optimizer = session.choice_of(job.config).build(groups, seed=job.config.run.seed)
    job.peaks = [float(group["lr"]) for group in job.optimizer.param_groups]


def _train(job: session.Session, predicted: int | None, legacy: bool, tell: Tell) -> Outcome:
    config = job.config
    train = config.train
    count = train.batch * train.accumulate
    every = max(1, train.steps // POINTS)
    curve: list[tuple[int, float]] = []
    peak, streak, position, timed, reason = 0, 0, 0, 0.0, ""
    recent: list[float] = []
    for step in range(train.steps):
        began = time.perf_counter()
        set_lr(job.optimizer, job.peaks, job.schedule(step))
        metered = step < METERED
        meter = StepMeter(job.model, job.optimizer, job.device) if metered else None
        with meter or contextlib.nullcontext():
            outcome = take_step(job, position)
        position += count
        if meter is not None:
            peak = max(peak, meter.peak)
        else:
            timed += time.perf_counter() - began
        streak = streak + 1 if outcome.problem else 0
        if streak >= train.max_bad_steps:
            reason = f"step {step + 1}: {outcome.problem}, {streak} steps in a row"
            break
        recent.append(outcome.loss)
        if (step + 1) % every == 0:
            curve.append((step + 1, round(sum(recent) / len(recent), 5)))
            recent.clear()
        ordinary = step + 1 - METERED
        left = timed / ordinary * (train.steps - step - 1) if ordinary > 0 else math.inf
        tell(step + 1, train.steps, outcome.loss, left)
    ordinary = max(1, train.steps - METERED)
    rate = ordinary * count * config.data.seq / timed if timed else 0.0
    loss = biased = None
    tokens = 0
    if not reason:
        losses = [
            evaluate(job.model, job.corpus.eval_batches(train.batch), job.device, train.precision, legacy=biased)
            for biased in ((False, True) if legacy else (False,))
        ]
        if math.isfinite(losses[0].loss):
            loss, tokens = losses[0].loss, losses[0].tokens
            biased = losses[1].loss if legacy else None
        else:
            reason = "the evaluation loss is not finite"
    return Outcome(
        status="diverged" if reason else "done", loss=loss, legacy_loss=biased, eval_tokens=tokens,
        tokens=position * config.data.seq, epochs=job.order.epoch(position), seconds=timed * train.steps / ordinary,
        tokens_per_second=0.0 if reason else rate, state_bytes=int(job.optimizer.state_bytes()), measured_peak=peak,
        predicted_peak=predicted, curve=curve, reason=reason,
    )  # fmt: skip
