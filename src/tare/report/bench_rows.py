"""What `tare bench step` compares: torch's AdamW, our methods, and other packages where they are installed. All step the same weights.

Peers are measured, never read: they are imported here and nowhere else in the library.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tare.core.leaf import Leaf, named_roles
from tare.core.recipe import matches
from tare.methods import registry
from tare.methods.base import TARGETS

Kind = Literal["torch", "tare", "peer"]
BAR = "torch-adamw-fused"
LR = 1e-6  # small: the same gradients are applied hundreds of times


@dataclass(frozen=True)
class Ranks:
    """The ranks of the published recipes as shares of the hidden size: GaLore and Fira 1/4, APOLLO 1/2 (60M: 128, 256)."""

    quarter: int
    half: int


@dataclass(frozen=True)
class Spec:
    """One row: how its optimizer is built. package: what must be importable. native: False runs without the C++ kernels."""

    key: str
    label: str
    kind: Kind
    build: Callable[[nn.Module, Ranks], torch.optim.Optimizer]
    package: str = ""
    native: bool = True
    refreshes: bool = False


@dataclass
class Contender:
    """A row's optimizer, ready to step."""

    spec: Spec
    optimizer: torch.optim.Optimizer
    first_ms: float = 0.0
    notes: list[str] = field(default_factory=list)

    def step(self) -> None:
        if self.spec.native:
            self.optimizer.step()
        else:
            with environment("TARE_NATIVE", "0"):
                self.optimizer.step()

    def jump(self, count: int) -> None:
        """Pretend that `count` steps were done, so that a refresh can be brought about."""
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), int):
                state["step"] = count


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """One environment variable set for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor reachable from the optimizer's state, projectors and tensor subclasses included, each once."""
    seen: dict[int, int] = {}
    _walk(list(optimizer.state.values()), seen, set(), depth=0)
    return sum(seen.values())


def _walk(value: Any, seen: dict[int, int], visited: set[int], depth: int) -> None:
    if depth > 6 or id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        else:
            for name in inner()[0]:
                _walk(getattr(value, name), seen, visited, depth + 1)
        return
    if isinstance(value, dict):
        parts: list[Any] = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        _walk(part, seen, visited, depth + 1)


# -- how each is built ---------------------------------------------------------------------------------------------


def _torch(**options: Any) -> Callable[[nn.Module, Ranks], torch.optim.Optimizer]:
    return lambda model, ranks: torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, **options)


def _ours(key: str, rank: Literal["quarter", "half"] | None = None, **hyper: Any) -> Callable[[nn.Module, Ranks], Any]:
    def build(model: nn.Module, ranks: Ranks) -> torch.optim.Optimizer:
        extra = {"rank": getattr(ranks, rank)} if rank else {}
        return registry.build(key, model, lr=LR, weight_decay=0.0, **extra, **hyper)

    return build


def _projected(model: nn.Module, **low_rank: Any) -> list[dict[str, Any]]:
    """Parameter groups as the published packages want them: the same leaves projected as in our own recipes."""
    low: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p, role in named_roles(model):
        leaf = Leaf(name, tuple(p.shape), p.dtype, role)
        (low if p.ndim == 2 and matches(TARGETS, leaf) else rest).append(p)
    return [{"params": rest}, {"params": low, "update_proj_gap": 200, "proj_type": "std", **low_rank}]


def _galore_torch(model: nn.Module, ranks: Ranks) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(_projected(model, rank=ranks.quarter, scale=0.25), lr=LR)


def _apollo_torch(model: nn.Module, ranks: Ranks) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(_projected(model, rank=ranks.half, proj="random", scale_type="channel", scale=1), lr=LR)


def _apollo_torch_mini(model: nn.Module, ranks: Ranks) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(_projected(model, rank=1, proj="random", scale_type="tensor", scale=128), lr=LR)


def _bitsandbytes(model: nn.Module, ranks: Ranks) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=LR, weight_decay=0.0)


def _torchao(model: nn.Module, ranks: Ranks) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=LR, weight_decay=0.0)


_RANDOMIZED = {"basis": "randomized"}  # the basis of the timed rows: between refreshes it costs what the SVD's does
ROWS: tuple[Spec, ...] = (
    Spec(BAR, "torch AdamW fused (the bar)", "torch", _torch(fused=True)),
    Spec("torch-adamw-foreach", "torch AdamW foreach (torch's default)", "torch", _torch(foreach=True)),
    Spec("adamw", "adamw", "tare", _ours("adamw")),
    Spec("adamw-8bit", "adamw-8bit, C++ kernels", "tare", _ours("adamw-8bit")),
    Spec("adamw-8bit-plain", "adamw-8bit, no compiler", "tare", _ours("adamw-8bit"), native=False),
    Spec("lion", "lion", "tare", _ours("lion")),
    Spec("galore", "galore r={quarter}", "tare", _ours("galore", "quarter", **_RANDOMIZED)),
    Spec("galore-8bit", "galore-8bit r={quarter}", "tare", _ours("galore-8bit", "quarter", **_RANDOMIZED)),
    Spec(
        "galore-adafactor", "galore-adafactor r={quarter}", "tare", _ours("galore-adafactor", "quarter", **_RANDOMIZED)
    ),
    Spec("fira", "fira r={quarter}", "tare", _ours("fira", "quarter", **_RANDOMIZED)),
    Spec("apollo", "apollo r={half}", "tare", _ours("apollo", "half")),
    Spec("apollo-quarter", "apollo r={quarter}", "tare", _ours("apollo", "quarter")),
    Spec("apollo-mini", "apollo-mini", "tare", _ours("apollo-mini")),
    Spec("galore-torch", "galore-torch r={quarter}", "peer", _galore_torch, "galore-torch"),
    Spec("apollo-torch", "apollo-torch r={half}", "peer", _apollo_torch, "apollo-torch"),
    Spec("apollo-torch-mini", "apollo-torch Mini", "peer", _apollo_torch_mini, "apollo-torch"),
    Spec("bitsandbytes-adamw8bit", "bitsandbytes AdamW8bit", "peer", _bitsandbytes, "bitsandbytes"),
    Spec("torchao-adamw8bit", "torchao AdamW8bit (compiled)", "peer", _torchao, "torchao"),
)
# A refresh of all matrices in one step, against a step without. Our exact SVD is the published algorithm.
REFRESHES: tuple[Spec, ...] = (
    Spec("galore", "galore r={quarter}, exact SVD", "tare", _ours("galore", "quarter")),
    Spec("galore", "galore r={quarter}, fp64 Gram", "tare", _ours("galore", "quarter", basis="gram")),
    Spec("galore", "galore r={quarter}, one power step", "tare", _ours("galore", "quarter", **_RANDOMIZED)),
    Spec("apollo", "apollo r={half}, Gaussian", "tare", _ours("apollo", "half")),
    Spec("apollo-mini", "apollo-mini, Gaussian", "tare", _ours("apollo-mini")),
    Spec("galore-torch", "galore-torch r={quarter}, SVD", "peer", _galore_torch, "galore-torch"),
    Spec("apollo-torch", "apollo-torch r={half}, Gaussian", "peer", _apollo_torch, "apollo-torch"),
)
STAGGERED: tuple[Spec, ...] = (
    Spec("galore", "galore r={quarter}, exact SVD, staggered", "tare", _ours("galore", "quarter", stagger=True)),
    Spec(
        "galore", "galore r={quarter}, one power step, staggered", "tare",
        _ours("galore", "quarter", stagger=True, **_RANDOMIZED),
    ),
    Spec("apollo", "apollo r={half}, Gaussian, staggered", "tare", _ours("apollo", "half", stagger=True)),
)  # fmt: skip


def installed(package: str) -> str | None:
    """The version of a peer, or None."""
    try:
        return version(package) if importlib.util.find_spec(package.replace("-", "_")) else None
    except (PackageNotFoundError, ImportError, ValueError):
        return None
