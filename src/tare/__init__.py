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
    "AdamW4bit": ("tare.methods.adamw_4bit", "AdamW4bit"),
    "AdamW8bit": ("tare.methods.adamw_8bit", "AdamW8bit"),
    "Adan": ("tare.methods.adan", "Adan"),
    "Apollo": ("tare.methods.apollo", "Apollo"),
    "ApolloMini": ("tare.methods.apollo", "ApolloMini"),
    "BAdam": ("tare.methods.badam", "BAdam"),
    "BlackBox": ("tare.zeroth.cut", "BlackBox"),
    "CheckpointError": ("tare.core.errors", "CheckpointError"),
    "Clients": ("tare.zeroth.clients", "Clients"),
    "Clipped": ("tare.core.clipping", "Clipped"),
    "Compose": ("tare.methods.compose", "Compose"),
    "Consensus": ("tare.methods.consensus", "Consensus"),
    "DCTAdamW": ("tare.methods.dct_adamw", "DCTAdamW"),
    "DeepZero": ("tare.methods.deepzero", "DeepZero"),
    "DiffGrad": ("tare.methods.diffgrad", "DiffGrad"),
    "DoesNotFit": ("tare.core.errors", "DoesNotFit"),
    "Eggroll": ("tare.methods.eggroll", "Eggroll"),
    "FZooS": ("tare.methods.fzoos", "FZooS"),
    "Fira": ("tare.methods.fira", "Fira"),
    "Frugal": ("tare.methods.frugal", "Frugal"),
    "GaLore": ("tare.methods.galore", "GaLore"),
    "GaLore8bit": ("tare.methods.galore_8bit", "GaLore8bit"),
    "GaLoreAdafactor": ("tare.methods.galore_adafactor", "GaLoreAdafactor"),
    "GaLorePlus": ("tare.methods.galore_plus", "GaLorePlus"),
    "GradNormLoRP": ("tare.methods.gradnorm_lorp", "GradNormLoRP"),
    "InputError": ("tare.core.errors", "InputError"),
    "Int8Weight": ("tare.core.int8_weight", "Int8Weight"),
    "LANTON": ("tare.methods.lanton", "LANTON"),
    "Lion": ("tare.methods.lion", "Lion"),
    "LionKappa": ("tare.methods.lion_kappa", "LionKappa"),
    "MeZO": ("tare.methods.mezo", "MeZO"),
    "Muon": ("tare.methods.muon", "Muon"),
    "NotFinite": ("tare.core.clipping", "NotFinite"),
    "OnlineSubspace": ("tare.methods.online_subspace", "OnlineSubspace"),
    "Optimizer": ("tare.core.optimizer", "Optimizer"),
    "QGaLore": ("tare.methods.q_galore", "QGaLore"),
    "QZO": ("tare.methods.qzo", "QZO"),
    "QuantizedLinear": ("tare.zeroth.quantized", "QuantizedLinear"),
    "Recipe": ("tare.core.recipe", "Recipe"),
    "SWAN": ("tare.methods.swan", "SWAN"),
    "Scion": ("tare.methods.scion", "Scion"),
    "SeedLog": ("tare.zeroth.log", "SeedLog"),
    "SinkGD": ("tare.methods.sinkgd", "SinkGD"),
    "SparseMeZO": ("tare.methods.sparse_mezo", "SparseMeZO"),
    "StableEmbedding": ("tare.core.embedding", "StableEmbedding"),
    "Storage": ("tare.core.storage", "Storage"),
    "Subspace": ("tare.subspace.wrapper", "Subspace"),
    "SubspaceZO": ("tare.methods.subspace_zo", "SubspaceZO"),
    "Trion": ("tare.methods.trion", "Trion"),
    "ZO2": ("tare.methods.zo2", "ZO2"),
    "ZOAEDS": ("tare.methods.zo_ae_ds", "ZOAEDS"),
    "ZOFrankWolfe": ("tare.methods.zo_frank_wolfe", "ZOFrankWolfe"),
    "Workers": ("tare.zeroth.exchange", "Workers"),
    "ZORank": ("tare.methods.zo_rank", "ZORank"),
    "ZOSAH": ("tare.methods.zo_sah", "ZOSAH"),
    "create": ("tare.methods.registry", "build"),
    "dense_state_dict": ("tare.core.weights", "dense_state_dict"),
    "dequantize_weights_": ("tare.core.weights", "dequantize_weights_"),
    "every": ("tare.subspace.refresh", "every"),
    "load_gptq_": ("tare.zeroth.gptq", "load_gptq_"),
    "quantize_linear_": ("tare.zeroth.quantized", "quantize_linear_"),
    "quantize_weights_": ("tare.core.weights", "quantize_weights_"),
    "replay": ("tare.methods.replay", "replay"),
    "stable_embedding_": ("tare.core.embedding", "stable_embedding_"),
    "subspace_of": ("tare.subspace.wrapper", "subspace"),
}
_ROOMS = ("plan", "testing", "zeroth", "methods", "core", "rules", "subspace", "train", "report", "kernels")

__all__ = [*_NAMES, "__version__", "plan"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    if name == "hooks":
        return importlib.import_module("tare.parallel.hooks")
    if name in _ROOMS:
        return importlib.import_module(f"tare.{name}")
    raise AttributeError(f"module 'tare' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_ROOMS, "hooks"])
