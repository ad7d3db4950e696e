"""MeZO and the variants of ZO-LLM step as their authors' code did: the recorded traces."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from zeroth_cases import Objective, Trace, load

from tare.methods.mezo import MeZO
from tare.zeroth.optimizer import Record
from tare.zeroth.probes import Asking, Estimate, Term, away

MEMORY = ("forward", "in-place", "in-place-exact")


def options(trace: Trace) -> dict[str, Any]:
    """The constructor's arguments that a trace means."""
    h = trace.hyper
    own: dict[str, Any] = {"n": h.get("n", 1), "weight_decay": h.get("weight_decay", 0.0)}
    if "eps" in h:
        own["eps"] = h["eps"]
    if h.get("momentum"):
        own |= {"rule": "momentum", "momentum": h["momentum"]}
    if h.get("optimizer") == "adam":
        own |= {"rule": "adam", "betas": tuple(h["betas"]), "adam_eps": h["adam_eps"]}
    if "one-point" in trace.meta["variant"]:
        own["probe"] = "one-point"
    if h.get("mode") == "one_side":
        own["probe"] = "one-sided"
    if "scales" in h:
        own["scales"] = dict(zip(trace.parameters, h["scales"], strict=True))
        own["modify"] = "expectation" if h["expectation_modified"] else "variance"
    trainer = h.get("trainer")
    if trainer == "zo_sign_opt":
        own["coefficients"] = "sign"
    if trainer in ("zo_conserv", "forward_grad"):
        own["probe"] = {"zo_conserv": "conservative", "forward_grad": "forward-gradient"}[trainer]
    return own


def run(trace: Trace, **own: Any) -> tuple[MeZO, Objective, list[Record]]:
    """Step through a trace, comparing every recorded tensor at every step."""
    model = Objective(trace)
    records: list[Record] = []
    opt = MeZO(
        model, trace.lr(0), **{**options(trace), "directions": trace.directions, "on_step": records.append, **own}
    )
    for t in range(trace.steps):
        opt.param_groups[0]["lr"] = trace.lr(t)
        opt.step(lambda t=t: model(t))
        for name, p in model.named_parameters():
            close(p.detach(), trace.each("W")[name][t], trace.tolerance("W", name), f"{name} after step {t}")
        close(
            losses_of(records[t], trace),
            trace.tensors["loss"][t].flatten(),
            trace.tolerance("loss", ""),
            f"losses of step {t}",
        )
        close(
            torch.tensor(records[t].deltas, dtype=torch.float64),
            trace.tensors["delta"][t].flatten(),
            trace.tolerance("delta", ""),
            f"delta of step {t}",
        )
    return opt, model, records


def losses_of(record: Record, trace: Trace) -> torch.Tensor:
    """In the order of the trace: the one-sided code evaluates theta last."""
    found = torch.tensor(record.losses, dtype=torch.float64)
    return found.flip(0) if trace.hyper.get("mode") == "one_side" else found


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    gap = (got.double() - wanted.double()).abs().max().item()
    assert gap <= tolerance, f"{what}: off by {gap:.3g} > {tolerance:.3g}"


SHARP = (
    "mezo_quad_f64", "mezo_mlp_wd_f64", "mezo_mlp_wd_f32", "mezo_n4_mean_f64", "mezo_one_point_f64", "mezo_layer_scales_f64",
    "mezo_accuracy_f64", "mezo_momentum_f64", "mezo_adam_f64", "zollm_sign_f64", "zollm_conserv_f64", "zollm_one_side_momentum_f64",
)  # fmt: skip


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", SHARP)
def test_trace(name: str, memory: str) -> None:
    run(load(name), memory=memory)


def test_forward_gradient() -> None:
    run(load("zollm_forward_grad_f64"))


@pytest.mark.parametrize("name", ["mezo_adam_f64", "mezo_momentum_f64", "zollm_one_side_momentum_f64"])
def test_moments_by_replay(name: str) -> None:
    """Untruncated: the recorded trajectory, and bit for bit that of the moments kept dense."""
    dense, kept, _ = run(load(name))
    replayed, none, _ = run(load(name), moments="replay", tolerance=0.0)
    for (leaf, p), (_, q) in zip(kept.named_parameters(), none.named_parameters(), strict=True):
        assert torch.equal(p, q), leaf
    assert dense.state_bytes().total > 0
    assert replayed.state_bytes().total == 0


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_adams_moments(key: str) -> None:
    trace = load("mezo_adam_f64")
    opt, model, _ = run(trace)
    for name, p in model.named_parameters():
        close(opt.state[p][key], trace.each(key)[name], trace.tolerance(key, name), f"{key} of {name}")


def test_conservative_takes_the_recorded_branch() -> None:
    trace = load("zollm_conserv_f64")
    _, _, records = run(trace)
    for record, branch in zip(records, trace.tensors["branch"].tolist(), strict=True):
        (delta,) = record.deltas
        assert sum(term.coefficient for term in record.terms) == branch * delta
        assert record.moved == (branch != 0)


def test_accuracy_has_ties_that_move_nothing() -> None:
    """The objective is a step function: some differences are exactly zero."""
    trace = load("mezo_accuracy_f64")
    _, _, records = run(trace)
    assert 0 < sum(not record.terms for record in records) < trace.steps


class Given:
    """The two-sided probe, whose derivative is the recorded one."""

    def __init__(self, deltas: list[float], eps: float):
        self.deltas, self.eps = deltas, eps

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        yield [away(0, self.eps), away(0, -self.eps)]
        return Estimate([Term(0, self.deltas[step])], [self.deltas[step]])

    evaluations = 2.0

    def describe(self) -> str:
        return "given"


def test_bf16_in_place_rounds_as_the_published_code() -> None:
    """Drift of the three passes and the update, bit for bit."""
    trace = load("mezo_bf16_drift")
    model = Objective(trace)
    probe = Given(trace.tensors["delta"].tolist(), trace.hyper["eps"])
    opt = MeZO(model, trace.lr(0), probe=probe, directions=trace.directions, legacy=True)
    restored: dict[str, torch.Tensor] = {}
    plain = opt.memory.restore

    def restore(leaves: Any) -> None:
        plain(leaves)
        restored.update((name, p.detach().clone()) for name, p in model.named_parameters())

    opt.memory.restore = restore  # type: ignore[method-assign]
    for t in range(trace.steps):
        opt.param_groups[0]["lr"] = trace.lr(t)
        opt.step(lambda t=t: model(t).float())
        for name, p in model.named_parameters():
            assert torch.equal(restored[name], trace.each("W_restored")[name][t]), f"{name}, restored at step {t}"
            assert torch.equal(p.detach(), trace.each("W")[name][t]), f"{name} after step {t}"


def test_bf16_inside_forward_leaves_weights_untouched() -> None:
    """The same run without drift: between two updates nothing is written."""
    trace = load("mezo_bf16_drift")
    model = Objective(trace)
    opt = MeZO(
        model, 0.0, probe=Given(trace.tensors["delta"].tolist(), trace.hyper["eps"]), directions=trace.directions
    )
    for t in range(trace.steps):
        opt.step(lambda t=t: model(t).float())
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), trace.each("W0")[name]), name
