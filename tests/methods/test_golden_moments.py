"""Adan, diffGrad and GradNormLoRP step as their authors' code did: the recorded traces."""

from typing import Any

import golden_cases
import pytest
import torch

from tare.methods import registry

PREFIXES = ("adan", "diffgrad", "gradnormlorp")


def translate(case: golden_cases.Case) -> tuple[str, dict[str, Any]]:
    """(key, constructor arguments) of a trace."""
    h = case.hyper
    common = {"betas": tuple(h["betas"]), "eps": h["eps"], "weight_decay": h["weight_decay"]}
    if case.name.startswith("adan"):
        return "adan", {**common, "no_prox": h["no_prox"], "max_grad_norm": h["max_grad_norm"]}
    if case.name.startswith("diffgrad"):
        return "diffgrad", common
    own = {"rank": h["rank"], "period": h["update_proj_gap"], "scale": h["scale"], "basis": golden_cases.svd_of(case)}
    return "gradnorm-lorp", {**common, **own, "form": "code", "side": golden_cases.SIDES[h["proj_type"]]}


@pytest.mark.parametrize("name", golden_cases.names(*PREFIXES))
def test_trace(name: str) -> None:
    case = golden_cases.load(name)
    key, hyper = translate(case)
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    optimizer = registry.build(key, [{"params": [weight], "role": "linear"}], lr=float(case.tensors["lr"][0]), **hyper)
    worst, _ = golden_cases.run(case, optimizer, weight)
    assert worst <= case.tolerance, f"{name}: {worst:.3g} > {case.tolerance:.3g}"


def test_all_traces_are_here() -> None:
    assert len(golden_cases.names(*PREFIXES)) == 6
