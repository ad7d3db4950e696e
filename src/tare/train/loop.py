"""`train`: a configuration in, a run folder and a `Result` out; fresh or resumed.

The order here is what keeps promises: take the folder, build everything, check that it fits, and only then write.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tare.kernels import gemm
from tare.train import checkpoint, integrity, metrics, progress, restarts, run, session, sharded, workers
from tare.train.config import RunConfig
from tare.train.progress import OnEvent, ignore
from tare.train.trainer import Counters, Trainer, begin
from tare.train.workers import Crew


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses are those of the last evaluation, sizes are bytes, `seconds` wall time over all resumes.

    `interrupted`: stopped by a signal before its end, saved, and ready to be resumed. `history`: the lines of `metrics.jsonl`.
    `scores`: accuracy and f1 of a task at the last evaluation; `zero_shot`: before the first step. `forwards`: forward passes of a
    method without gradients, evaluations apart. `workers`: processes that shared the steps; of these `forwards` and `sent`, bytes sent,
    are those of the first.
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
    workers: int = 1
    sent: int = 0

    @property
    def predicted_peak(self) -> int | None:
        return self.predicted.get("peak")

    @property
    def measured_peak(self) -> int | None:
        return self.measured.get("peak")


def train(config: RunConfig, *, on_event: OnEvent = ignore) -> Result:
    """Train a language model as configured, in its run folder; resume it if `config.run.resume`.

    Started by torchrun, all processes take the same steps together, see `train.workers`; the first writes the folder.

    Args:
        config: the job. What it leaves open (method `auto`, presets, threads) is decided and saved with the run.
        on_event: is told what happens, see `train.progress`; in the first process.

    Raises:
        InputError: bad settings, data, model or output folder; nothing is left in the output folder.
        DoesNotFit: the plan says that the budget does not suffice.
        CheckpointError: nothing to resume, damaged or foreign checkpoints, or no space to save.
        Diverged: too many steps in a row were not finite.
        Elsewhere: another worker raises what is wrong.
    """
    with workers.join(config) as crew:
        return _train(config, crew, on_event if crew.first else ignore)


def _train(config: RunConfig, crew: Crew, on_event: OnEvent) -> Result:
    folder: run.RunFolder | None = None
    snapshot, warnings, task = None, list[str](), None
    predicted: dict[str, int] = {}
    working = lambda text: on_event(progress.Working(text))  # noqa: E731
    try:
        config = crew.share(
            lambda: restarts.going_on(config)
        )  # worker 0 decides: on another machine is another launcher
        with crew.together():
            folder = run.RunFolder(config.run.out, config.run.resume, own=crew.first)
        with crew.together():
            if config.run.resume:  # each reads its part of the files and all know whether they are intact
                snapshot = sharded.latest(folder.checkpoints, crew)
        with crew.together():
            if crew.first:
                config, warnings = _settled(config, snapshot, crew)
        config = crew.share(lambda: config)
        with session.threads(config.run.threads or 1):
            with crew.together():
                if crew.first:
                    task = session.open_task(config, working)
                    predicted = session.check_budget(config, task, crew)
            gemm.pin(crew.share(gemm.decided))
            with crew.together():
                job = session.build(config, predicted, working, task, crew)
                counters = Counters()
                if snapshot is not None:
                    warnings += session.restore(job, snapshot)
                    counters = _counters(snapshot.trainer["counters"])
                if crew.first:
                    _require_space(job, folder)
            resumed = snapshot.folder if snapshot else None
            snapshot = None  # what it held has been copied
            with crew.together():
                if crew.first:
                    begin(job, folder, counters, resumed, warnings, on_event)
                done = Trainer(job, folder, counters, on_event).run()
            return _result(job, folder, counters, interrupted=not done)
    except BaseException:
        if folder is not None:
            folder.abandon()
        raise
    finally:
        if folder is not None:
            folder.close()


def _settled(config: RunConfig, snapshot: checkpoint.Snapshot | None, crew: Crew) -> tuple[RunConfig, list[str]]:
    """The configuration with nothing left open, and what there is to warn of."""
    saved = snapshot.trainer["config"] if snapshot else {}
    config = workers.enlist(session.resolve(run.inherit(saved, config), crew), crew)
    warnings = [*(snapshot.skipped if snapshot else ()), *run.changes(saved, config)]
    if snapshot is not None:
        size = snapshot.trainer.get("workers", 1)
        before = workers.parts_of(saved["train"], size)
        after = workers.parts_of(asdict(config.train), crew.size)
        if before != after:
            warnings.append(
                f"batches were cut into {before} parts and now are into {after}: the run goes on, but means are rounded differently"
            )
    alone = [name for name in ("workers", "parallel") if getattr(config.train, name) is not None]
    if crew.size == 1 and alone and not snapshot:
        warnings.append(
            f"train.{alone[0]}: there is one process only; start several with --nproc N, or torchrun --nproc-per-node N"
        )
    if config.run.tensorboard:
        metrics.writer_class()
    return config, warnings


def _counters(saved: dict[str, Any]) -> Counters:
    """Counters from a checkpoint, also one of an older tare that knew fewer."""
    return Counters(**{spec.name: saved[spec.name] for spec in fields(Counters) if spec.name in saved})


def _require_space(job: session.Session, folder: run.RunFolder) -> None:
    """Room for what is kept, one checkpoint more (the old ones go last), the best one, and the model."""
    weights = checkpoint.nbytes(checkpoint.weights_of(job.model))
    one = weights - job.base.nbytes + int(job.optimizer.state_bytes())
    missing = max(job.config.run.keep, 2) + 2 - len(checkpoint.found(folder.checkpoints))
    integrity.require_space(folder.path, max(missing, 1) * one + weights, "checkpoints and model")


def _result(job: session.Session, folder: run.RunFolder, now: Counters, interrupted: bool) -> Result:
    return Result(
        out=folder.path, method=job.config.method.key, steps=now.step, loss=now.eval_loss,
        perplexity=now.eval_perplexity, eval_tokens=now.eval_tokens, tokens=now.tokens,
        tokens_per_second=now.tokens_per_second, state_bytes=int(job.optimizer.state_bytes()),
        predicted=job.predicted, measured=now.measured, seconds=now.seconds, skipped=now.skipped,
        interrupted=interrupted, config=job.config, history=metrics.read(folder.metrics),
        scores=now.scores, zero_shot=now.zero_shot, forwards=now.forwards, workers=job.crew.size, sent=now.sent,
    )  # fmt: skip
