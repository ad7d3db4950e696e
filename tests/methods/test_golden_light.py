"""State-light methods against recorded traces: Muon, Scion with all its oracles, SinkGD, SWAN."""

from typing import Any

import golden_cases
import pytest
import torch

from tare.core.leaf import Leaf
from tare.methods import registry
from tare.methods.lion_kappa import LionKappa
from tare.methods.scion import Scion
from tare.rules.lmo import BiasRMS, ColNormBall, Norm, RowNormBall, SignNorm, Spectral, SpectralConv
from tare.rules.maps import Orthogonal, Sinkhorn, Whiten

NORMS: dict[str, type[Norm]] = {
    "Spectral": Spectral, "SpectralConv": SpectralConv, "Sign": SignNorm, "ColNorm": ColNormBall,
    "RowNorm": RowNormBall, "BiasRMS": BiasRMS,
}  # fmt: skip


def norm_of(case: golden_cases.Case) -> Norm:
    """The recorded traces ran Newton-Schulz in float32."""
    own: dict[str, Any] = dict(case.hyper["norm_kwargs"])
    if "max" in own:
        own["maximum"] = own.pop("max")
    kind = NORMS[case.hyper["norm"]]
    return kind(**own, **({"post": Orthogonal(dtype="fp32")} if issubclass(kind, Spectral) else {}))


@pytest.mark.parametrize("name", golden_cases.names("muon", "control_torch_muon"))
def test_muon(name: str) -> None:
    case = golden_cases.load(name)
    h = case.hyper
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    dtype = h.get("ns_dtype", "bf16")  # torch's own works in bf16
    own = {"momentum": h["momentum"], "weight_decay": h["weight_decay"], "ns_dtype": dtype}
    optimizer = registry.build("muon", [{"params": [weight], "role": "linear"}], lr=1.0, **own)
    worst, _ = golden_cases.run(case, optimizer, weight)
    assert worst <= case.tolerance, f"{name}: {worst:.3g} > {case.tolerance:.3g}"


@pytest.mark.parametrize("name", golden_cases.names("scion_lmo"))
def test_scion_oracles(name: str) -> None:
    case = golden_cases.load(name)
    x, y = case.tensors["x"], case.tensors["y"]
    role = {1: "bias", 2: "linear"}.get(x.ndim, "conv")
    got = norm_of(case).lmo(x, Leaf("w", tuple(x.shape), x.dtype, role))  # type: ignore[arg-type]
    assert (got - y).abs().max().item() <= case.tolerance


@pytest.mark.parametrize("name", ["scion_spectral_tall", "scion_sign_wide", "scion_rownorm_square"])
def test_scion(name: str) -> None:
    case = golden_cases.load(name)
    h = case.hyper
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    own = {"averaging": h["momentum"], "scale": h["scale"], "weight_decay": 0.0 if h["unconstrained"] else 1.0}
    optimizer = Scion([{"params": [weight], "role": "linear"}], lr=1.0, hidden=norm_of(case), **own)
    worst, _ = golden_cases.run(case, optimizer, weight)
    assert worst <= case.tolerance, f"{name}: {worst:.3g} > {case.tolerance:.3g}"


def test_scion_light() -> None:
    """The gradient is added to what the last step left in p.grad, as backward does; zero_grad is part of the loop."""
    case = golden_cases.load("scion_light_spectral_wide_unc")
    h = case.hyper
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    optimizer = Scion(
        [{"params": [weight], "role": "linear"}], averaging=h["momentum"], scale=h["scale"], weight_decay=0.0,
        hidden=norm_of(case), light=True,
    )  # fmt: skip
    assert optimizer.state_bytes().total == 0
    for t in range(case.meta["steps"]):
        optimizer.zero_grad()
        (weight * case.tensors["G"][t]).sum().backward()
        optimizer.param_groups[0]["lr"] = float(case.tensors["lr"][t])
        optimizer.step()
        assert (weight.detach() - case.tensors["W"][t]).abs().max().item() <= case.tolerance


@pytest.mark.parametrize("name", golden_cases.names("sinkgd"))
def test_sinkgd(name: str) -> None:
    case = golden_cases.load(name)
    got = Sinkhorn(case.hyper["iterations"])(case.tensors["x"])
    assert (got - case.tensors["y"]).abs().max().item() <= case.tolerance


@pytest.mark.parametrize("name", golden_cases.names("swan"))
def test_swan(name: str) -> None:
    case = golden_cases.load(name)
    iterations = case.hyper["newton_schulz_iterations"]
    rows: Any = "centred" if case.hyper["centre_rows"] else "rms"
    x = case.tensors["x"]
    for rescale, wanted in ((False, case.tensors["whitened"]), (True, case.tensors["y"])):
        got = Whiten(iterations, rows, rescale)(x)
        assert (got - wanted).abs().max().item() <= case.tolerance
    exact = Whiten(iterations, rows, True, "eigh")(x)
    assert (exact - case.tensors["y"]).abs().max().item() <= case.tolerance


@pytest.mark.parametrize("name", golden_cases.names("lion_"))
def test_lion_kappa_l1(name: str) -> None:
    """K = l1 is Lion: the traces of Lion's authors."""
    case = golden_cases.load(name)
    weight = torch.nn.Parameter(case.tensors["W0"].clone())
    own = {"betas": tuple(case.hyper["betas"]), "weight_decay": case.hyper["weight_decay"]}
    worst, _ = golden_cases.run(case, LionKappa([weight], kappa="l1", **own), weight)
    assert worst <= case.tolerance
