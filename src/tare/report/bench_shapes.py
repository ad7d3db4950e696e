"""What `tare bench step` steps: a named model's exact shapes, or one of its decoder layers, with fixed gradients."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tare.core.errors import InputError, nearest
from tare.plan.models import DTYPES, MODELS, build_model, config_for, named

LAYER = "-layer"  # `llama-7b-layer`: one decoder layer of llama-7b, for machines that do not hold the model


@dataclass(frozen=True)
class Bench:
    """Weights and gradients that all contenders share.

    preset: the named model whose presets apply. hidden: its width; published ranks are shares of it.
    """

    name: str
    preset: str
    model: nn.Module
    hidden: int
    dtype: Literal["fp32", "bf16"]
    device: torch.device

    def about(self) -> dict[str, Any]:
        """The sizes, as plain values."""
        item = DTYPES[self.dtype].itemsize
        sizes = {name: p.numel() for name, p in self.model.named_parameters() if p.ndim == 2}
        inner = [size for name, size in sizes.items() if "embed" not in name and "lm_head" not in name]
        return {
            "name": self.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "projected_matrices": len(inner),
            "largest_linear_bytes": item * max(inner),
            "largest_matrix_bytes": item * max(sizes.values()),
            "dtype": self.dtype,
            "device": self.device.type,
        }


def build(shapes: str, seed: int = 0, dtype: str = "fp32", device: str = "cpu") -> Bench:
    """The weights with Gaussian gradients of size 1e-3, drawn on the CPU, so equal everywhere.

    Raises:
        InputError: unknown shapes, a dtype other than fp32 and bf16, or a device that is not there.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    where = device_of(device)
    whole = named(shapes.removesuffix(LAYER))
    if whole is None:
        known = [*MODELS, f"llama-7b{LAYER}"]
        raise InputError(f"--shapes: unknown model {shapes!r}{nearest(shapes, known)}; models: {', '.join(known)}")
    single = shapes.endswith(LAYER)
    model = _layer(whole, DTYPES[dtype], seed) if single else build_model(whole, dtype=dtype, seed=seed)
    model.to(where)
    name = whole + LAYER if single else whole
    bench = Bench(name, whole, model, MODELS[whole].hidden, dtype, where)  # type: ignore[arg-type]
    fill(bench, seed)
    return bench


def fill(bench: Bench, seed: int) -> None:
    """Give every parameter its gradient, also one that an optimizer of blocks has frozen."""
    generator = torch.Generator().manual_seed(seed)
    for p in bench.model.parameters():
        p.requires_grad_(True)
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(p.dtype).to(bench.device)


def sums(bench: Bench) -> list[float]:
    """A number for each gradient, to see whether somebody changed it, or froze or cleared its parameter."""
    return [
        float(p.grad.double().sum()) if p.grad is not None and p.requires_grad else math.nan
        for p in bench.model.parameters()
    ]


def device_of(name: str) -> torch.device:
    """The device that a name means; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: cuda asked for, but this torch sees no GPU; use cpu or auto")
    return torch.device(name)


def _layer(key: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """The first decoder layer of a model that is built with one layer and next to no vocabulary."""
    config = config_for(key)
    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 8})
    model = build_model(config, dtype=dtype, seed=seed)
    return nn.ModuleDict({"layers": model.model.layers})  # type: ignore[union-attr, dict-item]


def shares(bench: Bench) -> tuple[int, int]:
    """The ranks of the published recipes: GaLore and Fira a quarter of the width, APOLLO's larger one half."""
    return bench.hidden // 4, bench.hidden // 2


def described(bench: Bench) -> str:
    """A name for files: shapes, and what is not the default."""
    parts = [bench.name, *([bench.dtype] if bench.dtype != "fp32" else [])]
    return "-".join([*parts, *([bench.device.type] if bench.device.type != "cpu" else [])])
