"""Property test: any rule x basis x side x lift x residual x storage either refuses at construction with InputError, or has
the bytes it says, steps over refreshes, and learns.
"""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.stepping import numbers
from torch import nn

from tare.core.errors import InputError
from tare.core.optimizer import Optimizer
from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.rules.adafactor import Adafactor
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.momentum import Momentum
from tare.subspace.bases import BASES
from tare.subspace.limiter import NormGrowth
from tare.subspace.refresh import Refresh
from tare.subspace.residual import NormRatioResidual
from tare.subspace.wrapper import Subspace
from tare.testing.costs import allocated

RULES = (
    Adam(), Adam((0.9, 0.99), 1e-6, "before"), Lion(), Momentum(0.0), Momentum(0.5), Momentum(0.5, nesterov=True),
    Adafactor(), Adafactor(0.9), Adafactor(form="torch"),
)  # fmt: skip
SHAPES = ((12, 5), (5, 12), (6, 6), (11, 7), (4, 3, 2, 2), (9, 1), (7,), ())

axes = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(RULES), "basis": st.sampled_from(sorted(BASES)), "rank": st.integers(1, 5),
        "period": st.integers(1, 4), "stagger": st.booleans(),
        "side": st.sampled_from(("shorter", "longer", "left", "right", "both")),
        "transfer": st.sampled_from(("keep", "zero", "rotate")), "lift": st.sampled_from(("back", "channel", "tensor")),
        "residual": st.sampled_from((None, "code", "paper")), "limiter": st.sampled_from((None, "skip", "legacy")),
        "scale": st.sampled_from((0.25, 1.0)), "front": st.booleans(), "decay": st.sampled_from(("before", "after")),
    }
)  # fmt: skip
storages = st.builds(
    Storage, st.sampled_from(("fp32", "bf16", "int8", "bf16_legacy")), st.sampled_from(("fp32", "bf16", "seed")),
    st.sampled_from(("plain", "stochastic")), st.sampled_from((64, 256)), st.just(1),
)  # fmt: skip


def subspace(a: dict[str, Any]) -> Subspace:
    return Subspace(
        a["rule"], BASES[a["basis"]](a["rank"]), Refresh(a["period"], a["stagger"]), a["side"], a["transfer"], a["lift"],
        a["scale"], a["front"], NormRatioResidual(a["residual"]) if a["residual"] else None,
        NormGrowth(zero=a["limiter"]) if a["limiter"] else None,
    )  # fmt: skip


def refused(a: dict[str, Any], storage: Storage) -> bool:
    """What the documentation says is refused; anything else must work."""
    outside = a["lift"] != "back" and a["residual"] is not None
    two_sided = a["side"] == "both" and (a["lift"] != "back" or a["residual"] is not None)
    seeded = storage.basis == "seed" and (a["basis"] != "gaussian" or a["transfer"] == "rotate")
    return outside or two_sided or seeded


def mended(a: dict[str, Any], storage: Storage) -> tuple[dict[str, Any], Storage]:
    """The nearest combination that is not refused."""
    a = dict(a)
    if a["lift"] != "back":
        a["residual"] = None
        if a["side"] == "both":
            a["side"] = "longer"
    elif a["side"] == "both":
        a["residual"] = None
    if storage.basis == "seed":
        a["basis"] = "gaussian"
        if a["transfer"] == "rotate":
            a["transfer"] = "zero"
    return a, storage


@settings(max_examples=160, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    axes, storages, st.sampled_from(SHAPES), st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    st.sampled_from((True, True, True, False)),
)  # fmt: skip
def test_any_combination_refuses_or_works(
    a: dict[str, Any], storage: Storage, shape: tuple[int, ...], dtype: Any, mend: bool
) -> None:
    if mend:
        a, storage = mended(a, storage)
    goal = numbers("goal", shape)
    p = nn.Parameter((goal + numbers("w", shape)).to(dtype))
    try:
        opt = Optimizer(
            [{"params": [("w", p)], "role": "linear"}], Recipe((("*", subspace(a)),), a["decay"]), 0.01, storage=storage
        )
    except InputError:
        # A leaf without a matrix, or too small for the rank, is stepped dense and keeps no basis to refuse.
        assert refused(a, storage)
        return
    assert opt.state_bytes().total == allocated(opt)
    losses = []
    for _ in range(16):
        p.grad = p.detach() - goal.to(dtype)
        losses.append(p.grad.double().square().sum().item())
        opt.step()
    assert torch.isfinite(p).all()
    assert losses[-1] < losses[0], f"from {losses[0]} to {losses[-1]}"
    assert opt.state_bytes().total == allocated(opt)
    for value in opt.state[p].values():
        assert type(value) in (int, torch.Tensor)
