"""Lion, Adan, diffGrad and momentum through their native kernels: which steps those take, and that they are the plain steps."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tare.core.leaf import Leaf
from tare.core.optimizer import Optimizer
from tare.core.recipe import Recipe
from tare.core.state import State, allocate
from tare.core.storage import LOW, Storage
from tare.core.transform import Step, Transform
from tare.kernels import build, library, native_light, split24
from tare.methods.frugal import PrimedMomentum
from tare.rules.adan import Adan
from tare.rules.diffgrad import DiffGrad
from tare.rules.lion import Lion
from tare.rules.lion_kappa import LionKappa
from tare.rules.maps import DeadZone, Huber, Sign, UnitNorm
from tare.rules.momentum import Momentum
from tare.rules.times import Times

RULES: dict[str, Transform] = {
    "lion": Lion(),
    "lion without sign": Lion(sign=False),
    "lion-k sign": LionKappa(Sign()),
    "lion-k dead zone": LionKappa(DeadZone(0.2)),
    "lion-k huber": LionKappa(Huber(0.3)),
    "adan": Adan(),
    "diffgrad": DiffGrad(),
    "diffgrad alias": DiffGrad(reference_alias=True),
    "momentum": Momentum(),
    "dampened": Momentum(0.9, 0.3),
    "nesterov": Momentum(nesterov=True),
    "sgd": Momentum(0.0),
    "times": Times(Lion(), 0.5),
}
SHAPE = (37, 29)
STEPS = 4


@pytest.fixture(autouse=True)
def compiled() -> None:
    if os.environ.get("TARE_NATIVE") == "0":
        pytest.skip("TARE_NATIVE=0")
    try:
        build.find_compiler()
    except build.Unavailable as error:
        pytest.skip(str(error))
    assert library.available(), library.reason()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernels did: `step` where they wrote a weight, `direction` where they left U."""
    done: list[str] = []
    run = native_light._run

    def watched(*args: Any, **rates: Any) -> bool:
        ok = run(*args, **rates)
        if ok:
            done.append("direction" if args[5].decay == 0.0 else "step")
        return ok

    monkeypatch.setattr(native_light, "_run", watched)
    return done


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def path(
    rule: Transform, dtype: torch.dtype = torch.float32, decay: Any = "before", shape: tuple[int, ...] = SHAPE,
    options: dict[str, Any] | None = None, **own: Any,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """Weight, in full precision, and state after a few steps with a changing rate."""
    p = nn.Parameter(draw(shape, 1).to(dtype))
    own = {"weight_decay": 0.1, **own}
    optimizer = Optimizer([("w", p)], Recipe((("*", rule),), decay), 0.01, **own)
    optimizer.param_groups[0].update(options or {})
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
        p.grad = draw(shape, 10 + t).to(dtype)
        optimizer.step()
    raw = optimizer.state[p]
    return (split24.join(p.detach(), raw[LOW]) if LOW in raw else p.detach().float()), raw


def both(monkeypatch: pytest.MonkeyPatch, *args: Any, **own: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Through the kernels, and without them."""
    ours = path(*args, **own)
    with monkeypatch.context() as without:
        without.setenv("TARE_NATIVE", "0")
        return [ours, path(*args, **own)]


def agree(found: list[tuple[Tensor, dict[str, Any]]], unit: float, share: float = 0.0) -> None:
    """Equal to a few last bits, `unit` relative; but for a share of the weights, where a rounding or a sign hung on them."""
    (ours, mine), (theirs, other) = found
    wrong = (ours - theirs).abs() > 1e-6 + unit * torch.maximum(ours.abs(), theirs.abs())
    assert wrong.float().mean() <= share
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype == torch.float32:
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("decay", ["before", "after", "prox"])
@pytest.mark.parametrize("maximize", [False, True])
def test_fp32(name: str, decay: str, maximize: bool, monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    agree(both(monkeypatch, RULES[name], decay=decay, maximize=maximize), 1e-6)
    assert taken == ["step"] * STEPS


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("moment", "weight"),
    [("fp32", "plain"), ("fp32", "stochastic"), ("bf16", "stochastic"), ("fp32", "split24"), ("bf16", "split24")],
)
def test_bf16_weights(name: str, moment: str, weight: str, monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    storage = Storage(moment=moment, weight=weight)  # type: ignore[arg-type]
    found = both(monkeypatch, RULES[name], torch.bfloat16, storage=storage)
    # to nearest, the plain path rounds decay and update apart; a bf16 moment that was rounded otherwise moves a sign
    agree(found, 2**-14 if weight == "split24" and moment == "fp32" else 2**-6, 0.03)
    assert taken == ["step"] * STEPS


@pytest.mark.parametrize("name", RULES)
def test_bf16_moments_of_fp32_weights(name: str, monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    (ours, mine), (theirs, other) = both(monkeypatch, RULES[name], storage=Storage(moment="bf16"))
    # the same noise on numbers that differ in the last bit of fp32: a moment in thousands is rounded otherwise
    for key, value in mine.items():
        if isinstance(value, Tensor):
            assert (value != other[key]).float().mean() < 0.01
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.02
    assert taken == ["step"] * STEPS


@pytest.mark.parametrize("name", ["lion", "adan", "diffgrad", "momentum"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_what_has_no_one_pass_still_has_a_direction(
    name: str, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    """Coupled decay, chunk by chunk: the leaf is longer than two chunks."""
    own = {"decay": "l2", "shape": (700, 801)}
    agree(both(monkeypatch, RULES[name], weight, **own), 1e-6 if weight == torch.float32 else 2**-6, 1e-5)
    assert taken == ([] if name == "momentum" else ["direction"] * 3 * STEPS)


@pytest.mark.parametrize("name", ["adan", "diffgrad", "lion-k huber"])
def test_quantised_moments_are_decoded_stepped_in_one_pass_and_encoded(
    name: str, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    found = both(monkeypatch, RULES[name], storage=Storage(moment="int8"), shape=(70, 70))
    # a code that hung on the last bit: a step of the map, here of a hundredth of the largest
    assert ((found[0][0] - found[1][0]).abs() > 2e-6).float().mean() < 0.02
    assert taken == ["direction"] * STEPS


def test_eight_bit_lion_keeps_its_own_kernel_and_leaves_split_weights_alone(taken: list[str]) -> None:
    plain, _ = path(Lion(), torch.bfloat16, shape=(70, 70), storage=Storage(moment="int8"))
    assert taken == []
    split, _ = path(Lion(), torch.bfloat16, shape=(70, 70), storage=Storage(moment="int8", weight="split24"))
    assert taken == ["direction"] * STEPS
    assert not torch.equal(split, plain)
    assert (split - plain).abs().max() < 0.03  # of weights up to 4, whose bf16 has steps of 0.016


@pytest.mark.parametrize(
    ("rule", "own"),
    [
        (Lion(), {"dtype": torch.float64}),
        (Adan(), {"dtype": torch.float16}),
        (DiffGrad(), {"storage": Storage(moment="bf16_legacy")}),
        (LionKappa(UnitNorm()), {}),
        (Momentum(), {"weight_decay": 100.0}),  # lr wd = 1: the old weight counts nothing
    ],
)
def test_what_the_kernels_do_not_know_is_stepped_without_them(
    rule: Transform, own: dict[str, Any], taken: list[str]
) -> None:
    path(rule, **own)
    assert taken.count("step") == (STEPS - 1 if "weight_decay" in own else 0)


def test_adan_sees_the_factor_of_this_step(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    for decay in ("prox", "l2"):
        found = both(monkeypatch, Adan(), decay=decay, options={Adan.SCALE: 0.25})
        agree(found, 1e-6)
        assert not torch.equal(found[0][0], path(Adan(), decay=decay)[0])
    assert taken.count("step") == taken.count("direction") == 2 * STEPS


def test_a_rule_derived_from_momentum_keeps_its_first_step(taken: list[str]) -> None:
    """b_1 = (1 + momentum) g_1, in one pass like the others."""
    weight = draw(SHAPE, 1)
    moved = weight.clone()
    buffer = torch.zeros(SHAPE)
    for t in range(STEPS):
        g = draw(SHAPE, 10 + t)
        buffer = 0.9 * buffer + g if t else 1.9 * g
        moved = moved - 0.01 / (1 + t) * buffer
    got, _ = path(PrimedMomentum(0.9), weight_decay=0.0)
    torch.testing.assert_close(got, moved, rtol=1e-6, atol=1e-6)
    assert taken == ["step"] * STEPS


@pytest.mark.parametrize("name", ["lion", "lion without sign", "lion-k huber", "adan", "diffgrad", "diffgrad alias"])
@pytest.mark.parametrize("moment", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_leaves_the_gradient_and_consume_spends_it(
    name: str, moment: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    """Three ways to one direction: plain, native, and native over the gradient."""
    rule, shape = RULES[name], (64, 65)
    leaf = Leaf("w", shape, torch.float32, "linear")
    slots = Storage(moment=moment).slots(leaf, rule.spec(leaf))  # type: ignore[arg-type]
    kept = [allocate(slots, torch.device("cpu")) for _ in range(3)]
    for count in (1, 2):
        found = []
        for number, raw in enumerate(kept):
            monkeypatch.setenv("TARE_NATIVE", str(min(number, 1)))
            state, step = State(raw, slots, key=5), Step(0.1, count, leaf, torch.zeros(shape))
            g = draw(shape, count).to(dtype)
            act = rule.consume if number == 2 else rule.update
            delta = act(g, state, step)
            found.append(delta.rows(0, shape[0]).clone())
            if number < 2:
                assert torch.equal(g, draw(shape, count).to(dtype))
            elif dtype == torch.float32:
                assert delta.u.data_ptr() == g.data_ptr()  # type: ignore[attr-defined]
            state.flush()
        assert torch.equal(found[1], found[2])
        near = (found[0] - found[1]).abs() <= 1e-5 * (1.0 + found[0].abs())
        assert near.float().mean() > (0.999 if moment == "fp32" else 0.98)
    assert taken == ["direction"] * 4
    for name in kept[1]:
        if isinstance(kept[1][name], Tensor):
            assert torch.equal(kept[1][name], kept[2][name])
