"""loss and perplexity of a trained model, averaged over tokens; or accuracy and F1 on a task

RUN_OR_MODEL is the folder of a run or of a transformers model. Without --data a run is evaluated on the documents or rows that
were held out of its own training data. A run of a task is evaluated on that task, a model on the one that --task names.
"""

import argparse
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tare.cli import flags
from tare.cli.output import console, emit, only_json
from tare.core.errors import InputError
from tare.train.config import DataConfig, ModelConfig, RunConfig, RunSection, TrainConfig
from tare.train.configfile import build, load

if TYPE_CHECKING:
    from torch import nn


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("target", metavar="RUN_OR_MODEL", nargs="?", help="a run's folder, or a transformers folder")
    group = parser.add_argument_group("evaluation")
    for name in (
        "--data",
        "--tokenizer",
        "--seq",
        "--batch",
        "--precision",
        "--device",
        "--task",
        "--template",
        "--words",
    ):
        flags.add_one(group, name)
    group.add_argument("--tokens", metavar="N", help="evaluate at most this many tokens; all if left out")
    flags.add_switches(parser)


@dataclass(frozen=True)
class Target:
    """What is evaluated: the model's folder, and the settings of its run (defaults for a bare model). weights: where they are."""

    model: Path
    config: RunConfig
    is_run: bool
    weights: ModelConfig

    @classmethod
    def of(cls, model: Path, config: RunConfig, is_run: bool) -> "Target":
        """With the base of an adapter looked up."""
        from tare.train import adapter_files

        if not adapter_files.is_adapter(model):
            return cls(model, config, is_run, ModelConfig(str(model)))
        found = adapter_files.find(model)
        beside = str(model) if (model / "tokenizer.json").is_file() else None
        return cls(model, config, is_run, ModelConfig(str(found.base), beside, kind=found.kind or config.model.kind))

    @property
    def base(self) -> Path:
        """Where the weights are; `model`, but of an adapter."""
        return Path(self.weights.name)

    def adapted(self, model: "nn.Module") -> "nn.Module":
        """The base with the adapter on it; as it is where there is none."""
        if self.base == self.model:
            return model
        from tare.train import adapter_files

        return adapter_files.put_on(model, self.model)


def find(given: str | None) -> Target:
    """The model that an argument names. Raises `InputError` if it is neither a run with a model nor a model."""
    if given is None:
        raise InputError("RUN_OR_MODEL: missing; give the folder of a run or of a transformers model")
    place = Path(given).expanduser()
    if not place.is_dir():
        kind = "is a file" if place.exists() else "no such folder"
        raise InputError(f"{given}: {kind}; expected the folder of a run or of a transformers model")
    if (place / "config.yaml").is_file():
        if not _holds_model(place / "model"):
            raise InputError(f"{given}: the run has no model yet; finish it: tare train --resume --out {given}")
        return Target.of(place / "model", load(place / "config.yaml"), True)
    if not _holds_model(place):
        raise InputError(
            f"{given}: neither a run (no config.yaml) nor a transformers model (no config.json) nor an adapter (no adapter_config.json)"
        )
    return Target.of(place, RunConfig(), False)


def _holds_model(place: Path) -> bool:
    return (place / "config.json").is_file() or (place / "adapter_config.json").is_file()


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    given = build(args.settings)
    asked = {item.path for item in args.settings}
    limit = _limit(args.tokens)
    target = find(args.target)
    if not target.is_run and "data.source" not in asked:
        raise InputError("--data: missing; a model folder has no data of its own, e.g. --data stdlib or --data FILE")
    if (given.task if "task.name" in asked else target.config.task).name != "lm":
        return _task(args, given, asked, target)
    with only_json(args.json):
        from tare.plan.models import build_model, config_for
        from tare.train.data import eval_batches, open_corpus
        from tare.train.evaluate import evaluate
        from tare.train.session import device_of

        device = device_of(given.run.device)
        precision = given.train.precision if "train.precision" in asked else target.config.train.precision
        batch = given.train.batch if "train.batch" in asked else target.config.train.batch
        shape = config_for(target.base)
        positions = getattr(shape, "max_position_embeddings", None) or 1024
        seq = (
            given.data.seq if "data.seq" in asked else target.config.data.seq if target.is_run else min(positions, 1024)
        )
        if seq > positions:
            raise InputError(f"--seq: {seq} is longer than the {positions} positions of the model")
        data = target.config.data
        held_out = target.is_run and ("data.source" not in asked or given.data.source == data.source)
        if not held_out:  # all of the given data, none of it split off; no shortest length
            source = given.data.source
            data = DataConfig(source=source, eval_source=source, text_column=data.text_column)
        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that evaluation and training data are the same: nothing is trained here
            tokenizer = given.model.tokenizer or target.weights.tokenizer or str(target.base)
            corpus = open_corpus(replace(data, seq=2), shape.vocab_size, tokenizer)
        model = target.adapted(build_model(target.base, dtype="bf16" if precision == "bf16" else "fp32", device=device))
        batches = (tokens for tokens, _ in eval_batches(corpus.eval, seq, batch, limit))
        result = evaluate(model, batches, device, precision)
    source = data.eval_source or data.source
    name = f"{source} (held out)" if held_out and data.eval_source is None else source
    document = {
        "model": str(target.model),
        "data": name,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "seq": seq,
        "seconds": round(time.monotonic() - began, 3),
    }
    if args.json:
        emit(document)
    else:
        console().print(
            f"{target.model} on {name}: loss {result.loss:.4f}, perplexity {result.perplexity:.3f} "
            f"over {result.tokens:,} tokens, {seq} a sequence",
            soft_wrap=True,
        )
    return 0


def _task(args: argparse.Namespace, given: RunConfig, asked: set[str], target: Target) -> int:
    """Accuracy and F1 of a model on a task."""
    base = target.config
    if args.tokens is not None:
        raise InputError("--tokens: a task is evaluated on examples; give --task.eval_examples N")
    task = {path.split(".")[1]: getattr(given.task, path.split(".")[1]) for path in asked if path.startswith("task.")}
    settings = replace(base.task, **{**task, "shots": None, "objective": "loss"})
    data = replace(base.data, seq=given.data.seq) if "data.seq" in asked else base.data
    if "data.source" in asked:  # all of it, none split off
        data = replace(data, source=given.data.source, eval_source=given.data.source)
    batch = given.train.batch if "train.batch" in asked else base.train.batch
    precision = given.train.precision if "train.precision" in asked else base.train.precision
    kind = given.model.kind if "model.kind" in asked else target.weights.kind
    with only_json(args.json):
        from tare.plan.models import build_model
        from tare.train.session import check_task, device_of
        from tare.train.tasks.data import open_task

        began, device = time.monotonic(), device_of(given.run.device)
        config = RunConfig(
            model=replace(target.weights, tokenizer=given.model.tokenizer or target.weights.tokenizer, kind=kind),
            data=data, task=settings, train=TrainConfig(batch=1), run=RunSection(seed=base.run.seed),
        )  # fmt: skip
        check_task(config)
        found = open_task(config)
        dtype = "bf16" if precision == "bf16" else "fp32"
        model = build_model(target.base, dtype=dtype, device=device, kind=found.kind, labels=found.outputs)
        model.config.pad_token_id = found.tokenizer.pad_token_id  # type: ignore[union-attr]
        model = target.adapted(model)
        result = found.evaluate(model, device, precision, batch)
    name = data.eval_source or f"{data.source} (held out)"
    document = {
        "model": str(target.model), "data": name, "task": settings.name, "template": found.template.name, "loss": result.loss,
        **result.numbers(), "examples": result.examples, "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip
    if args.json:
        emit(document)
    else:
        from tare.train.progress import scores_line

        console().print(
            f"{target.model} on {name}, {settings.name} ({found.template.name}): {scores_line(result.numbers())}, "
            f"loss {result.loss:.4f} over {result.examples:,} examples",
            soft_wrap=True,
        )
    return 0


def _limit(text: str | None) -> int | None:
    if text is not None and not (text.isdigit() and int(text) > 1):
        raise InputError(f"--tokens: expected a whole number >= 2, got {text!r}")
    return int(text) if text is not None else None
