"""The models that a plan or a run can name: LLaMA shapes, and folders or configs of `transformers`.

Nothing from outside is executed here: no remote code, no pickled weights. `transformers` is imported when first needed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tare.core.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelShape:
    """A LLaMA by its sizes; RMSNorm eps 1e-6, init std 0.02, head not tied to the embedding."""

    hidden: int
    mlp: int
    heads: int
    layers: int
    vocab: int = 32_000
    positions: int = 1024


# The last five are the shapes of the GaLore, Fira and APOLLO papers, from the configs published with them.
MODELS: dict[str, ModelShape] = {
    "llama-tiny": ModelShape(128, 344, 4, 4, vocab=1024),  # 1.1 M parameters
    "llama-3m": ModelShape(192, 512, 6, 5, vocab=2048),
    "llama-9m": ModelShape(256, 768, 8, 8, vocab=4096),
    "llama-20m": ModelShape(384, 1024, 6, 9, vocab=4096),
    "llama-60m": ModelShape(512, 1376, 8, 8),
    "llama-130m": ModelShape(768, 2048, 12, 12),
    "llama-350m": ModelShape(1024, 2736, 16, 24),
    "llama-1b": ModelShape(2048, 5461, 32, 24),
    "llama-7b": ModelShape(4096, 11008, 32, 32, positions=2048),
}


def named(name: str) -> str | None:
    """The key in `MODELS` that `name` means (`"7B"`, `"LLaMA-7b"`), or None.

    >>> named("LLaMA-7B"), named("60m"), named("./my-model")
    ('llama-7b', 'llama-60m', None)
    """
    key = name.strip().lower()
    key = key if key.startswith("llama-") else f"llama-{key}"
    return key if key in MODELS else None


def config_for(name_or_path: str | Path) -> "PretrainedConfig":
    """The `transformers` config of a named model, of a folder with `config.json`, or of such a file.

    Raises:
        InputError: neither a name nor a path; no config in the folder; not JSON; an architecture that
            `transformers` does not know as a causal language model. Code that comes with a model is never run.
    """
    key = named(str(name_or_path))
    if key is not None:
        return _llama(MODELS[key])
    path = Path(name_or_path)
    if not path.exists():
        hint = nearest(str(name_or_path).lower(), list(MODELS))
        raise InputError(
            f"model {str(name_or_path)!r} is neither a named model{hint} nor a path that exists; "
            f"named models: {', '.join(MODELS)}"
        )
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"model folder {str(path)!r} has no config.json: give a folder saved by transformers")
    return _read_config(file)


def build_model(
    name_or_path: "str | Path | PretrainedConfig",
    *,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A causal language model, with the weights of its folder or fresh ones drawn from `seed` alone.

    Args:
        name_or_path: what `config_for` takes, or a config.
        dtype: of all weights; `"fp32"`, `"bf16"` or a torch dtype.
        seed: of fresh weights. The caller's own random state is left as it was.
        device: fresh weights are drawn on the CPU, so they are equal everywhere, then moved.

    Raises:
        InputError: see `config_for`; also weights that are damaged, incomplete, not finite or not safetensors.

    >>> parameter_count(build_model("llama-tiny"))
    1053824
    """
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if isinstance(name_or_path, (str, Path)):
        config = config_for(name_or_path)
        if named(str(name_or_path)) is None and Path(name_or_path).is_dir():
            from tare.plan.weights import has_weights, load_pretrained

            if has_weights(Path(name_or_path)):
                return load_pretrained(Path(name_or_path), config, dtype).to(device)
    else:
        config = name_or_path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(AutoModelForCausalLM, config, dtype).to(device)


def build_skeleton(config: "PretrainedConfig", dtype: torch.dtype) -> nn.Module:
    """The model with its shapes and no storage behind them: for use inside a `FakeTensorMode`."""
    from transformers import AutoModelForCausalLM

    return _from_config(AutoModelForCausalLM, config, dtype)


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute each layer's activations in backward (non-reentrant, the form that works with hooks and no-grad inputs)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]


def parameter_count(model: nn.Module) -> int:
    """Number of weights, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _from_config(auto: type, config: "PretrainedConfig", dtype: torch.dtype) -> nn.Module:
    try:
        return auto.from_config(config, dtype=dtype, attn_implementation="sdpa")  # type: ignore[attr-defined]
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, AttributeError) as fault:
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


def _read_config(file: Path) -> "PretrainedConfig":
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
    try:
        config = CONFIG_MAPPING[kind].from_dict(content)
    except Exception as fault:  # transformers raises many kinds for a bad field, some of its own
        raise InputError(f"{file}: {one_line(fault)}") from fault
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{file}: model_type {kind!r} is no causal language model")
    return config


def one_line(fault: BaseException) -> str:
    """The first line of an exception's text, for messages of one line."""
    lines = str(fault).strip().splitlines()
    return lines[0].strip() if lines else type(fault).__name__
