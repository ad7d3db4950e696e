"""Weights in 24 bits: every way of writing one equals fp32 arithmetic rounded to 24 bits, and no small step is lost."""

import copy

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.delta import Delta, Dense, LowRank, Scaled, Sum
from tare.core.errors import InputError
from tare.core.kept import Split24
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.storage import LOW, Storage
from tare.core.transform import Step, Work
from tare.core.write import CHUNK, write
from tare.kernels import split24

SPLIT = Storage(weight="split24")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    """fp32 with the last byte rounded away: what 24 bits hold."""
    return split24.join(*split24.split(x))


def exact(p: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    return split24.join(p.detach(), optimizer.state[p][LOW])


def deltas(m: int, n: int) -> dict[str, Delta]:
    left, right, grad = normal(m, 3, seed=1), normal(3, n, seed=2), normal(m, n, seed=3)
    low = LowRank(left, right, 0.1)
    return {
        "dense": Dense(grad, 0.5),
        "low-rank": low,
        "scaled rows": Scaled(grad.bfloat16(), normal(m, 1, seed=4), 0.3),
        "scaled columns": Scaled(grad, normal(1, n, seed=5), 0.3),
        "sum": Sum((low, Scaled(grad, torch.tensor(0.2)))),
    }


@pytest.mark.parametrize("kind", list(deltas(1, 1)))
@pytest.mark.parametrize(("m", "n"), [(24, 40), (1300, 301)])
def test_every_delta_is_written_in_fp32_and_rounded_once(kind, m, n, monkeypatch):
    delta = deltas(m, n)[kind]
    master = rounded(normal(m, n, seed=6))
    high, low = split24.split(master)
    leaf = Leaf("w", (m, n), torch.bfloat16, "linear")
    step = Step(1e-3, 1, leaf, high)
    work = Work(high, high, State({}, {}), step, 0.1, "before", False, kept=Split24(high, low, None))
    for _ in range(5):
        write((m, n), delta, work, 0)
        rows = max(1, CHUNK // n)
        update = torch.cat([delta.rows(at, min(at + rows, m)).float() for at in range(0, m, rows)])
        master = rounded(master * (1.0 - 1e-3 * 0.1) - update * 1e-3)
    assert torch.equal(split24.join(high, low), master)
    assert torch.equal(high, split24.split(master)[0])


@pytest.mark.parametrize("native", [True, False])
def test_adamw_follows_an_fp32_master_where_bf16_stalls(native, monkeypatch):
    """200 steps of 1e-5 on weights near one: bf16 has steps of 4e-3 there and moves not at all."""
    if not native:
        monkeypatch.setenv("TARE_NATIVE", "0")
    start = (1.0 + 0.1 * normal(64, 32)).bfloat16()
    layers = {}
    for form in ("plain", "split24", "master"):
        p = nn.Parameter(start.float() if form == "master" else start.clone())
        storage = Storage(weight="plain" if form == "master" else form)
        layers[form] = (p, tare.create("adamw", [("w.weight", p)], lr=1e-5, weight_decay=0.0, storage=storage))
    steps = 200
    for step in range(steps):
        grad = (0.5 + normal(64, 32, seed=100 + step)).bfloat16()  # a drift under noise
        for p, optimizer in layers.values():
            p.grad = grad.to(p.dtype)
            optimizer.step()
    master = layers["master"][0].detach()
    split = exact(*layers["split24"])
    way = master - start.float()
    # each step rounds independently, with a standard deviation of at most half a unit, 2^-15 or 2^-16: a random walk
    walk = 2.0**-16 * steps**0.5
    assert (split - master).square().mean().sqrt() < walk
    assert (split - master).abs().max() < 6 * walk
    assert ((split - master).mean() / way.mean()).abs() < 0.01
    assert torch.equal(layers["plain"][0], start), "bf16 was expected to stall"


@pytest.mark.parametrize("lr", [2e-4, 1e-6])
def test_a_steady_drift_is_not_biased(lr):
    """300 equal steps, of 6.5 units of the last bit and of a thirtieth: the mean over 512 weights within four standard deviations of
    rounding at random. To nearest, the first would be 7 units each time and the second nothing."""
    p = nn.Parameter(torch.full((512,), 1.5, dtype=torch.bfloat16))
    optimizer = tare.create("adamw", [("w", p)], lr=lr, weight_decay=0.0, storage=SPLIT)
    for _ in range(300):
        p.grad = torch.ones(512, dtype=torch.bfloat16)
        optimizer.step()
    unit, share = 2.0**-15, lr * 2.0**15 % 1.0
    sigma = unit * (300 * share * (1 - share)) ** 0.5
    drift = exact(p, optimizer).double() - (1.5 - 300 * lr)
    assert drift.mean().abs() < 4 * sigma / 512**0.5 + 300 * 1e-8  # and fp32 rounding of Adam's quotient
    assert drift.abs().max() < 6 * sigma


def test_native_and_plain_agree(monkeypatch):
    """The fused step, and the same through the plain twins in chunks; other sums in the last bit, then one rounding each."""
    found = []
    for native in ("1", "0"):
        monkeypatch.setenv("TARE_NATIVE", native)
        p = nn.Parameter(normal(700, 801).bfloat16())
        optimizer = tare.create("adamw", [("w.weight", p)], lr=1e-3, weight_decay=0.1, storage=SPLIT)
        for step in range(3):
            p.grad = normal(700, 801, seed=step).bfloat16()
            optimizer.step()
        found.append(exact(p, optimizer))
    torch.testing.assert_close(found[0], found[1], rtol=3 * 2.0**-15, atol=1e-6)
    assert (found[0] != found[1]).float().mean() < 0.01


def test_state_is_one_byte_a_weight_and_exact():
    layer = nn.Linear(30, 20).bfloat16()
    plain = tare.create("adamw", copy.deepcopy(layer), lr=1e-3).state_bytes()
    split = tare.create("adamw", layer, lr=1e-3, storage=SPLIT).state_bytes()
    assert split.total - plain.total == 620
    assert split.by_kind["exact"] == 620


def test_a_weight_changed_from_outside_is_taken_as_it_is():
    """Loaded, pruned, clipped between steps: its correction belonged to another number, and moves it by half a bf16 step at most."""
    p = nn.Parameter(normal(256).bfloat16())
    optimizer = tare.create("adamw", [("w", p)], lr=1e-3, weight_decay=0.0, storage=SPLIT)
    for step in range(3):
        p.grad = normal(256, seed=step).bfloat16()
        optimizer.step()
    new = normal(256, seed=50).bfloat16()
    new[:32] = 0.0
    new[32:40] = -0.0
    with torch.no_grad():
        p.copy_(new)
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.isfinite().all()
    assert (exact(p, optimizer) - new.float()).abs().max() <= new.float().abs().max() * 2.0**-8
    assert exact(p, optimizer)[:40].abs().max() < 1e-38


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_only_bf16_can_be_split(dtype):
    layer = nn.Linear(4, 3).to(dtype)
    with pytest.raises(InputError, match=r"split24.*bf16.*bfloat16") as told:
        tare.create("adamw", layer, lr=1e-3, storage=SPLIT)
    assert "\n" not in str(told.value)


def test_coupled_decay_sees_all_24_bits():
    """G + wd W with W as it is kept: with a zero gradient and SGD the weight shrinks exactly."""
    from tare.core.optimizer import Optimizer
    from tare.core.recipe import Recipe
    from tare.rules.momentum import Momentum

    p = nn.Parameter(torch.full((8,), 1.5, dtype=torch.bfloat16))
    recipe = Recipe((("*", Momentum(0.0)),), decay="l2")
    optimizer = Optimizer([("w", p)], recipe, 1e-3, weight_decay=1.0, storage=SPLIT)
    wanted = torch.full((8,), 1.5)
    for _ in range(10):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        wanted = rounded(wanted - 1e-3 * wanted)
    assert (exact(p, optimizer) - wanted).abs().max() <= 10 * 2.0**-16
