"""The models that a plan or a run can name: LLaMA shapes, and folders or configs of `transformers`.

Nothing from outside is executed here: no remote code, no pickled weights. `transformers` is imported when first needed.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tare.core.errors import InputError, nearest
from tare.plan.kinds import Kind, auto_class
from tare.plan.shapes import MODELS, ModelShape, check_name, named

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_LAYERS = 10_000  # a config that says more would keep the planner busy for hours
HEADS = (
    "classifier.",
    "score.",
    "classification_head.",
    "pre_classifier.",
    "pooler.",
    "sequence_summary.",
)  # of classifiers


def config_for(name_or_path: str | Path, *, heads: bool = False) -> "PretrainedConfig":
    """The `transformers` config of a named model, of a folder with `config.json`, or of such a file.

    heads: also of architectures that are masked models or classifiers; see `plan.kinds`.

    Raises:
        InputError: neither a name nor a path; no config in the folder; not JSON; an architecture that
            `transformers` does not know as a causal language model. Code that comes with a model is never run.
    """
    key = named(str(name_or_path))
    if key is not None:
        return _llama(MODELS[key])
    check_name(name_or_path)
    path = Path(name_or_path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"model folder {str(path)!r} has no config.json: give a folder saved by transformers")
    return _read_config(file, heads)


def plannable(name_or_path: str | Path, *, heads: bool = False) -> "PretrainedConfig | ModelShape":
    """The sizes of a named model, for which `transformers` need not be imported, or the config that a path leads to.

    Raises:
        InputError: see `config_for`.
    """
    key = named(str(name_or_path))
    return config_for(name_or_path, heads=heads) if key is None else MODELS[key]


def full(config: "PretrainedConfig | ModelShape") -> "PretrainedConfig":
    """The `transformers` config of what `plannable` gave."""
    return _llama(config) if isinstance(config, ModelShape) else config


def identity(config: "PretrainedConfig | ModelShape") -> dict[str, Any]:
    """All that tells one model from another, as JSON values."""
    if isinstance(config, ModelShape):
        return {"shape": asdict(config)}
    return {"model_type": config.model_type, **config.to_dict()}


def positions(config: "PretrainedConfig | ModelShape") -> int | None:
    """The longest sequence, where the model says."""
    return config.positions if isinstance(config, ModelShape) else getattr(config, "max_position_embeddings", None)


def build_model(
    name_or_path: "str | Path | PretrainedConfig",
    *,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
    kind: Kind = "causal",
    labels: int | None = None,
) -> nn.Module:
    """A causal language model, with the weights of its folder or fresh ones drawn from `seed` alone; or one of another kind.

    Args:
        name_or_path: what `config_for` takes, or a config.
        dtype: of all weights; `"fp32"`, `"bf16"` or a torch dtype.
        seed: of fresh weights. The caller's own random state is left as it was.
        device: fresh weights are drawn on the CPU, so they are equal everywhere, then moved.
        kind: causal, masked or classifier; labels: how many outputs a classifier has. A folder's weights without a classifier's head
            get a fresh one.

    Raises:
        InputError: see `config_for`; a head of another size; also weights that are damaged, incomplete, not finite or not safetensors.

    >>> parameter_count(build_model("llama-tiny"))
    1053824
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(name_or_path, (str, Path)):
            config = config_for(name_or_path, heads=kind != "causal")
            folder = Path(name_or_path).expanduser()
            if named(str(name_or_path)) is None and folder.is_dir():
                from tare.plan.weights import has_weights, load_pretrained

                if has_weights(folder):
                    fresh = _outputs(config, labels) if kind == "classifier" else ()
                    return load_pretrained(folder, config, dtype, auto_class(kind), fresh).to(device)
        else:
            config = name_or_path
        if kind == "classifier":
            config = with_labels(config, labels)
        return _from_config(auto_class(kind), config, dtype).to(device)


def with_labels(config: "PretrainedConfig", labels: int | None) -> "PretrainedConfig":
    """The config of a classifier with so many outputs; as it is for None."""
    if labels is None:
        return config
    config = copy.deepcopy(config)
    config.num_labels = labels
    return config


def _outputs(config: "PretrainedConfig", labels: int | None) -> tuple[str, ...]:
    """Sets the outputs of a classifier's folder; what its weights may lack: the head, where there has been none.

    Raises InputError where the folder has a head of another size.
    """
    names = getattr(config, "architectures", None) or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        if labels is not None and config.num_labels != labels:
            raise InputError(
                f"model.name: its classifier has {config.num_labels} outputs, and the task {labels} labels"
            )
        return ()
    if labels is not None:
        config.num_labels = labels
    return HEADS


def build_skeleton(config: "PretrainedConfig", dtype: torch.dtype, kind: Kind = "causal") -> nn.Module:
    """The model with its shapes and no storage behind them: for use inside a `FakeTensorMode`."""
    return _from_config(auto_class(kind), config, dtype)


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute each layer's activations in backward (non-reentrant, the form that works with hooks and no-grad inputs)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]


def parameter_count(model: nn.Module) -> int:
    """Number of weights, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _from_config(auto: type, config: "PretrainedConfig", dtype: torch.dtype) -> nn.Module:
    config = copy.deepcopy(config)  # which `from_config` writes the dtype into
    try:
        return auto.from_config(config, dtype=dtype, attn_implementation="sdpa")  # type: ignore[attr-defined]
    except Exception as fault:  # whatever transformers makes of a value that makes no sense
        raise InputError(f"model config {config.model_type!r} cannot be built: {one_line(fault)}") from fault


def _llama(shape: ModelShape) -> "PretrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_hidden_layers=shape.layers,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
    )


def _read_config(file: Path, heads: bool = False) -> "PretrainedConfig":
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InputError(f"{file}: not a readable JSON file ({one_line(fault)})") from fault
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise InputError(f"{file}: no model_type, so this is no transformers config")
    kind = content["model_type"]
    if kind not in CONFIG_MAPPING:
        remote = "; it comes with its own code, which tare never runs" if "auto_map" in content else ""
        raise InputError(
            f"{file}: transformers knows no model_type {kind!r}{nearest(kind, list(CONFIG_MAPPING))}{remote}"
        )
    for name, value in content.items():
        if "layers" in name and isinstance(value, int) and value > MAX_LAYERS:
            raise InputError(f"{file}: {name}: {value} are more than any model has; allowed: up to {MAX_LAYERS}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(content)
    except Exception as fault:  # transformers raises many kinds for a bad field, some of its own
        raise InputError(f"{file}: {one_line(fault)}") from fault
    if not heads and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{file}: model_type {kind!r} is no causal language model")
    return config


def one_line(fault: BaseException) -> str:
    """The first line of an exception's text, for messages of one line."""
    lines = str(fault).strip().splitlines()
    return lines[0].strip() if lines else type(fault).__name__
