"""The recorded traces: arrays stepped by the authors' code, and how each of their hyperparameters is called here."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tare.core.storage import Storage
from tare.subspace.bases import SVDBasis
from tare.subspace.projection import Side
from tare.testing import RecordedBasis

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    name: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def hyper(self) -> dict[str, Any]:
        return self.meta["hyper"]

    @property
    def tolerance(self) -> float:
        return self.meta["tolerance_abs"]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, tensors) of a recorded case."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["case"])
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def load(name: str) -> Case:
    return Case(name, *read(FOLDER / f"{name}.safetensors"))


def names(*prefixes: str) -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.safetensors") if p.stem.startswith(prefixes))


@dataclass(frozen=True)
class SVDWithRecordedSigns(SVDBasis):
    """The library's own SVD, each vector in the sign of the trace.

    Signs are LAPACK's choice and kept moments feel them at a refresh, so another build of LAPACK would step otherwise.
    """

    trace: dict[tuple[int, str], Tensor] = field(default_factory=dict, compare=False)

    def compute(self, grad: Tensor, side: Side, previous: Tensor | None, key: int, index: int = 0) -> Tensor | None:
        own = super().compute(grad, side, previous, key, index)
        signs = (own * self.trace[index, side]).sum(0).sign()
        return own * signs.to(own.dtype)


def svd_of(case: Case) -> SVDWithRecordedSigns:
    trace = {}
    for name, sides in (("P", ("left", "right")), ("P_left", ("left",)), ("P_right", ("right",))):
        if name in case.tensors:
            for k, step in enumerate(case.tensors[f"{name}_step"].tolist()):
                trace.update({(step, side): case.tensors[name][k] for side in sides})
    return SVDWithRecordedSigns(case.hyper["rank"], trace)


SIDES = {"std": "shorter", "reverse_std": "longer", "left": "left", "right": "right", "full": "both"}


def recorded(case: Case) -> RecordedBasis:
    """The bases of the trace as an input."""
    steps = case.tensors["P_step"].tolist()
    return RecordedBasis({step: case.tensors["P"][k] for k, step in enumerate(steps)})


def translate(case: Case) -> tuple[str, dict[str, Any], str]:
    """(registry key, constructor arguments, role) that this trace means."""
    h, entry = case.hyper, case.meta["entry"]
    common = {"weight_decay": h.get("weight_decay", 0.0)}
    if "betas" in h:
        common["betas"] = tuple(h["betas"])
    if entry == "torch.optim.AdamW":
        return "adamw", {**common, "eps": h["eps"]}, "linear"
    if entry == "bitsandbytes.optim.AdamW8bit":
        return (
            "adamw-8bit",
            {**common, "eps": h["eps"], "min_quantized": h["min_8bit_size"], "block": h["blocksize"]},
            "linear",
        )
    if entry == "bitsandbytes.optim.Lion8bit":
        return "lion", {**common, "storage": Storage(moment="int8", min_quantized=1, block=h["blocksize"])}, "linear"
    if entry == "lion.lion_pytorch.Lion":
        return "lion", common, "linear"
    if "rank" in h:
        common["basis"] = svd_of(case)
    low = {"period": h.get("update_proj_gap", 200), "side": SIDES[h.get("proj_type", "std")]}
    if case.meta["dtype"] == "bfloat16":
        low["storage"] = Storage(moment="bf16_legacy")
    if entry.startswith("galore_torch.adafactor"):
        own = {k: h[k] for k in ("rank", "scale", "beta1", "decay_rate", "clip_threshold", "scale_parameter")}
        return "galore-adafactor", {**common, **low, **own, "eps": tuple(h["eps"])}, "linear"
    if entry.startswith("galore_torch"):
        if "rank" not in h:  # the repository's AdamW without projection: what its dense leaves get
            return "galore", {**common, "eps": h["eps"], "storage": low.get("storage")}, "norm"
        return "galore", {**common, **low, "rank": h["rank"], "scale": h["scale"], "eps": h["eps"]}, "linear"
    if "fira" in entry:
        own = {"rank": h["rank"], "scale": h["alpha"], "gamma": h["gamma"], "eps": h["eps"], "limiter_zero": "legacy"}
        return "fira", {**common, **low, **own}, "linear"
    if entry.startswith("apollo"):
        own = {"rank": h["rank"], "scale": h["scale"], "scale_front": h["scale_front"], "eps": h["eps"]}
        own |= {"gamma": None if h["disable_nl"] else h["gamma"], "lift": h["scale_type"], "limiter_zero": "legacy"}
        own["basis"] = svd_of(case) if h["proj"] == "svd" else recorded(case)
        return "apollo-mini" if h["rank"] == 1 else "apollo", {**common, **low, **own}, "linear"
    raise KeyError(entry)


def run(case: Case, optimizer: torch.optim.Optimizer, weight: Tensor) -> tuple[float, float]:
    """Step through the trace; (largest, largest mean) absolute difference of the weights over all steps."""
    worst = mean = 0.0
    for t in range(case.meta["steps"]):
        weight.grad = case.tensors["G"][t].clone()
        optimizer.param_groups[0]["lr"] = float(case.tensors["lr"][t])
        optimizer.step()
        gap = (weight.detach().double() - case.tensors["W"][t].double()).abs()
        worst, mean = max(worst, gap.max().item()), max(mean, gap.mean().item())
    return worst, mean
