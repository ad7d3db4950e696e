"""The calendar of a run: step, evaluate, save, stop when asked, and in the end write the model.

Everything that the next step depends on is in `Counters`, the weights, the optimizer's state and the random generators, and all of
it is in every checkpoint. Data order and learning rate are functions of the counters.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from json import dumps
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from tare import __version__
from tare.core.errors import InputError
from tare.parallel.group import Crew
from tare.parallel.wrap import differing
from tare.plan.budget import format_bytes, parse_bytes
from tare.plan.measure import StepMeter
from tare.plan.models import parameter_count
from tare.train import (
    adapters,
    checkpoint,
    compressing,
    heartbeat,
    progress,
    restarts,
    seedlog,
    session,
    spikes,
    workers,
)
from tare.train.evaluate import evaluate
from tare.train.identity import identity
from tare.train.memory_advice import advising
from tare.train.metrics import Metrics, Silent
from tare.train.run import RunFolder
from tare.train.saving import Saver, in_background
from tare.train.schedule import set_lr
from tare.train.seedlog import RunLog
from tare.train.seeds import arithmetic, random_state
from tare.train.session import Session
from tare.train.signals import StopSignals
from tare.train.step import Outcome, finite, take_step
from tare.zeroth.optimizer import ForwardOptimizer

METERED = 2  # the first steps are measured: step 0 computes bases, step 1 is an ordinary one


class Diverged(InputError):
    """The loss, the gradients or the weights are no longer finite. What was saved before is intact."""


@dataclass
class Counters:
    """Where a run stands; plain numbers, saved in every checkpoint."""

    step: int = 0  # finished steps, skipped ones included
    tokens: int = 0
    position: int = 0  # sequences taken from the training data
    skipped: int = 0  # steps that were not finite
    streak: int = 0  # of these, in a row until now
    seconds: float = 0.0  # wall time of all processes of this run
    timed_seconds: float = 0.0  # of steps that were not measured: measuring slows them
    timed_tokens: int = 0
    evaluated: int = 0  # step of the last evaluation; 0 = none
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    eval_tokens: int = 0
    measured: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)  # of a task, at the last evaluation
    zero_shot: dict[str, float] = field(default_factory=dict)  # and before the first step
    forwards: int = 0  # forward passes of a method without gradients, by this process
    sent: int = 0  # bytes sent to other workers, by this process
    recent: list[float] = field(default_factory=list)  # losses that a spike is told by; empty where none is looked for
    rollbacks: int = 0  # ways back from spikes

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0


class Trainer:
    """Runs a session from where its counters stand to the end, or to a signal."""

    def __init__(self, job: Session, folder: RunFolder, counters: Counters, on_event: progress.OnEvent) -> None:
        self.job, self.folder, self.now, self.tell, self.crew = job, folder, counters, on_event, job.crew
        self.config = job.config
        self.steps = job.config.train.steps
        self.saved = counters.step
        self._sent = job.crew.bytes_sent  # up to the last step
        self._backs = 0  # to the last checkpoint
        own = job.config.run
        held = checkpoint.held_weights(job.model, job.base.names)
        copy = checkpoint.nbytes(held) + int(job.optimizer.state_bytes())
        if job.spread.form == "fsdp":  # all write, and all decide alike
            copy = max(self.crew.gather(copy)) * self.crew.on_host
        background = in_background(own.checkpoint_async, job.device, own.budget, copy)
        self.saver = Saver(folder.checkpoints, job.model, job.optimizer, own.keep, background, job.base)
        self.seeds: RunLog | None = None
        self.log: Metrics | Silent

    def run(self) -> bool:
        """Train; False if a signal stopped it before the end. Raises `Diverged`, `CheckpointError`."""
        first, optimizer, done = self.crew.first, self.job.optimizer, False
        board = self.config.run.tensorboard
        self.log = Metrics(self.folder.metrics, board, self.now.step) if first else Silent()
        if isinstance(optimizer, ForwardOptimizer) and first:
            self.seeds = optimizer.on_step = RunLog(self.folder.path / seedlog.NAME, self._warn)
        started, before = time.monotonic(), self.now.seconds
        try:
            with StopSignals() as signals, advising(self.job, self.now):
                if self.job.task is not None and not self.now.step:
                    self._evaluate()
                while True:
                    self.now.seconds = before + time.monotonic() - started
                    stop = self.crew.agree(signals.stop)
                    self._note(self.saver.finished())
                    evaluating, saving = (
                        self._due(every) for every in (self.config.run.eval_every, self.config.run.checkpoint_every)
                    )
                    if not stop and evaluating and self.now.evaluated != self.now.step:
                        self._evaluate()
                    if (stop or saving) and self.saved != self.now.step:
                        self._save()
                    if stop:
                        self._note(self.saver.close())
                        return False
                    if self.now.step >= self.steps:
                        done = self._finish()
                        self._note(self.saver.close())
                        return True
                    if evaluating or saving:
                        self.crew.agree()  # the others wait here for the first, not in the middle of a step
                    self._step()
        finally:
            self.saver.wait()
            if self.seeds is not None:
                self.seeds.close(seal=done)
            self.log.close()

    def _finish(self) -> bool:
        whole = session.whole_model(self.job)
        if self.crew.first:
            self.folder.write_model(lambda place: session.save_model(self.job, place, whole))
            self.tell(progress.Saved(self.now.step, self.folder.model))
        return True

    def _warn(self, text: str) -> None:
        self.log.write("warning", self.now.step, text=text)
        self.tell(progress.Warned(text))

    def _due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due now."""
        step = self.now.step
        return step > 0 and (step % every == 0 or step >= self.steps)

    def _step(self) -> None:
        now, train = self.now, self.config.train
        began = time.monotonic()
        heartbeat.note(now.step + 1)
        lr = set_lr(self.job.optimizer, self.job.peaks, self.job.schedule(now.step))
        metered = now.step < METERED
        measure = metered and (self.crew.first or not self.job.forward_only)
        meter = StepMeter(self.job.model, self.job.optimizer, self.job.device) if measure else None
        with meter or nullcontext():
            outcome = take_step(self.job, now.position)
        taken = time.monotonic() - began
        count = train.batch * train.accumulate
        now.step += 1
        now.position += count
        now.tokens += outcome.tokens
        now.forwards += outcome.forwards
        sent, self._sent = self.crew.bytes_sent - self._sent, self.crew.bytes_sent
        sent += self.job.spread.sent(train.accumulate, self.crew.size)
        now.sent += sent
        if not metered:
            now.timed_seconds += taken
            now.timed_tokens += outcome.tokens
        if meter is not None:
            self._measured(meter.peak)
        if outcome.problem:
            self._bad(outcome)
            return
        now.streak = 0
        if train.spike is not None and self._spiked(outcome.loss):
            return
        passes = {"forwards": now.forwards} if self.seeds is not None else {}
        if self.crew.size > 1:
            passes["sent"] = sent
        self.log.write(
            "step", now.step, loss=outcome.loss, lr=lr, grad_norm=outcome.grad_norm, clip_factor=outcome.clip_factor,
            tokens=now.tokens, seconds=taken, **passes,
        )  # fmt: skip
        rate = now.tokens_per_second or outcome.tokens / taken
        each = now.timed_seconds / max(1, now.step - METERED)
        left = (self.steps - now.step) * each if now.timed_tokens else None
        self.tell(
            progress.StepDone(
                now.step, self.steps, outcome.loss, lr, outcome.grad_norm, now.tokens, rate, self._memory(),
                self.job.predicted.get("peak"), left, now.forwards if self.seeds is not None else None, now.skipped,
            )
        )  # fmt: skip

    def _bad(self, outcome: Outcome) -> None:
        now, limit = self.now, self.config.train.max_bad_steps
        now.skipped += 1
        now.streak += 1
        self.log.write("skip", now.step, reason=outcome.problem, streak=now.streak)
        self.tell(progress.Skipped(now.step, outcome.problem, now.streak, limit))
        if now.streak >= limit:
            raise Diverged(
                f"step {now.step}: {outcome.problem}, {now.streak} steps in a row (train.max_bad_steps); "
                "lower method.lr or raise train.warmup, and look at the data"
            )

    def _spiked(self, loss: float) -> bool:
        """Whether the loss was a spike and the run went back to its checkpoint; all workers decide alike. Raises `Diverged`."""
        now, train = self.now, self.config.train
        spike, step = spikes.look(loss, now.recent, train), now.step
        if not self.crew.agree(spike is not None):
            return False
        if self._backs >= train.spike_limit:
            raise Diverged(
                f"step {step}: {spike or 'a spike of another worker'}, after going back to step {self.saved} {self._backs} times "
                "(train.spike_limit); lower method.lr, look at the data, or set train.spike higher, and resume"
            )
        self.saver.wait()
        back = spikes.go_back(self.job, self.folder.checkpoints, now)
        if back is None:
            self._warn(f"step {step}: {spike}, and there is no checkpoint yet to go back to (run.checkpoint_every)")
            now.recent.append(loss)
            return False
        self._backs += 1
        self.saved = back.step
        self.log.cut(back.step, now.evaluated)
        if self.seeds is not None:
            self.seeds.close(seal=False)
            self.seeds = self.job.optimizer.on_step = RunLog(self.folder.path / seedlog.NAME, self._warn)  # type: ignore[attr-defined]
        what = {"spiked": step, "usual": spike.usual, "loss": spike.loss} if spike else {"spiked": step}
        self.log.write("rollback", back.step, **what, left_out=[back.first, back.last])
        self._warn(
            f"step {step}: {spike or 'a spike of another worker'}; back to the checkpoint of step {back.step}, and on without the "
            f"{back.last - back.first} sequences since"
        )
        return True

    def _evaluate(self) -> None:
        train, now, task = self.config.train, self.now, self.job.task
        if self.job.forward_only and not self.crew.first:
            return
        crew = None if self.job.forward_only else self.crew
        own = workers.local(self.config, crew or Crew()).train.batch  # as much at a time as in training
        shared = (crew, self.job.spread.in_step)
        if task is not None:
            found = task.evaluate(self.job.model, self.job.device, train.precision, own, *shared)
            now.evaluated, now.eval_loss, now.scores = now.step, found.loss, found.numbers()
            now.zero_shot = now.zero_shot if now.step else now.scores
            self.log.write("eval", now.step, loss=found.loss, examples=found.examples, **now.scores)
            self.tell(progress.Evaluated(now.step, found.loss, None, 0, now.scores, found.examples))
            return
        batches = self.job.corpus.eval_batches(own)
        result = evaluate(self.job.model, batches, self.job.device, train.precision, False, *shared)
        now.evaluated, now.eval_tokens = now.step, result.tokens
        now.eval_loss, now.eval_perplexity = result.loss, result.perplexity
        self.log.write("eval", now.step, loss=result.loss, perplexity=result.perplexity, tokens=result.tokens)
        self.tell(progress.Evaluated(now.step, result.loss, result.perplexity, result.tokens))

    def _save(self) -> None:
        now, last, loss = self.now, self.saved, self.now.eval_loss
        spread = self.job.spread
        same = spread.form in ("ddp", "leaves") or spread.repeated > 1
        if same and (other := differing(self.job.model, self.crew, spread.shards)):
            raise Diverged(
                f"step {now.step}: the weights of worker {other[0]} are not those of worker {other[0] % spread.shards} (first at "
                f"{other[1]}); not saved: resume from the checkpoint of step {last}, and look for what one process does alone"
            )
        exchange = compressing.state_of(self.job)
        of_all = self.crew.gather(random_state()) if self.crew.size > 1 and not self.job.forward_only else []
        self.saved, self._backs = now.step, 0
        if not (self.crew.first or self.saver.sharded):
            return
        bad = finite(checkpoint.held_weights(self.job.model))
        if self.crew.agree(bad is not None) if self.saver.sharded else bad:
            raise Diverged(
                f"step {now.step}: the weight {bad or 'of another worker'} is no longer finite; not saved, the checkpoints before are "
                "intact; lower method.lr and resume"
            )
        self.log.sync()  # a resumed run counts on the lines up to its checkpoint
        if self.seeds is not None:
            self.seeds.sync()
        config = asdict(self.config)
        facts = {
            "tare": __version__,
            "world_size": self.crew.size,
            "config_sha256": sha256(dumps(config, sort_keys=True).encode()).hexdigest(),
            "method": self.config.method.key,
            "eval_loss": loss if now.evaluated == now.step and loss is not None and isfinite(loss) else None,
        }
        trainer = {
            "counters": asdict(now),
            "config": config,
            "random": random_state(),
            "scheduler": {"step": now.step},
            "arithmetic": arithmetic(self.job.device),
            "workers": self.crew.size,
            **({"random_of_workers": of_all} if of_all else {}),
            **identity(self.job),
        }
        self.saver.save(now.step, trainer, facts, exchange)
        self._note(self.saver.finished())

    def _note(self, written: list[tuple[int, Path]]) -> None:
        """Say which checkpoints are whole and in their place."""
        for step, place in written:
            self.log.write("checkpoint", step, path=str(place.relative_to(self.folder.path)))
            self.tell(progress.Saved(step, place))

    def _measured(self, peak: int) -> None:
        """Keep the highest peak so far, of all workers that step with gradients, and after the last measured step say what was found."""
        now, model = self.now, self.job.model
        peak = max(self.crew.gather(peak)) if not self.job.forward_only else peak
        if peak >= now.measured.get("peak", 0):
            weights = checkpoint.nbytes(checkpoint.held_weights(model))
            state = int(self.job.optimizer.state_bytes())
            now.measured = {"weights": weights, "state": state, "rest": peak - weights - state, "peak": peak}
        if now.step == min(METERED, self.steps):
            self._compare_with_budget()
            self.log.write("memory", now.step, measured=now.measured, predicted=self.job.predicted)
            self.tell(progress.Measured(now.step, now.measured, self.job.predicted))

    def _compare_with_budget(self) -> None:
        budget = self.config.run.budget
        if budget is not None and self.now.measured["peak"] > parse_bytes(budget):
            text = f"the measured peak, {format_bytes(self.now.measured['peak'])}, is above the budget of {budget}"
            self._warn(text)

    def _memory(self) -> int:
        """Highest bytes so far: the allocator's on CUDA, else what the measured steps needed."""
        if self.job.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.job.device)
        return self.now.measured.get("peak", 0)


def begin(
    job: Session, folder: RunFolder, counters: Counters, resumed: Path | None, warnings: list[str], tell: Any
) -> None:
    """Write the configuration, cut the log back to where the run goes on, and say so."""
    from tare.train.metrics import truncate

    if resumed:
        checkpoint.set_aside(folder.checkpoints, counters.step)
    truncate(folder.metrics, *((counters.step, counters.evaluated) if resumed else (-1, -1)))
    restarts.mark(folder.path)
    folder.write_config(job.config)
    log = Metrics(folder.metrics)
    if resumed:
        log.write("resume", counters.step, path=str(resumed.relative_to(folder.path)))
        tell(progress.Note(f"resumed at step {counters.step} from {resumed}"))
    for text in job.task.notes if job.task is not None else []:
        tell(progress.Note(text))
    if job.forward_only:
        tell(progress.Note("forward passes only: dropout off (eval mode), one batch for all probes of a step"))
    if job.config.model.quantize is not None:
        tell(progress.Note(f"linear layers held as {job.config.model.quantize}; the model is saved dequantised"))
    for text in adapters.notes(job.config, job.model, job.optimizer):
        tell(progress.Note(text))
    if job.crew.size > 1:
        tell(progress.Note(workers.note(job.config, job.crew)))
    if job.spread.hook is not None:
        tell(progress.Note(f"gradients go between processes as {job.spread.hook.describe()}"))
    for text in warnings:
        log.write("warning", counters.step, text=text)
        tell(progress.Warned(text))
    log.close()
    tell(
        progress.Started(
            job.config.model.name, job.config.method.key, parameter_count(job.model), counters.step,
            job.config.train.steps, int(job.optimizer.state_bytes()), folder.path, job.predicted,
        )
    )  # fmt: skip
