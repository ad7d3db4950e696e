"""The named models by their sizes. Light to import: no torch."""

from dataclasses import dataclass
from pathlib import Path

from tare.core.errors import InputError, nearest


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


def check_name(name_or_path: str | Path) -> None:
    """Raise InputError, with the nearest name and all names, for what is neither a named model nor a path that exists."""
    if named(str(name_or_path)) is None and not Path(name_or_path).exists():
        raise InputError(
            f"model {str(name_or_path)!r} is neither a named model{nearest(str(name_or_path).lower(), list(MODELS))} "
            f"nor a path that exists; named models: {', '.join(MODELS)}"
        )
