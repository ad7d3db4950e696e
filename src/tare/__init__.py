"""tare: train, fine-tune and compress large neural networks within a memory budget that you name.

`tare.create(key, model, lr)` or a named class such as `tare.GaLore` gives an optimizer for your own loop; `tare.plan(...)` says
beforehand what fits; the command `tare` trains and compares. Heavy rooms are imported on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> (module, attribute). Resolved on first access, so that `import tare` and `tare --help` stay quick.
_NAMES = {
    "AdamW": ("tare.methods.adamw", "AdamW"),
    "AdamW8bit": ("tare.methods.adamw_8bit", "AdamW8bit"),
    "Apollo": ("tare.methods.apollo", "Apollo"),
    "ApolloMini": ("tare.methods.apollo", "ApolloMini"),
    "CheckpointError": ("tare.core.errors", "CheckpointError"),
    "DoesNotFit": ("tare.core.errors", "DoesNotFit"),
    "Fira": ("tare.methods.fira", "Fira"),
    "GaLore": ("tare.methods.galore", "GaLore"),
    "GaLore8bit": ("tare.methods.galore_8bit", "GaLore8bit"),
    "GaLoreAdafactor": ("tare.methods.galore_adafactor", "GaLoreAdafactor"),
    "InputError": ("tare.core.errors", "InputError"),
    "Lion": ("tare.methods.lion", "Lion"),
    "Optimizer": ("tare.core.optimizer", "Optimizer"),
    "Recipe": ("tare.core.recipe", "Recipe"),
    "Storage": ("tare.core.storage", "Storage"),
    "create": ("tare.methods.registry", "build"),
    "every": ("tare.subspace.refresh", "every"),
    "subspace_of": ("tare.subspace.wrapper", "subspace"),
}
_ROOMS = ("plan", "testing", "methods", "core", "rules", "subspace", "train", "report", "kernels")

__all__ = [*_NAMES, "__version__", "plan"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _ROOMS:
        return importlib.import_module(f"tare.{name}")
    raise AttributeError(f"module 'tare' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_ROOMS])
