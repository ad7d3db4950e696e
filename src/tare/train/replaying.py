"""From a seed log and the folder of its base model to the folder of the trained model, in the format of `transformers`."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tare.core.errors import InputError
from tare.methods.replay import replay
from tare.plan.kinds import kind_of
from tare.train import adapter_files, integrity
from tare.train.adapter_layers import attach
from tare.train.adapters import AdapterConfig
from tare.train.bars import no_bars
from tare.train.quantize import Quantization, dense_state
from tare.zeroth.logfile import Log, read

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
WRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")  # by `save_pretrained`


@dataclass(frozen=True)
class Written:
    """A model that was replayed and saved. exact: bit for bit that of the run; None where the log was not sealed, or not replayed whole."""

    out: Path
    log: Log
    steps: int
    exact: bool | None
    copied: tuple[str, ...]


def replay_folder(
    log: Path, base: Path, out: Path, *, steps: int | None = None, device: str | torch.device = "cpu",
    progress: Callable[[int, int], Any] | None = None, quantize: Quantization | None = None, adapter: AdapterConfig | None = None,
    seed: int = 0,
) -> Written:  # fmt: skip
    """Write the trained model, and copies of the base's other files (tokenizer, chat template), to `out`.

    quantize: how the run held its model, where it did; what is written is dequantised. adapter: what the run trained, where that was no
    whole model; seed: of that run. The folder appears whole or not at all.

    Raises:
        InputError: what `read` and `replay` refuse; a base that is no model; an `out` that holds something.
    """
    found = read(log)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; give another folder")
    if steps is not None and not 0 <= steps <= found.steps:
        raise InputError(f"{log}: holds {found.steps} steps, {steps} were asked for")
    with no_bars():
        model = open_model(base, dtype_of(found)).to(device)
        if quantize is not None:
            quantize.apply_(model)
        if adapter is not None and adapter.kind is not None:
            model = attach(model, adapter, kind_of(model.config), seed, base=str(base))  # type: ignore[arg-type]
    done = replay(found, model, steps=steps, progress=progress)
    copied = [
        file
        for file in sorted(base.iterdir())
        if file.is_file() and file.name not in WRITTEN and file.suffix not in WEIGHTS
    ]
    with integrity.appearing(out) as place:
        with no_bars():
            state = dense_state(model.to("cpu"), dtype_of(found))
            if adapter is None or adapter.kind is None or adapter.merge:
                whole: Any = model.merge_and_unload() if adapter is not None and adapter.merge else model  # type: ignore[operator]
                whole.save_pretrained(place, state_dict=state)
            else:
                adapter_files.write(model, place)
        for file in copied:
            shutil.copyfile(file, place / file.name)
    return Written(out, found, done.steps, done.exact, tuple(file.name for file in copied))


def dtype_of(log: Log) -> torch.dtype:
    """That of most elements of the run's weights: in which the model was loaded."""
    sizes: Counter[str] = Counter()
    for leaf in log.header["leaves"]:
        sizes[leaf["dtype"]] += int(torch.Size(leaf["shape"]).numel())
    dtype = getattr(torch, sizes.most_common(1)[0][0])
    assert isinstance(dtype, torch.dtype)
    return dtype


def open_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder, of the class that its config names. Raises InputError where it holds none, or pickled weights only."""
    import transformers

    from tare.plan.models import config_for
    from tare.plan.weights import has_weights, load_pretrained

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected that of a transformers model")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no transformers model (no config.json)")
    if not has_weights(folder):
        raise InputError(f"{folder}: the model has no weights (no model.safetensors)")
    config = config_for(folder, heads=True)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    return load_pretrained(folder, config, dtype, kind)
