"""The configuration of a run: frozen dataclasses, one per section, each checking itself when it is built.

A run is `RunConfig(model, data, method, train, run)`. Reading from YAML and flags lives in `train.configfile`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16-autocast", "bf16"]


@dataclass(frozen=True)
class ModelConfig:
    """What is trained. `name`: a named LLaMA size, or a folder/config of `transformers`."""

    name: str = "llama-9m"
    tokenizer: str | None = None  # a tokenizer folder or tokenizer.json; None = train a byte-level BPE on the data
    checkpointing: bool = False  # recompute activations in backward


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on. `source`: "stdlib", a text file or folder, .jsonl, .parquet, or a hub name."""

    source: str = "stdlib"
    eval_source: str | None = None  # None = documents held out of `source`
    text_column: str = "text"
    seq: int = 256
    eval_fraction: float = 0.02  # share of documents held out when eval_source is None
    eval_tokens: int = 32_768  # tokens evaluated each time


@dataclass(frozen=True)
class MethodConfig:
    """How it is trained. `key`: a registered method or "auto"; None = the method's preset for the model."""

    key: str = "auto"
    lr: float | None = None
    rank: int | None = None
    weight_decay: float | None = None
    release: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # further constructor arguments of the method
    storage: dict[str, Any] = field(default_factory=dict)  # fields of core.storage.Storage


@dataclass(frozen=True)
class TrainConfig:
    """The schedule of the run."""

    steps: int = 200
    batch: int = 8  # sequences per micro-batch
    accumulate: int = 1  # micro-batches per step
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1  # share of the steps (< 1) or a number of steps
    final_lr_ratio: float = 0.1  # cosine ends at this share of the peak
    clip: float | None = 1.0  # global gradient norm; None = off
    precision: Precision = "fp32"
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops


@dataclass(frozen=True)
class RunSection:
    """Where the run lives and what it may use."""

    out: str = "runs/latest"
    budget: str | None = None  # e.g. "2GiB"
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    checkpoint_every: int = 50
    eval_every: int = 50
    keep: int = 2
    threads: int | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class RunConfig:
    """One training job, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunSection = field(default_factory=RunSection)
