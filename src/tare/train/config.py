"""The configuration of a run: frozen dataclasses, one per section, each checking itself when it is built.

A run is `RunConfig(model, data, method, train, run)`. Every field states its help text and its range once
(`train.settings`); reading from YAML and flags lives in `train.configfile`.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from tare.core.errors import InputError
from tare.train.adapters import AdapterConfig
from tare.train.quantize import Quantization
from tare.train.settings import Section, setting

Precision = Literal["fp32", "bf16-autocast", "bf16"]

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class ModelConfig(Section):
    """What is trained. `name`: a named LLaMA size, or a folder/config of `transformers`."""

    title = "model"
    name: str = setting("llama-9m", "a named size (llama-tiny ... llama-7b) or a transformers folder or config")
    tokenizer: str | None = setting(None, "tokenizer folder or tokenizer.json; none = a BPE trained on the data")
    checkpointing: bool = setting(False, "recompute activations in backward: less memory, about a third slower")
    kind: Literal["auto", "causal", "masked", "classifier"] = setting(
        "auto", "what kind of model a folder holds; auto = by the architecture that its config names"
    )
    quantize: str | None = setting(
        None, "hold linear layers in 4 or 8 bits, for qzo: int4 or int8, e.g. int4:group=64 [128]"
    )

    def check_together(self) -> None:
        if self.quantize is not None:
            Quantization.parse(self.quantize)


@dataclass(frozen=True)
class DataConfig(Section):
    """What it is trained on. `source`: "stdlib", a text file or folder, .jsonl, .parquet, or a hub name."""

    title = "data"
    source: str = setting("stdlib", '"stdlib", a text file or folder, .jsonl, .parquet, or a hub name')
    eval_source: str | None = setting(None, "evaluation data; none = documents held out of the source")
    text_column: str = setting("text", "the column that holds the text in .jsonl, .parquet and hub data")
    bad_rows: int = setting(
        0, "rows of .jsonl, .parquet and hub data that may be left out because they cannot be read", low=0
    )
    seq: int = setting(128, "tokens per sequence", low=2)
    eval_fraction: float = setting(0.02, "share of tokens held out when there is no eval_source", above=0, below=1)
    eval_tokens: int = setting(32_768, "tokens evaluated each time", low=1)


@dataclass(frozen=True)
class TaskConfig(Section):
    """What is learned: the next token of text, or answers to rows of a table. See docs/finetuning.md."""

    title = "task"
    name: Literal["lm", "classify", "choice"] = setting(
        "lm", "lm (next token of text), classify (rows with a label) or choice (rows with several answers)"
    )
    template: str | None = setting(
        None, "sst2, rte, boolq, cb, copa, or a text of its own; none = the one whose columns the rows have"
    )
    words: dict[str, Any] = setting(dict, "the word that stands for each label, e.g. {0: terrible, 1: great}")  # noqa: RUF009
    label_column: str = setting("label", "the column that holds the label, or the number of the right answer from 0")
    objective: Literal["loss", "accuracy", "f1"] = setting(
        "loss", "what is optimised; accuracy and f1 have no gradient: forward-only methods"
    )
    shots: int | None = setting(
        None, "training examples of each class (choice: in all), by the seed; none = all", low=1
    )
    eval_examples: int = setting(1000, "examples evaluated each time", low=1)


@dataclass(frozen=True)
class MethodConfig(Section):
    """How it is trained. `key`: a registered method or "auto"; None = the method's preset for the model."""

    title = "method"
    key: str = setting("auto", 'a method (see "tare methods"), or "auto": the planner\'s choice within the budget')
    lr: float | None = setting(None, "peak learning rate; none = the method's preset for the model", above=0)
    rank: int | None = setting(None, "rank of the subspace; none = the method's preset for the model", low=1)
    weight_decay: float | None = setting(None, "decoupled weight decay; none = the method's preset", low=0)
    release: bool = setting(False, "step inside backward and free each gradient at once")
    options: dict[str, Any] = setting(dict, "further constructor arguments of the method")  # noqa: RUF009
    storage: dict[str, Any] = setting(dict, "how state is kept: moment, basis, weight, block, min_quantized")  # noqa: RUF009

    def check_together(self) -> None:
        for name in ("lr", "rank", "weight_decay", "release", "storage"):
            if name in self.options:
                raise InputError(f"method.options.{name}: conflicts with method.{name}; set method.{name} instead")


@dataclass(frozen=True)
class TrainConfig(Section):
    """The schedule of the run."""

    title = "train"
    steps: int = setting(400, "optimizer steps", low=1)
    batch: int = setting(4, "sequences per micro-batch", low=1)
    accumulate: int = setting(1, "micro-batches per step", low=1)
    schedule: Literal["cosine", "constant"] = setting("cosine", "learning-rate schedule after the warm-up")
    warmup: float = setting(0.1, "warm-up: a share of the steps (< 1) or a number of steps", low=0)
    final_lr_ratio: float = setting(0.1, "the cosine ends at this share of the peak", low=0, high=1)
    clip: float | None = setting(1.0, "limit of the gradient norm; none = off, as it is with release", above=0)
    clip_mode: Literal["exact", "previous", "two-pass"] = setting(
        "exact", "with release: two-pass (exact, every backward twice) or previous (norm of the step before)"
    )
    clip_parts: int = setting(1, "two-pass: measuring passes, each with 1/N of the summed gradients", low=1)
    refresh_from: Literal["sum", "first"] = setting(
        "sum", "release and accumulate: a new basis comes from the sum (exact) or the first micro-batch (less memory)"
    )
    refresh_parts: int = setting(
        1, "refresh_from sum: passes of a step that computes bases, each with 1/N of their gradients", low=1
    )
    match: str | None = setting(
        None, 'train only the leaves that a pattern matches, "layers.*.mlp" or "bias,norm"; none = all'
    )
    precision: Precision = setting("fp32", "bf16 holds the weights in bf16 too")  # noqa: RUF009
    max_bad_steps: int = setting(10, "non-finite steps in a row before the run stops", low=1)
    spike: float | None = setting(
        None,
        "a loss so many deviations above the recent ones takes the run back to its checkpoint; none = off",
        above=0,
    )
    spike_memory: int = setting(32, "how many losses before it a spike is compared with", low=4)
    spike_limit: int = setting(3, "times in a row that a run goes back to one checkpoint before it stops", low=1)
    parallel: Literal["ddp", "fsdp", "hsdp"] | None = setting(
        None,
        "under torchrun or --nproc, with gradients: ddp holds the model whole on each process, fsdp cuts it; none = ddp",
    )
    shards: int | None = setting(
        None, "hsdp: processes among which the weights are cut, while groups of so many repeat each other", low=1
    )
    sync: Literal["step", "batch"] | None = setting(
        None,
        "gradients are sent once a step, or after each micro-batch (fsdp: less memory); none = ddp step, fsdp batch",
    )
    compress: Literal["randk", "topk", "powersgd", "projected"] | None = setting(
        None, "ddp over slow links: what is sent in place of whole gradients; none = those"
    )
    compress_fraction: float | None = setting(
        None, "randk, topk: share of a gradient that is sent in a step; none = 0.01", above=0, high=1
    )
    compress_rank: int | None = setting(None, "powersgd: its rank; none = 1", low=1)
    compress_start: int | None = setting(None, "powersgd: steps before it begins; none = 1000", low=2)
    workers: Literal["points", "data"] | None = setting(
        None, "under torchrun or --nproc, forward-only: share out the points of a step or its batch; none = points"
    )

    def check_together(self) -> None:
        if self.warmup >= 1 and not self.warmup.is_integer():
            raise InputError(f"train.warmup: expected a share < 1 or a whole number of steps, got {self.warmup:g}")
        if self.warmup > self.steps:
            raise InputError(
                f"train.warmup: expected at most train.steps = {self.steps}, got {self.warmup:g}; "
                "lower the warm-up or raise the steps"
            )


@dataclass(frozen=True)
class RunSection(Section):
    """Where the run lives and what it may use."""

    title = "run"
    out: str = setting("runs/latest", "folder of the run")
    budget: str | None = setting(None, "memory the run may use, e.g. 2GiB; none = no limit")
    seed: int = setting(0, "seed of everything random", low=0, below=2**63)
    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N")
    resume: bool = setting(False, "continue the run in the output folder")
    checkpoint_every: int = setting(100, "steps between checkpoints", low=1)
    eval_every: int = setting(100, "steps between evaluations", low=1)
    keep: int = setting(2, "checkpoints kept, the best one apart", low=2)
    checkpoint_async: Literal["auto", "always", "never"] = setting(
        "auto",
        "write checkpoints beside the training, from a copy on the host; auto: not where the copy would break the budget",
    )
    threads: int | None = setting(None, "CPU threads; none = torch's own choice", low=1)
    patience: float = setting(120.0, "seconds until a worker that gives no sign of life ends the run; 0 = never", low=0)
    tensorboard: bool = setting(False, "also write TensorBoard events")

    def check_together(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise InputError(f"run.device: expected auto, cpu, mps, cuda or cuda:N, got {self.device!r}")
        if self.budget is not None:
            from tare.plan.budget import parse_bytes

            try:
                parse_bytes(self.budget)
            except InputError as error:
                raise InputError(f"run.budget: {str(error).removeprefix('budget ')}") from None


@dataclass(frozen=True)
class RunConfig:
    """One training job, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunSection = field(default_factory=RunSection)
    task: TaskConfig = field(default_factory=TaskConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
