"""An adapter on disk, as PEFT reads and writes it: saving, merging, and opening one on its base model.

`adapter_config.json` and `adapter_model.safetensors`; beside them the tokenizer, and `base/` where the base was made of fresh weights.
"""

import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tare.core.errors import InputError
from tare.plan.kinds import Kind
from tare.plan.models import build_model, one_line
from tare.plan.weights import has_weights
from tare.train.adapters import peft
from tare.train.config import RunConfig

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base"
KINDS: dict[str, Kind] = {"CAUSAL_LM": "causal", "SEQ_CLS": "classifier"}


@dataclass(frozen=True)
class Found:
    """An adapter's folder, and that of its base."""

    folder: Path
    base: Path
    kind: Kind | None  # of the base, where the adapter says so


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def find(folder: Path) -> Found:
    """The base of an adapter: its own `base/`, or the folder that its configuration names.

    Raises:
        InputError: the files are not there or damaged, or the base is not on this machine.
    """
    file = folder / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name, task = content["base_model_name_or_path"], content.get("task_type")
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise InputError(f"{file}: not the configuration of an adapter ({one_line(fault)})") from fault
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: the adapter has no weights ({WEIGHTS}); pickled ones are never loaded")
    base = folder / BASE if (folder / BASE).is_dir() else Path(str(name or "")).expanduser()
    if (not name and base != folder / BASE) or not (base / "config.json").is_file() or not has_weights(base):
        raise InputError(
            f"{file}: its base model {name!r} is no folder of a transformers model here; put the path right in that file"
        )
    return Found(folder, base, KINDS.get(task))


def put_on(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter of a folder on it. Raises `InputError` where the two do not belong together."""
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            made: nn.Module = peft().PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, OSError) as fault:
        raise InputError(f"{folder}: the adapter does not fit its base model: {one_line(fault)}") from fault
    lacking = [str(warning.message) for warning in heard if "missing adapter keys" in str(warning.message)]
    if lacking:
        raise InputError(f"{folder}: the adapter lacks weights of its own configuration: {lacking[0].splitlines()[0]}")
    for name, weight in made.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InputError(f"{folder}: weight {name} holds NaN or infinite values")
    return made.to(next(model.parameters()).device)


def save(
    model: Any,  # nn.Module, of PEFT
    config: RunConfig,
    kind: Kind,
    labels: int | None,
    dtype: torch.dtype,
    folder: Path,
    state: dict[str, Any] | None = None,
) -> None:
    """Write an adapter, or with `adapter.merge` the whole model with it merged in. labels: of a classifier. state: see `write`.

    Merged is what was written and read back, on the CPU, so that the model in training stays as it is.
    """
    name = Path(config.model.name).expanduser()
    fresh = not (name.is_dir() and has_weights(name))
    if not config.adapter.merge:
        if fresh:
            own = Path(config.run.out).expanduser().absolute() / "model" / BASE
            model.peft_config["default"].base_model_name_or_path = str(own)
        write(model, folder, state)
        if fresh:  # drawn again: they are in no other folder
            base = build_model(config.model.name, dtype=dtype, seed=config.run.seed, kind=kind, labels=labels)
            base.save_pretrained(folder / BASE)  # type: ignore[operator]
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write(model, Path(place), state)
        base = build_model(config.model.name, dtype=dtype, seed=config.run.seed, kind=kind, labels=labels)
        base.config.pad_token_id = model.config.pad_token_id  # type: ignore[union-attr]
        merged = put_on(base, Path(place)).merge_and_unload()  # type: ignore[operator]
        merged.save_pretrained(folder)


def write(model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """An adapter alone. state: the model's state dict, where its own weights are cut among processes."""
    more = {} if state is None else {"state_dict": state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False, **more)
    (folder / "README.md").unlink(missing_ok=True)  # a form for the hub, with nothing filled in
