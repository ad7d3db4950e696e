"""From a configuration to the objects of a run: device, model, data, optimizer; and from a checkpoint back into them.

Touches no files of the run. What a configuration leaves open (the method of `auto`, presets, threads) is decided here, once.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from tare.core.clipping import Strict
from tare.core.errors import CheckpointError, InputError
from tare.core.optimizer import Optimizer
from tare.core.weights import dense_state_dict, is_quantized, quantize_weights_
from tare.kernels import gemm
from tare.methods import registry
from tare.parallel.wrap import Spread, whole_weights
from tare.plan.activations import causal_loss
from tare.plan.models import DTYPES, build_model, enable_checkpointing
from tare.plan.resolve import Choice
from tare.plan.resolve import resolve as resolve_method
from tare.train import adapters, compressing, identity, machine, sharded, spreading
from tare.train.bars import no_bars
from tare.train.base import NONE, Base, base_of
from tare.train.checkpoint import Snapshot
from tare.train.config import RunConfig
from tare.train.quantize import Quantization, check_methods, dense_state, planned
from tare.train.schedule import Schedule
from tare.train.seeds import restore_arithmetic, restore_random_state, seed_everything
from tare.train.workers import Crew, attach, local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tare.plan.activations import Workload
    from tare.plan.api import Plan
    from tare.train.tasks.data import TaskData


@dataclass
class Session:
    """All that a running job works on. `predicted`: bytes by category; `peaks`: each group's peak learning rate.

    `corpus`: text, or the examples of a task; `order`: where the batches of a position come from, the same for a task.
    """

    config: RunConfig
    device: torch.device
    model: nn.Module
    corpus: Any  # Corpus | TaskData
    order: Any  # PackedDataset | TaskData
    optimizer: Optimizer
    schedule: Schedule
    peaks: list[float]
    predicted: dict[str, int] = field(default_factory=dict)
    task: "TaskData | None" = None  # the same again, where it is not text
    crew: Crew = field(default_factory=Crew)
    spread: Spread = field(
        default_factory=lambda: Spread(nn.Identity())
    )  # how the model lies over the crew; `build` says
    base: Base = NONE  # frozen weights that were read, which checkpoints leave out

    @property
    def forward_only(self) -> bool:
        """Whether the method evaluates losses and no gradients."""
        return registry.card(self.config.method.key).kind == "forward"

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch of `order`, differentiable."""
        model = self.spread.module
        return causal_loss(model, batch) if self.task is None else self.task.loss(model, batch)

    def count(self, batch: Any) -> int:
        """How many numbers the loss of a batch is the mean of."""
        return (
            int(batch.numel()) if self.task is None else int(batch.counts.sum() if batch.only_gold else len(batch.gold))
        )

    def objective(self, batch: Any) -> Tensor:
        """What a forward-only method makes smaller on a batch."""
        return causal_loss(self.model, batch) if self.task is None else self.task.objective(self.model, batch)


def open_task(config: RunConfig, progress: Callable[[str], None] | None = None) -> "TaskData | None":
    """The examples of a configuration's task; None where that is text. Raises `InputError` for what is wrong with them."""
    if config.task.name == "lm":
        return None
    from tare.train.tasks.data import open_task as open_

    return open_(config, progress)


def build(
    config: RunConfig, predicted: dict[str, int], progress: Callable[[str], None] | None = None, task: "TaskData | None" = None,
    crew: Crew | None = None,
) -> Session:  # fmt: skip
    """Everything that a resolved configuration names. task: if it has been opened already. crew: the workers that share its steps.

    Raises `InputError` for what is wrong with it, all before step 1.
    """
    from tare.train.data import open_corpus

    crew = crew or Crew()
    device = device_of(crew.device(config.run.device))
    task = task or open_task(config, progress)
    kind, labels = ("causal", None) if task is None else (task.kind, task.outputs)
    cut = crew.size > 1 and config.train.parallel in ("fsdp", "hsdp")
    place = torch.device("cpu") if cut else device  # what is cut goes to the device block by block
    model = build_model(
        config.model.name, dtype=weights_dtype(config), seed=config.run.seed, device=place, kind=kind, labels=labels
    )
    if task is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = task.tokenizer.pad_token_id  # type: ignore[union-attr]
    check_model(model, config)
    quantize(model, config)
    model = adapters.apply(model, config, kind)
    if config.model.checkpointing:
        enable_checkpointing(model)
    # Dropout would add noise to the differences that forward-only methods live on.
    model.train(registry.card(config.method.key).kind == "gradient")
    base = base_of(model, config.model.name)
    spread = spreading.before(config, model, crew, device)
    optimizer = build_optimizer(config, model)
    attach(crew, config, optimizer)
    corpus: Any = task
    order: Any = task
    if task is None:
        corpus = open_corpus(config.data, model.config.vocab_size, config.model.tokenizer, progress)  # type: ignore[union-attr, arg-type]
        order = corpus.dataset(config.run.seed, config.train.batch)
    job = Session(
        config, device, model, corpus, order, optimizer, Schedule.of(config.train), [], predicted, task, crew, spread, base
    )  # fmt: skip
    spreading.after(job)
    gemm.decided()  # settled now, not inside the first step, whose memory and time are measured
    job.peaks = [float(group["lr"]) for group in optimizer.param_groups]
    seed_everything(config.run.seed, 0 if job.forward_only else crew.part)
    return job


def resolve(config: RunConfig, crew: Crew | None = None) -> RunConfig:
    """The configuration with nothing left open: the planner's method for `auto`, the method's preset, the thread count.

    crew: those that will share its steps.

    Raises `InputError` for an unknown method or option, a rank given to a method without one, clipping with release that does not
    say how, or two answers to where bases come from.
    """
    method, train = config.method, config.train
    check_task(config)
    adapters.check(config)
    if method.release and train.clip is not None and train.clip_mode == "exact":
        raise InputError(
            "train.clip: method.release frees each gradient inside backward, before the norm of all is known; set "
            "train.clip_mode to two-pass (exact, every backward twice) or previous (norm of the step before), or "
            "set train.clip to none"
        )
    if train.refresh_from == "first" and train.refresh_parts > 1:
        raise InputError(
            f"train.refresh_parts: {train.refresh_parts} passes share the gradients that are summed, and train.refresh_from "
            "is first; leave one of them out"
        )
    if method.key == "auto":
        method = replace(method, key=choose(config, open_task(config), crew))
    forward = registry.card(method.key).kind == "forward"
    if config.task.objective != "loss" and not forward:
        raise InputError(
            f"task.objective: {config.task.objective} has no gradient, and {method.key} steps with gradients; use loss, or a method of "
            f"{', '.join(registry.keys('forward'))}"
        )
    check_methods(config.model.quantize, [method.key])
    if forward:
        train = replace(train, clip=None)  # there is no gradient whose norm could be limited
    if method.rank is not None and "rank" not in registry.options(method.key):
        raise InputError(f"method.rank: {method.key} has no rank; leave it out")
    choice = choice_of(replace(config, method=method))
    options = {name: value for name, value in choice.options.items() if name not in ("rank", "weight_decay")}
    method = replace(
        method, lr=choice.lr, rank=choice.options.get("rank"), weight_decay=choice.options.get("weight_decay"),
        options=options, storage=asdict(choice.storage),
    )  # fmt: skip
    adapters.check_storage(replace(config, method=method), choice.storage.weight)
    config = replace(config, adapter=config.adapter.filled())
    threads = config.run.threads or torch.get_num_threads()
    return replace(config, method=method, train=train, run=replace(config.run, threads=threads))


def check_task(config: RunConfig) -> None:
    """Raise `InputError` for settings of a task that do not go together."""
    task = config.task
    if task.name == "lm":
        for name, plain in (("template", None), ("words", {}), ("objective", "loss"), ("shots", None)):
            if getattr(task, name) != plain:
                raise InputError(f"task.{name}: is for the tasks classify and choice; set task.name (--task)")
        if config.model.kind not in ("auto", "causal"):
            raise InputError(
                f"model.kind: text is learned by causal models, not {config.model.kind}; set task.name (--task)"
            )
    elif config.data.bad_rows:
        raise InputError(
            "data.bad_rows: is for text; of the rows of a task every one is needed: repair or delete what is bad"
        )
    if task.name == "choice" and task.objective == "f1":
        raise InputError("task.objective: f1 is for classify; the answers of a choice are no classes: use accuracy")
    if task.name == "choice" and task.words:
        raise InputError("task.words: is for classify; the answers of a choice stand in the rows")


def choice_of(config: RunConfig) -> Choice:
    """The method of a configuration as the planner sees it, presets filled in."""
    method = config.method
    hyper = {**method.options, "lr": method.lr, "rank": method.rank, "weight_decay": method.weight_decay}
    dtype = weights_dtype(config)
    return resolve_method(
        method.key, config.model.name, dtype=dtype, hyper=hyper, storage=method.storage, release=method.release
    )


def weights_dtype(config: RunConfig) -> Literal["fp32", "bf16"]:
    """How the weights are kept: pure bf16 training holds them in bf16 too."""
    return "bf16" if config.train.precision == "bf16" else "fp32"


def build_optimizer(config: RunConfig, model: nn.Module) -> Optimizer:
    """The method of a configuration on a model. Raises `InputError` for options that do not go together."""
    optimizer, train = choice_of(config).build(model, seed=config.run.seed), config.train
    if config.method.release:
        mode = "previous" if train.clip_mode == "exact" else train.clip_mode  # "exact" only without a limit
        # On the CPU a look at each gradient costs nothing; elsewhere it would wait for the device at every leaf.
        strict: Strict = "leaf" if next(model.parameters()).device.type == "cpu" else "step"
        optimizer.clip_release(train.clip, mode, parts=train.clip_parts, strict=strict)
        optimizer.refresh_release(train.refresh_from, parts=train.refresh_parts)
    if train.accumulate > 1 and registry.card(config.method.key).kind == "gradient":
        with optimizer.accumulating():  # says now, not in backward, whether it can
            pass
    return optimizer


def quantize(model: nn.Module, config: RunConfig) -> None:
    """Hold the linear weights in few bits where model.quantize or the storage of the method says so; before the optimizer is built."""
    if config.model.quantize is not None:
        Quantization.parse(config.model.quantize).apply_(model)
    if choice_of(config).storage.weight == "int8":
        quantize_weights_(model)


def check_model(model: nn.Module, config: RunConfig) -> None:
    """Raise `InputError` if the model cannot be trained on sequences of this length, or has nothing to train."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.data.seq > positions:
        raise InputError(f"data.seq: {config.data.seq} is longer than the {positions} positions of {config.model.name}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"model.name: {config.model.name} has no trainable parameters")


def device_of(name: str) -> torch.device:
    """The device that a setting names; `auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"run.device: {name} asked for, but this torch sees no CUDA device; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"run.device: {name} is out of range; there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("run.device: mps asked for, but this torch sees no such device; use cpu or auto")
    return device


def check_budget(config: RunConfig, task: "TaskData | None" = None, crew: Crew | None = None) -> dict[str, int]:
    """What the plan predicts for a resolved configuration, on one worker: bytes by category at the peak, and `peak`.

    Raises `DoesNotFit`, with the smallest change that would fit, if that is more than `run.budget`, and if it is more than there is.
    """
    from tare.plan import api

    planned = plan_of(config, [config.method.key], task, crew)
    row = planned.row(api.choose(planned))
    machine.require(row.peak, device_of(config.run.device))
    parts = ("weights", "gradients", "state", "activations", "temporaries", "gathered", "peak")
    found = {part: getattr(row, part) for part in parts}
    return found if found["gathered"] else {part: size for part, size in found.items() if part != "gathered"}


def choose(config: RunConfig, task: "TaskData | None" = None, crew: Crew | None = None) -> str:
    """The planner's choice for `auto`: the most preferred method that fits. Raises `DoesNotFit` if none does."""
    from tare.plan import api

    return api.choose(plan_of(config, None, task, crew))


def plan_of(
    config: RunConfig, methods: list[str] | None, task: "TaskData | None" = None, crew: Crew | None = None
) -> "Plan":
    """The plan for the settings of a run; `methods` None means all that step with gradients. task: for its longest examples.

    crew: the plan is for one of its workers, that which needs most.
    """
    from tare.plan import api

    given, crew = config, crew or Crew()
    forward = methods is not None and all(registry.card(key).kind == "forward" for key in methods)
    if crew.size > 1 and not forward and given.train.parallel is None:  # not settled yet
        given = replace(given, train=replace(given.train, parallel="ddp"))
    ranks = crew.size if crew.size > 1 and not forward else None
    config = local(given, crew)
    work: Workload | None = None
    if task is not None:
        from tare.train.tasks.workload import TaskWork

        work = TaskWork(task, config.train.batch)
    method, train = config.method, config.train
    if config.model.quantize is not None:
        work = planned(work, Quantization.parse(config.model.quantize), train.batch, config.data.seq)
    work = adapters.planned(work, config)
    hyper = {"lr": method.lr, "rank": method.rank, "weight_decay": method.weight_decay, **method.options}
    return api.plan(
        config.model.name,
        config.run.budget,
        train.batch if ranks is None else given.train.batch,
        config.data.seq,
        methods,
        checkpointing=config.model.checkpointing,
        release=method.release,
        accumulate=train.accumulate,
        clip_mode=train.clip_mode if train.clip is not None or train.clip_mode == "two-pass" else "exact",
        clip_parts=train.clip_parts,
        refresh_from=train.refresh_from,
        refresh_parts=train.refresh_parts,
        dtype=weights_dtype(config),
        precision=train.precision,
        storage=method.storage or None,
        hyper={name: value for name, value in hyper.items() if value is not None},
        work=work,
        gpus=ranks,
        parallel=None if ranks is None else train.parallel,
        shards=None if ranks is None else train.shards,
        sync=None if ranks is None else train.sync,
    )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with a fixed number of CPU threads: sums are split by threads, so their last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def restore(session: Session, snapshot: Snapshot) -> list[str]:
    """Put a checkpoint's weights, optimizer state and random states into a freshly built session; returns warnings.

    Raises `CheckpointError` if they come from another model, method, tokenizer or data.
    """
    identity.check(session, snapshot)
    own_decay = [group.get("weight_decay") for group in session.optimizer.param_groups]
    sharded.restore_model(session.model, snapshot, session.base)
    try:
        if session.spread.form == "fsdp":
            sharded.restore_optimizer(session.model, session.optimizer, snapshot)
        else:
            session.optimizer.load_state_dict(snapshot.optimizer)
    except CheckpointError as fault:
        raise CheckpointError(f"{snapshot.folder}: {fault}") from fault
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as fault:
        raise CheckpointError(f"{snapshot.folder}: its optimizer state does not fit this method ({fault})") from fault
    warned = compressing.restore(session, snapshot.content)
    for group, decay in zip(session.optimizer.param_groups, own_decay, strict=True):
        group["weight_decay"] = decay  # may be changed on resume; the learning rate is set at every step anyway
    of_all = snapshot.trainer.get("random_of_workers") or [snapshot.trainer["random"]]
    if len(of_all) > 1 and len(of_all) == session.crew.parts:
        restore_random_state(of_all[session.crew.part])
    elif session.crew.part == 0 or session.forward_only:
        restore_random_state(snapshot.trainer["random"])
    else:  # more processes than there were: each with random numbers of its own
        seed_everything(session.config.run.seed + snapshot.step, session.crew.part)
    return [*warned, *restore_arithmetic(snapshot.trainer["arithmetic"], session.device)]


def whole_model(session: Session) -> dict[str, Tensor] | None:
    """The weights of a model that is cut among processes, on the first one; None where they are whole anyway. All call it together."""
    return whole_weights(session.model, session.crew.first) if session.spread.form == "fsdp" else None


def save_model(session: Session, folder: Path, whole: dict[str, Tensor] | None = None) -> None:
    """Write model and tokenizer in the format of `transformers`, agreeing on special tokens and length. whole: from `whole_model`."""
    model, tokenizer = cast("PreTrainedModel", session.model), session.corpus.tokenizer
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    with no_bars():
        dtype = DTYPES[weights_dtype(session.config)]
        if session.config.adapter.kind is not None:
            from tare.train import adapter_files

            kind, labels = ("causal", None) if session.task is None else (session.task.kind, session.task.outputs)
            adapter_files.save(model, session.config, kind, labels, dtype, folder, whole)
        else:
            dense = dense_state_dict(model) if is_quantized(model) else whole or dense_state(model, dtype)
            model.save_pretrained(folder, state_dict=dense)
        tokenizer.save_pretrained(folder)
