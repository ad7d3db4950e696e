"""The recorded traces of forward-only methods: their objectives rebuilt from arrays, and a run of any method along them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from golden_cases import read
from torch import Tensor, nn

from tare.testing.directions import RecordedDirections

FOLDER = Path(__file__).parent / "golden" / "zeroth"


@dataclass(frozen=True)
class Trace:
    """One recorded case. weights, directions and outputs by the names of the parameters."""

    name: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def hyper(self) -> dict[str, Any]:
        return self.meta["hyper"]

    @property
    def steps(self) -> int:
        return int(self.meta["steps"])

    @property
    def parameters(self) -> list[str]:
        return self.meta["params"]

    def each(self, key: str) -> dict[str, Tensor]:
        """A recorded tensor of every parameter: `W0`, `W`, `z`, `exp_avg` ..."""
        if key in self.tensors:
            return {self.parameters[0]: self.tensors[key]}
        return {name: self.tensors[f"{key}.{i}"] for i, name in enumerate(self.parameters)}

    def tolerance(self, key: str, name: str) -> float:
        bounds = self.meta["tolerance"]
        return float(bounds[key] if key in bounds else bounds[f"{key}.{self.parameters.index(name)}"])

    @property
    def directions(self) -> RecordedDirections:
        z = self.each("z")
        return RecordedDirections({t: {name: z[name][t] for name in z} for t in range(self.steps)})

    def lr(self, step: int) -> float:
        return float(self.tensors["lr"][step]) if "lr" in self.tensors else float(self.hyper["lr"])


def load(name: str) -> Trace:
    return Trace(name, *read(FOLDER / f"{name}.safetensors"))


class Objective(nn.Module):
    """The function of a trace, as a module with its parameters under their recorded names; `forward(t)` is its value at step t."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        for name, start in trace.each("W0").items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, Holder())
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_parameter(last, nn.Parameter(start.clone()))

    def weights(self) -> dict[str, Tensor]:
        """As the modules give them, so that what a memory plan puts in their place counts."""
        found: dict[str, Tensor] = {}
        for name in self.trace.parameters:
            path, _, last = name.rpartition(".")
            owner = self.get_submodule(path)
            found[name] = owner(last) if path else getattr(self, last)
        return found

    def forward(self, t: int) -> Tensor:
        return VALUES[self.trace.meta["objective"]](self.weights(), self.trace.tensors, t)


class Holder(nn.Module):
    """A module that hands out a parameter."""

    def forward(self, name: str) -> Tensor:
        return getattr(self, name)


def _quad(w: dict[str, Tensor], tensors: dict[str, Tensor], t: int) -> Tensor:
    a, b = (tensors[k][t] if tensors[k].ndim == 3 else tensors[k] for k in "AB")
    (weight,) = w.values()
    return 0.5 * (a @ weight - b).square().sum()


def _mlp(w: dict[str, Tensor], tensors: dict[str, Tensor], t: int) -> Tensor:
    w1, b1, g1, g2, w2, b2 = w.values()
    h = g2 * (g1 * torch.tanh(tensors["X"][t] @ w1.T + b1))
    return (0.5 * (h @ w2.T + b2 - tensors["Y"][t]).square().sum(1)).mean()


def _softmax(w: dict[str, Tensor], tensors: dict[str, Tensor], t: int) -> Tensor:
    weight, bias = w.values()
    return nn.functional.cross_entropy(tensors["X"][t] @ weight.T + bias, tensors["y"][t])


def _negacc(w: dict[str, Tensor], tensors: dict[str, Tensor], t: int) -> Tensor:
    weight, bias = w.values()
    right = (tensors["X"][t] @ weight.T + bias).argmax(1) == tensors["y"][t]
    return -right.to(weight.dtype).mean()


VALUES: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor], int], Tensor]] = {
    "quad": _quad, "mlp": _mlp, "softmax": _softmax, "negacc": _negacc,
}  # fmt: skip
