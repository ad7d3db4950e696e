"""Reading the weights of a `transformers` folder: safetensors only, complete, finite, inside the folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tare.core.errors import InputError
from tare.core.weights import mark_read

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_INDEX = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights; pickled weights alone are refused.

    Raises:
        InputError: only `.bin` or `.pt` files are there, or the index names files outside the folder or missing.
    """
    if (folder / _INDEX).is_file():
        _check_index(folder)
        return True
    if (folder / "model.safetensors").is_file():
        return True
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"} and "model" in p.name)
    if pickled:
        raise InputError(
            f"{folder / pickled[0]}: pickled weights are never loaded; save them as safetensors "
            "(model.save_pretrained(folder) of a recent transformers)"
        )
    return False


def load_pretrained(
    folder: Path, config: "PretrainedConfig", dtype: torch.dtype, kind: Any = None, fresh: tuple[str, ...] = ()
) -> nn.Module:
    """The model of the folder, every weight accounted for.

    kind: a class of `transformers`; default the causal language model that the config names. fresh: beginnings of names (behind any
    prefix) of weights that the files may lack: they are drawn from torch's generator.

    Raises:
        InputError: a damaged file, a tensor that is missing, of another shape, or not finite.
    """
    from transformers import AutoModelForCausalLM

    from tare.plan.models import one_line

    try:
        loaded: Any = (kind or AutoModelForCausalLM).from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it then tells which, and we refuse
        )
    except Exception as fault:  # of safetensors, or whatever transformers makes of a value in config.json
        raise InputError(f"{folder}: the weights cannot be read: {one_line(fault)}") from fault
    model, info = loaded
    drawn = set(info.get("missing_keys") or ())
    if missing := sorted(name for name in drawn if not _drawn(name, fresh)):
        raise InputError(f"{folder}: missing weight {missing[0]}: the files do not match config.json")
    if other := sorted(info.get("mismatched_keys") or (), key=str):
        name, *shapes = (other[0],) if isinstance(other[0], str) else other[0]
        there, here = map(list, shapes) if len(shapes) == 2 else ("another shape", "the model's")
        raise InputError(
            f"{folder}: weight {name} is {there} there and {here} by config.json; the files do not match it"
        )
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InputError(f"{folder}: weight {name} holds NaN or infinite values")
        if name not in drawn:
            mark_read(weight)
    return model


def _drawn(name: Any, fresh: tuple[str, ...]) -> bool:
    """Whether a weight that is missing may be."""
    return any(f".{name}".find(f".{head}") >= 0 for head in fresh)


def _check_index(folder: Path) -> None:
    file = folder / _INDEX
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise InputError(f"{file}: not a safetensors index ({type(fault).__name__})") from fault
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{file}: weight file {name!r} is not a plain .safetensors name inside the folder")
        if not (folder / name).is_file():
            raise InputError(f"{file}: names {name!r}, which is not in the folder")
