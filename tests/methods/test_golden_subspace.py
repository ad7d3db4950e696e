"""The subspace family steps as its authors' code did: FRUGAL, Online Subspace Descent, DCT-AdamW, Q-GaLore's calendar and projection."""

from dataclasses import dataclass, field
from typing import Any

import golden_cases
import pytest
import torch

import tare
from tare.subspace.bases import Basis
from tare.testing import RecordedBasis

LINEAR = "linear"


def step_through(case: golden_cases.Case, optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
    worst, _ = golden_cases.run(case, optimizer, weight)
    assert worst <= case.tolerance, f"{case.name}: {worst:.3g} > {case.tolerance:.3g}"


def numbers(case: golden_cases.Case, name: str = "indices") -> RecordedBasis:
    """The recorded selections as an input."""
    steps = case.tensors[f"{name}_step"].tolist()
    return RecordedBasis({step: case.tensors[name][k] for k, step in enumerate(steps)})


@pytest.mark.parametrize("name", [n for n in golden_cases.names("frugal_") if not n.startswith("frugal_block")])
def test_frugal(name: str) -> None:
    case = golden_cases.load(name)
    h = case.hyper
    hyper: dict[str, Any] = {
        "density": h["density"], "period": h["update_gap"], "outside_scale": h["inactive_lr_scale"], "betas": h["betas"],
        "scale": h["proj_params_lr_scale"], "weight_decay": h["weight_decay"],
        "inner": {"adamw": "adam"}.get(h["inner"], h["inner"]), "selection": h.get("coord_choice", h.get("proj_type")),
    }  # fmt: skip
    if "eps" in h:
        hyper["eps"] = h["eps"]
    if "indices" in case.tensors:
        hyper["basis"] = numbers(case)
    elif hyper["selection"] == "random":
        hyper["basis"] = golden_cases.recorded(case)
    else:
        case.meta["hyper"]["rank"] = h["density"]
        hyper["basis"] = golden_cases.svd_of(case)
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    step_through(case, tare.create("frugal", [{"params": [weight], "role": LINEAR}], lr=1.0, **hyper), weight)


@pytest.mark.parametrize("name", golden_cases.names("osd_"))
def test_online_subspace(name: str) -> None:
    case = golden_cases.load(name)
    h = case.hyper
    lion = "lion" in name
    hyper: dict[str, Any] = {
        "rank": h["rank"], "gap": h["update_proj_gap"], "scale": h["scale"], "betas": h["betas"],
        "weight_decay": h["weight_decay"], "rule": "lion" if lion else "adam",
    }  # fmt: skip
    if not lion:
        hyper["eps"] = h["eps"]
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    optimizer = tare.create("online-subspace", [{"params": [weight], "role": LINEAR}], lr=h["constructor_lr"], **hyper)
    step_through(case, optimizer, weight)
    p, wanted = optimizer.state[weight]["basis"], case.tensors["P"][-1]
    assert (p.abs() - wanted.abs()).abs().max() < 1e-4  # signs of the first SVD are LAPACK's


@pytest.mark.parametrize("name", [n for n in golden_cases.names("dct_") if "multi" not in n])
def test_dct_adamw(name: str) -> None:
    case = golden_cases.load(name)
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    optimizer = tare.create(
        "dct-adamw", [{"params": [weight], "role": LINEAR}], lr=1.0, basis=numbers(case), **dct_options(case)
    )
    step_through(case, optimizer, weight)


@pytest.mark.parametrize("name", [n for n in golden_cases.names("dct_") if "multi" not in n])
def test_dct_adamw_selects_the_recorded_columns(name: str) -> None:
    """Its own search finds the recorded sets (their order is the recording's)."""
    case = golden_cases.load(name)
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    optimizer = tare.create("dct-adamw", [{"params": [weight], "role": LINEAR}], lr=1.0, **dct_options(case))
    steps = case.tensors["indices_step"].tolist()
    for t in range(case.meta["steps"]):
        weight.grad = case.tensors["G"][t].clone()
        optimizer.param_groups[0]["lr"] = float(case.tensors["lr"][t])
        optimizer.step()
        if t in steps:
            wanted = case.tensors["indices"][steps.index(t)].sort().values
            assert torch.equal(optimizer.state[weight]["basis"].long(), wanted)


def dct_options(case: golden_cases.Case) -> dict[str, Any]:
    h = case.hyper
    return {
        "rank": h["rank"], "period": h["update_proj_gap"], "transform": h["sim_type"], "norm": h["ell_norm"],
        "feedback": "moment" if h["use_ef"] else "none", "transfer": "rotate" if h["rotate_subspace"] else "keep",
        "betas": h["betas"], "eps": h["eps"], "weight_decay": h["weight_decay"],
    }  # fmt: skip


def test_dct_adamw_with_several_leaves() -> None:
    case = golden_cases.load("dct_adamw_multi_shared_basis")
    weights = [torch.nn.Parameter(case.tensors[f"W0.{i}"].clone()) for i in range(4)]
    groups = [
        {
            "params": [w],
            "role": LINEAR if i < 3 else "norm",
            **({"basis": numbers(case, f"indices.{i}")} if i < 3 else {}),
        }
        for i, w in enumerate(weights)
    ]
    optimizer = tare.create("dct-adamw", groups, lr=1.0, **dct_options(case))
    for t in range(case.meta["steps"]):
        for i, w in enumerate(weights):
            w.grad = case.tensors[f"G.{i}"][t].clone()
        for group in optimizer.param_groups:
            group["lr"] = float(case.tensors["lr"][t])
        optimizer.step()
        for i, w in enumerate(weights):
            assert (w.detach() - case.tensors[f"W.{i}"][t]).abs().max() <= case.tolerance


@pytest.mark.parametrize("name", golden_cases.names("qgalore_lazy"))
def test_q_galore_calendar(name: str) -> None:
    """Fed with the recorded bases, the signed-cosine calendar refreshes when the code did and keeps the same periods."""
    case = golden_cases.load(name)
    h, t = case.hyper, case.tensors
    bases = {int(step): t["bases"][k] for k, step in enumerate(t["refresh_step"])}
    weight = torch.nn.Parameter(torch.zeros(t["bases"].shape[1], 24))
    optimizer = tare.create(
        "q-galore", [{"params": [weight], "role": LINEAR}], lr=1e-3, rank=h["rank"], period=h["update_proj_gap"],
        threshold=h["cos_threshold"], growth=float(h["gamma_proj"]), queue=h["queue_size"], similarity="vector",
        basis=Handed(h["rank"], bases), storage={},
    )  # fmt: skip
    for step in range(len(t["gap"])):
        weight.grad = torch.ones_like(weight)
        before = optimizer.state[weight]["refreshed"]
        optimizer.step()
        assert (optimizer.state[weight]["refreshed"] > before) == (step in bases), f"step {step}"
        assert optimizer.state[weight]["gap"] == int(t["gap"][step])


@dataclass(frozen=True)
class Handed(Basis):
    """Recorded bases whose calendar is the method's own."""

    bases: dict[int, torch.Tensor] = field(default_factory=dict)

    def compute(self, grad: Any, side: Any, previous: Any, key: int, index: int = 0) -> torch.Tensor | None:
        return self.bases[index]


def test_q_galore_with_plain_weights() -> None:
    """8-bit Adam in an int4 basis; the recorded P is what the SVD gave before it was quantised."""
    case = golden_cases.load("qgalore_full_float_w_tall")
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    optimizer = tare.create("q-galore", [{"params": [weight], "role": LINEAR}], lr=1.0, **q_galore_options(case))
    step_through(case, optimizer, weight)


def q_galore_options(case: golden_cases.Case) -> dict[str, Any]:
    h = case.hyper
    storage = tare.Storage(
        moment="int8", basis="int4", group=h["quant_group_size"], min_quantized=h["min_8bit_size"], block=256
    )
    return {
        "rank": h["rank"], "period": h["update_proj_gap"], "scale": h["scale"], "betas": h["betas"], "eps": h["eps"],
        "weight_decay": h["weight_decay"], "threshold": h["cos_threshold"], "growth": float(h["gamma_proj"]),
        "queue": h["queue_size"], "similarity": "vector", "storage": storage,
        "basis": golden_cases.recorded(case),
    }  # fmt: skip
