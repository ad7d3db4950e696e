"""`train`: a configuration in, a run folder and a `Result` out; fresh or resumed.

The order here is what keeps promises: take the folder, build everything, check that it fits, and only then write.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tare.train import checkpoint, integrity, metrics, progress, run, session
from tare.train.config import RunConfig
from tare.train.progress import OnEvent, ignore
from tare.train.trainer import Counters, Trainer, begin


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses are those of the last evaluation, sizes are bytes, `seconds` wall time over all resumes.

    `interrupted`: stopped by a signal before its end, saved, and ready to be resumed. `history`: the lines of `metrics.jsonl`.
    `scores`: accuracy and f1 of a task at the last evaluation; `zero_shot`: before the first step. `forwards`: forward passes of a
    method without gradients, evaluations apart.
    """

    out: Path
    method: str
    steps: int
    loss: float | None
    perplexity: float | None
    eval_tokens: int
    tokens: int
    tokens_per_second: float
    state_bytes: int
    predicted: dict[str, int]
    measured: dict[str, int]
    seconds: float
    skipped: int
    interrupted: bool
    config: RunConfig
    history: list[dict[str, Any]]
    scores: dict[str, float] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    forwards: int = 0

    @property
    def predicted_peak(self) -> int | None:
        return self.predicted.get("peak")

    @property
    def measured_peak(self) -> int | None:
        return self.measured.get("peak")


def train(config: RunConfig, *, on_event: OnEvent = ignore) -> Result:
    """Train a language model as configured, in its run folder; resume it if `config.run.resume`.

    Args:
        config: the job. What it leaves open (method `auto`, presets, threads) is decided and saved with the run.
        on_event: is told what happens, see `train.progress`.

    Raises:
        InputError: bad settings, data, model or output folder; nothing is left in the output folder.
        DoesNotFit: the plan says that the budget does not suffice.
        CheckpointError: nothing to resume, damaged or foreign checkpoints, or no space to save.
        Diverged: too many steps in a row were not finite.
    """
    folder = run.RunFolder(config.run.out, config.run.resume)
    try:
        snapshot = checkpoint.load_latest(folder.checkpoints) if config.run.resume else None
        saved = snapshot.trainer["config"] if snapshot else {}
        config = session.resolve(run.inherit(saved, config))
        warnings = [*(snapshot.skipped if snapshot else ()), *run.changes(saved, config)]
        if config.run.tensorboard:
            metrics.writer_class()
        with session.threads(config.run.threads or 1):
            working = lambda text: on_event(progress.Working(text))  # noqa: E731
            task = session.open_task(config, working)
            predicted = session.check_budget(config, task)
            job = session.build(config, predicted, working, task)
            counters = Counters()
            if snapshot is not None:
                warnings += session.restore(job, snapshot)
                counters = _counters(snapshot.trainer["counters"])
            _require_space(job, folder)
            resumed = snapshot.folder if snapshot else None
            del snapshot  # what it held has been copied
            begin(job, folder, counters, resumed, warnings, on_event)
            done = Trainer(job, folder, counters, on_event).run()
            return _result(job, folder, counters, interrupted=not done)
    except BaseException:
        folder.abandon()
        raise
    finally:
        folder.close()


def _counters(saved: dict[str, Any]) -> Counters:
    """Counters from a checkpoint, also one of an older tare that knew fewer."""
    return Counters(**{spec.name: saved[spec.name] for spec in fields(Counters) if spec.name in saved})


def _require_space(job: session.Session, folder: run.RunFolder) -> None:
    """Room for what is kept, one checkpoint more (the old ones go last), the best one, and the model."""
    weights = checkpoint.nbytes(checkpoint.weights_of(job.model))
    one = weights + int(job.optimizer.state_bytes())
    missing = max(job.config.run.keep, 2) + 2 - len(checkpoint.found(folder.checkpoints))
    integrity.require_space(folder.path, max(missing, 1) * one + weights, "checkpoints and model")


def _result(job: session.Session, folder: run.RunFolder, now: Counters, interrupted: bool) -> Result:
    return Result(
        out=folder.path, method=job.config.method.key, steps=now.step, loss=now.eval_loss,
        perplexity=now.eval_perplexity, eval_tokens=now.eval_tokens, tokens=now.tokens,
        tokens_per_second=now.tokens_per_second, state_bytes=int(job.optimizer.state_bytes()),
        predicted=job.predicted, measured=now.measured, seconds=now.seconds, skipped=now.skipped,
        interrupted=interrupted, config=job.config, history=metrics.read(folder.metrics),
        scores=now.scores, zero_shot=now.zero_shot, forwards=now.forwards,
    )  # fmt: skip
