"""Adapters on a model: the settings of a run as PEFT's own, and what PEFT then makes of the model's layers."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tare.core.errors import InputError, nearest
from tare.core.random import make_key
from tare.plan.kinds import Kind
from tare.plan.models import HEADS, one_line
from tare.train.adapters import AdapterConfig, peft

EVERYWHERE = "all-linear"  # PEFT's word for every linear layer but the head


def attach(
    model: nn.Module,
    adapter: AdapterConfig,
    kind: Kind,
    seed: int,
    *,
    base: str | None = None,
    sketch: bool = False,
) -> nn.Module:
    """The model with a fresh adapter; its own weights are frozen, but for a classifier's head.

    Args:
        model: causal, masked or classifier, as `kind` says; changed in place.
        seed: of the fresh weights, which depend on nothing else.
        base: the model's name or folder. sketch: shapes only, for models on fake tensors or the meta device.

    Raises:
        InputError: targets that match nothing, or no layer that PEFT can adapt.
    """
    package, adapter = peft(), adapter.filled()
    settings = _settings(package, model, adapter, kind, base)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(make_key(seed, "adapter") % 2**63)
        if sketch:
            stack.enter_context(_staying(device))
        try:
            made: nn.Module = package.get_peft_model(model, settings)
        except ValueError as fault:
            raise InputError(f"adapter.targets: {one_line(fault)}; {_layers_line(model)}") from fault
    if base is not None and Path(base).expanduser().is_dir():
        settings.base_model_name_or_path = str(Path(base).expanduser().resolve())
    return made


def _settings(package: Any, model: nn.Module, adapter: AdapterConfig, kind: Kind, base: str | None) -> Any:
    """PEFT's own configuration object."""
    task = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS", "masked": None}[kind]
    if adapter.kind == "prefix":
        if kind != "causal":
            raise InputError(f"adapter.kind: a prefix is for causal models, and this is a {kind}; use lora or ia3")
        return package.PrefixTuningConfig(task_type=task, num_virtual_tokens=adapter.tokens)
    targets: Any = adapter.names or None
    if targets == [EVERYWHERE]:
        targets = EVERYWHERE
    else:
        _check_targets(model, adapter.names)
    more: dict[str, Any] = {"modules_to_save": _heads(model, base)} if kind == "classifier" else {}
    if adapter.kind == "lora":
        return package.LoraConfig(
            task_type=task,
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=targets,
            **more,
        )
    if targets is not None and targets != EVERYWHERE:  # those whose inputs are scaled, not their outputs
        known = package.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        feeding = known.get(getattr(model.config, "model_type", ""), ())
        more["feedforward_modules"] = [name for name in targets if name in feeding]
    return package.IA3Config(task_type=task, target_modules=targets, **more)


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
            raise InputError(
                f"adapter.targets: {target!r} matches no layer{nearest(target, ends)}; {_layers_line(model)}"
            )


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the layers that an adapter may go to, in order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def _layers_line(model: nn.Module) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2].replace("base_layer", "") for name in linear_layers(model))
    return f"its linear layers are {', '.join(filter(None, ends))}"


def _heads(model: nn.Module, base: str | None) -> list[str]:
    """A classifier's own modules above the encoder: trained and saved with the adapter. A pooler that the base's files have is not."""
    ends = {
        name.rpartition(".")[2] for name, module in model.named_modules() if next(module.parameters(), None) is not None
    }
    heads = [name.rstrip(".") for name in HEADS if name.rstrip(".") in ends]
    return [name for name in heads if name != "pooler" or not _in_files(base, "pooler.")]


def _in_files(base: str | None, part: str) -> bool:
    """Whether a folder's weights have names with a part. Fresh weights are in no files."""
    from safetensors import safe_open

    folder = Path(base or "").expanduser()
    for file in sorted(folder.glob("*.safetensors")) if base and folder.is_dir() else ():
        with safe_open(file, "pt") as opened:
            if any(f".{name}".find(f".{part}") >= 0 for name in opened.keys()):  # noqa: SIM118
                return True
    return False


@contextmanager
def _staying(device: Any) -> Iterator[None]:
    """Inside, modules are made on a device and moved nowhere: fake parameters cannot be."""
    from unittest.mock import patch

    with device, patch.object(nn.Module, "to", lambda module, *_, **__: module):
        yield
