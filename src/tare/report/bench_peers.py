"""Other packages in `tare bench step`: torch's own optimizers and those of the extra `peers`, where they are installed.

Peers are imported here and nowhere else in the library. Each is built as its authors show it, on
the same leaves as our own recipes; what only acts on matrices leaves the rest to torch's fused AdamW, as ours does. The package
badam is no row: it freezes and clears what the others step.
"""

import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tare.core.leaf import Leaf, named_roles
from tare.core.recipe import matches
from tare.methods.base import TARGETS
from tare.report.bench_rows import LR, Spec, torch_adamw
from tare.report.bench_shapes import Bench, shares


class Together(torch.optim.Optimizer):
    """Two optimizers stepped one after the other, as one row."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        for part in parts:
            self.state.update(part.state)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
        if not self.state:  # there only after the first step; kept here to be counted
            for part in self.parts:
                self.state.update(part.state)


def split(bench: Bench) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves that our recipes project, and the others."""
    low: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p, role in named_roles(bench.model):
        leaf = Leaf(name, tuple(p.shape), p.dtype, role)
        (low if p.ndim == 2 and matches(TARGETS, leaf) else rest).append(p)
    return low, rest


def groups(bench: Bench, **low_rank: Any) -> list[dict[str, Any]]:
    """Parameter groups as the published low-rank packages want them."""
    low, rest = split(bench)
    return [{"params": rest}, {"params": low, "update_proj_gap": 200, "proj_type": "std", **low_rank}]


def _everywhere(module: str, name: str, **options: Any) -> Callable[[Bench], torch.optim.Optimizer]:
    """A class of a package on all parameters."""

    def build(bench: Bench) -> torch.optim.Optimizer:
        made = getattr(importlib.import_module(module), name)
        optimizer: torch.optim.Optimizer = made(list(bench.model.parameters()), lr=LR, **options)
        return optimizer

    return build


def _low(
    key: str, label: str, name: str, rank: Callable[[Bench], int], against: str, *, module: str = "", cuda: bool = False,
    options: dict[str, Any] | None = None, **low: Any,
) -> Spec:  # fmt: skip
    """A low-rank class of a package, on our groups."""
    package = module or "-".join(key.split("-")[:2])  # `apollo-torch-mini` is a row of apollo-torch
    where = package.replace("-", "_")

    def build(bench: Bench) -> torch.optim.Optimizer:
        made = getattr(importlib.import_module(where), name)
        optimizer: torch.optim.Optimizer = made(groups(bench, rank=rank(bench), **low), lr=LR, **(options or {}))
        return optimizer

    return Spec(key, label, "peer", build, package, against=against, rank=rank, cuda=cuda)


def _quarter(bench: Bench) -> int:
    return shares(bench)[0]


def _half(bench: Bench) -> int:
    return shares(bench)[1]


def _one(bench: Bench) -> int:
    return 1


def _torch_muon(bench: Bench) -> torch.optim.Optimizer:
    low, rest = split(bench)
    return Together(
        torch.optim.Muon(low, lr=LR, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=LR, weight_decay=0.0, fused=True),
    )


def _pytorch_optimizer_muon(bench: Bench) -> torch.optim.Optimizer:
    from pytorch_optimizer import Muon

    low, rest = split(bench)
    return Muon([{"params": low, "use_muon": True}, {"params": rest, "use_muon": False}], lr=LR, adamw_lr=LR)


def _heavyball_muon(bench: Bench) -> torch.optim.Optimizer:
    from heavyball import Muon

    low, rest = split(bench)
    return Together(Muon(low, lr=LR), torch.optim.AdamW(rest, lr=LR, weight_decay=0.0, fused=True))


def _po(name: str, against: str, label: str = "", build: Any = None, **options: Any) -> Spec:
    made = build or _everywhere("pytorch_optimizer", name, **options)
    key = f"pytorch-optimizer-{name.lower()}"
    return Spec(key, label or f"pytorch_optimizer {name}", "peer", made, "pytorch_optimizer", against=against)


def _po_low(name: str, against: str, rank: Callable[[Bench], int], **low: Any) -> Spec:
    key = f"pytorch-optimizer-{name.lower()}"
    return _low(key, f"pytorch_optimizer {name} r={{rank}}", name, rank, against, module="pytorch_optimizer", **low)


_CHANNEL: dict[str, Any] = {"proj": "random", "scale_type": "channel"}
PEERS: tuple[Spec, ...] = (
    Spec("torch-adamw-foreach", "torch AdamW foreach (torch's default)", "torch", torch_adamw(foreach=True), against="adamw"),
    Spec("torch-adafactor", "torch Adafactor", "torch", _everywhere("torch.optim", "Adafactor")),
    Spec("torch-muon", "torch Muon + fused AdamW", "torch", _torch_muon, against="muon"),
    _low("galore-torch", "galore-torch r={rank}", "GaLoreAdamW", _quarter, "galore", scale=0.25),
    _low("galore-torch-8bit", "galore-torch 8-bit r={rank}", "GaLoreAdamW8bit", _quarter, "galore-8bit", scale=0.25, cuda=True),
    _low(
        "galore-torch-adafactor", "galore-torch Adafactor r={rank}", "GaLoreAdafactor", _quarter, "galore-adafactor",
        scale=0.25, options={"relative_step": False, "scale_parameter": False},
    ),
    _low("apollo-torch", "apollo-torch r={rank}", "APOLLOAdamW", _half, "apollo", scale=1, **_CHANNEL),
    _low("apollo-torch-quarter", "apollo-torch r={rank}", "APOLLOAdamW", _quarter, "apollo", scale=1, **_CHANNEL),
    _low(
        "apollo-torch-mini", "apollo-torch Mini", "APOLLOAdamW", _one, "apollo-mini", scale=128, proj="random",
        scale_type="tensor",
    ),
    Spec(
        "bitsandbytes-adamw8bit", "bitsandbytes AdamW8bit", "peer",
        _everywhere("bitsandbytes.optim", "AdamW8bit", weight_decay=0.0), "bitsandbytes", against="adamw-8bit",
    ),
    Spec("bitsandbytes-lion8bit", "bitsandbytes Lion8bit", "peer", _everywhere("bitsandbytes.optim", "Lion8bit"), "bitsandbytes"),
    Spec(
        "torchao-adamw8bit", "torchao AdamW8bit (compiled)", "peer",
        _everywhere("torchao.optim", "AdamW8bit", weight_decay=0.0), "torchao", against="adamw-8bit",
    ),
    Spec(
        "torchao-adamw4bit", "torchao AdamW4bit (compiled)", "peer",
        _everywhere("torchao.optim", "AdamW4bit", weight_decay=0.0), "torchao", against="adamw-4bit",
    ),
    _po_low("GaLore", "galore", _quarter, scale=0.25, projection_type="std"),
    _po_low("APOLLO", "apollo", _quarter, scale=1.0, projection_type="random"),
    _po_low("Fira", "fira", _quarter, scale=0.25, projection_type="std"),
    _po("Lion", "lion"),
    _po("Adan", "adan"),
    _po("DiffGrad", "diffgrad"),
    _po("SCION", "scion"),
    _po("Muon", "muon", build=_pytorch_optimizer_muon),
    _po("RACS", ""),
    Spec("lion-pytorch", "lion-pytorch", "peer", _everywhere("lion_pytorch", "Lion"), "lion-pytorch", against="lion"),
    Spec("adan-pytorch", "adan-pytorch", "peer", _everywhere("adan_pytorch", "Adan"), "adan-pytorch", against="adan"),
    Spec(
        "heavyball-adamw", "HeavyBall AdamW (compiled)", "peer", _everywhere("heavyball", "AdamW"), "heavyball",
        against="adamw", slow=True,
    ),
    Spec(
        "heavyball-muon", "HeavyBall Muon + fused AdamW (compiled)", "peer", _heavyball_muon, "heavyball", against="muon",
        slow=True,
    ),
    Spec(
        "flashoptim-adamw", "FlashOptim AdamW, 8-bit moments", "peer",
        _everywhere("flashoptim", "FlashAdamW", weight_decay=0.0), "flashoptim", against="adamw-8bit", cuda=True,
    ),
    Spec("flashoptim-lion", "FlashOptim Lion, 8-bit moment", "peer", _everywhere("flashoptim", "FlashLion"), "flashoptim", cuda=True),
)  # fmt: skip

# Packages whose refresh can be brought about from outside: their step numbers lie in `state[p]["step"]`.
REFRESHES = ("galore-torch", "apollo-torch")


def installed(package: str) -> str | None:
    """The version of a package, or None; "" (torch itself) is always there."""
    if not package:
        return str(torch.__version__)
    try:
        return version(package) if importlib.util.find_spec(package.replace("-", "_")) else None
    except (PackageNotFoundError, ImportError, ValueError):
        return None
