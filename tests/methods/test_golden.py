"""Every method steps as its authors' code did: the recorded traces, tall, wide, square, with schedules, decay and bf16."""

import golden_cases
import pytest
import torch

from tare.methods import registry

PREFIXES = ("control_torch_adamw", "lion", "galore", "fira", "apollo", "bnb_adamw8bit", "bnb_lion8bit")


@pytest.mark.parametrize("name", golden_cases.names(*PREFIXES))
def test_trace(name: str) -> None:
    case = golden_cases.load(name)
    key, hyper, role = golden_cases.translate(case)
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    optimizer = registry.build(key, [{"params": [weight], "role": role}], lr=float(case.tensors["lr"][0]), **hyper)
    worst, mean = golden_cases.run(case, optimizer, weight)
    assert worst <= case.tolerance, f"{name}: {worst:.3g} > {case.tolerance:.3g}"
    if "tolerance_mean_abs" in case.meta:
        assert mean <= case.meta["tolerance_mean_abs"], f"{name}: mean {mean:.3g}"
