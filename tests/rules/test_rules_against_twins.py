"""The rules against slow float64 twins and against torch's own optimizers."""

from typing import Any

import golden_cases
import pytest
import torch
from reference import twins
from reference.stepping import SHAPES, gradients, numbers, optimizer_for, run, twin, worst

from tare.methods.adamw import AdamW
from tare.rules.adafactor import Adafactor
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.momentum import Momentum

STEPS = 11
LRS = [0.01 * (1 + t % 4) for t in range(STEPS)]
TIGHT = 1e-12  # float64: eleven steps of numbers of size 1
BETAS = [(0.9, 0.999), (0.0, 0.0), (0.8, 0.5)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("betas", BETAS)
def test_adamw(shape: tuple[int, int], betas: tuple[float, float]) -> None:
    w, g = numbers("w", shape), gradients(shape, STEPS)
    opt, p = optimizer_for(Adam(betas, 1e-3), w, weight_decay=0.1, decay="before")
    assert worst(run(opt, p, g, LRS), twin(twins.adamw, w, g, LRS, betas=betas, eps=1e-3, wd=0.1)) < TIGHT


def test_adam_with_eps_before_bias_correction() -> None:
    """The GaLore family's placement: eps beside the uncorrected root. Distinct from the other at this eps."""
    w, g = numbers("w", (7, 4)), gradients((7, 4), STEPS)
    opt, p = optimizer_for(Adam((0.9, 0.99), 1e-2, "before"), w, weight_decay=0.1)
    kept = {"rank": 4, "period": 99, "alpha": 1.0, "betas": (0.9, 0.99), "eps": 1e-2, "wd": 0.1, "side": "right"}
    path = run(opt, p, g, LRS)
    identity = {0: torch.eye(4, dtype=torch.float64)}
    assert worst(path, twin(twins.galore, w, g, LRS, **kept, recorded=identity)) < TIGHT
    opt, p = optimizer_for(Adam((0.9, 0.99), 1e-2, "after"), w, weight_decay=0.1)
    assert worst(run(opt, p, g, LRS), path) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_equals_torch_fused(dtype: torch.dtype, maximize: bool) -> None:
    """Bit for bit, with decay: the same kernel with the same numbers."""
    mine, theirs = (torch.nn.Parameter(numbers("w", (9, 8), dtype=dtype)) for _ in range(2))
    a = AdamW([mine], lr=0.01, weight_decay=0.1, maximize=maximize)
    b = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, fused=True, maximize=maximize)
    g = gradients((9, 8), STEPS, dtype)
    for x, y in zip(run(a, mine, g, LRS), run(b, theirs, g, LRS), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("form", ["foreach", "plain"])
def test_adamw_near_torch_unfused(form: str) -> None:
    mine, theirs = (torch.nn.Parameter(numbers("w", (9, 8))) for _ in range(2))
    a = AdamW([mine], lr=0.01)
    b = torch.optim.AdamW([theirs], lr=0.01, foreach=form == "foreach")
    g = gradients((9, 8), STEPS)
    assert worst(run(a, mine, g, LRS), run(b, theirs, g, LRS)) < TIGHT


@pytest.mark.parametrize("shape", [*SHAPES.values(), (7,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_adam_fast_path_equals_its_plain_twin(shape: tuple[int, ...], dtype: torch.dtype, placement: Any) -> None:
    """`update_many` (fused) against `update`: the same direction in another order of operations."""
    rule = Adam((0.9, 0.99), 1e-2, placement)
    w, g = numbers("w", shape, dtype=dtype), gradients(shape, STEPS, dtype)
    fast, p = optimizer_for(rule, w, weight_decay=0.1)
    slow, q = optimizer_for(rule, w, weight_decay=0.1)
    slow._entries[q].transform = _Plain((0.9, 0.99), 1e-2, placement)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6  # a few ulp of numbers of size 1 to 4
    assert worst(run(fast, p, g, LRS), run(slow, q, g, LRS)) < tolerance


class _Plain(Adam):
    """Adam without any fused kernel."""

    def update_many(self, batch: list) -> list:  # type: ignore[type-arg]
        return batch

    @staticmethod
    def _small_fused(*_: object) -> bool:
        return False


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5)])
def test_lion(shape: tuple[int, int], betas: tuple[float, float]) -> None:
    w, g = numbers("w", shape), gradients(shape, STEPS)
    opt, p = optimizer_for(Lion(betas), w, weight_decay=0.3, decay="before")
    assert worst(run(opt, p, g, LRS), twin(twins.lion, w, g, LRS, betas=betas, wd=0.3)) < TIGHT


def test_lion_moves_by_the_learning_rate_or_not_at_all() -> None:
    """|W_t - (1 - lr wd) W_{t-1}| is 0 or lr; 0 where gradient and moment are 0."""
    w = numbers("w", (8, 6))
    g = [x * (numbers("mask", (8, 6)) > 0) for x in gradients((8, 6), 6)]
    opt, p = optimizer_for(Lion(), w, lr=0.01, weight_decay=0.5, decay="before")
    before, seen = w, set()
    for after in run(opt, p, g):
        moves = (after - before * (1 - 0.01 * 0.5)).abs() / 0.01
        assert bool(((moves - 0).abs() < 1e-9).logical_or((moves - 1).abs() < 1e-9).all())
        seen |= set(moves.round().flatten().tolist())
        before = after
    assert seen == {0.0, 1.0}


def test_lion_weights_stay_in_the_box() -> None:
    """|W| <= 1 / wd once inside, and it gets inside: from |W| = 20 with wd 0.5 the bound is 2."""
    opt, p = optimizer_for(
        Lion(), torch.full((4, 4), 20.0, dtype=torch.float64), lr=0.1, weight_decay=0.5, decay="before"
    )
    path = run(opt, p, [-torch.ones(4, 4, dtype=torch.float64)] * 300)
    assert path[10].max() > 2.5
    assert path[-1].abs().max() <= 2.0 + 1e-4
    assert path[-1].max() > 1.9  # it is pushed against the wall


@pytest.mark.parametrize(
    ("mu", "dampening", "nesterov"), [(0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True), (0.0, 0.0, False)]
)
def test_momentum(mu: float, dampening: float, nesterov: bool) -> None:
    """Against the twin and against torch.optim.SGD, bit for bit."""
    shape = (8, 6)
    w, g = numbers("w", shape), gradients(shape, STEPS)
    opt, p = optimizer_for(Momentum(mu, dampening, nesterov), w)
    path = run(opt, p, g, LRS)
    q = torch.nn.Parameter(w.clone())
    sgd = torch.optim.SGD([q], lr=0.01, momentum=mu, dampening=dampening, nesterov=nesterov, foreach=False)
    for mine, theirs in zip(path, run(sgd, q, g, LRS), strict=True):
        assert torch.equal(mine, theirs)
    if mu:
        wanted = twin(twins.momentum, w, g, LRS, momentum=mu, dampening=dampening, nesterov=nesterov)
        assert worst(path, wanted) < TIGHT
    else:
        assert opt.state_bytes().total == 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("relative", [None, 1e-3])
def test_adafactor_transformers_form(shape: tuple[int, int], beta1: float | None, relative: float | None) -> None:
    w, g = numbers("w", shape), gradients(shape, STEPS)
    rule = Adafactor(beta1, -0.8, (1e-30, 1e-3), 0.7, scale_parameter=relative is not None)
    opt, p = optimizer_for(rule, w, weight_decay=0.1, decay="before")
    own = {"beta1": beta1, "decay_rate": -0.8, "eps": 1e-30, "clip": 0.7}
    wanted = twin(twins.adafactor, w, g, LRS, wd=0.1, scale_parameter=relative, **own)
    assert worst(run(opt, p, g, LRS), wanted) < 1e-11


@pytest.mark.parametrize("shape", [*SHAPES.values(), (7,), (4, 3, 5)])
@pytest.mark.parametrize("lr", [0.01, 0.9])
def test_adafactor_torch_form(shape: tuple[int, ...], lr: float) -> None:
    """Against torch.optim.Adafactor; at lr 0.9 the cap of 1 / sqrt(t) acts."""
    w, g = numbers("w", shape), gradients(shape, STEPS)
    mine = Adafactor(None, -0.8, (torch.finfo(torch.float64).eps, 1e-3), 1.0, form="torch")
    opt, p = optimizer_for(mine, w, lr=lr, weight_decay=0.1, decay="before", role="norm")
    q = torch.nn.Parameter(w.clone())
    theirs = torch.optim.Adafactor([q], lr=lr, weight_decay=0.1, foreach=False)
    assert worst(run(opt, p, g), run(theirs, q, g)) < TIGHT


def test_adafactor_golden_trace() -> None:
    case = golden_cases.load("control_torch_adafactor_wide")
    rule = Adafactor(None, -0.8, (torch.finfo(torch.float32).eps, 1e-3), 1.0, form="torch")  # torch's defaults
    decay = case.hyper["weight_decay"]
    opt, p = optimizer_for(rule, case.tensors["W0"], weight_decay=decay, decay="before")
    worst_gap, _ = golden_cases.run(case, opt, p)
    assert worst_gap <= case.tolerance


@pytest.mark.parametrize("form", ["torch", "transformers"])
def test_adafactor_takes_a_zero_gradient(form: str) -> None:
    """The published defaults square an eps of 1e-30, which is 0 in fp32: a zero gradient must not become NaN."""
    w = torch.ones(4, 6)
    opt, p = optimizer_for(Adafactor(form=form), w)  # type: ignore[arg-type]
    run(opt, p, [torch.zeros(4, 6)] * 2)
    assert torch.equal(p.detach(), w)


@pytest.mark.parametrize("rule", [Adam(), Lion()])
def test_large_leaves_in_chunks_equal_one_piece(rule: Adam | Lion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Element-wise rules work in chunks: nothing may depend on where they are cut, in any storage."""
    from tare.core import write
    from tare.core.storage import Storage

    shape = (37, 50)
    w, g = numbers("w", shape, dtype=torch.bfloat16), gradients(shape, 3, torch.bfloat16)
    for storage in (Storage(), Storage("bf16", weight="stochastic"), Storage("int8", block=64, min_quantized=1)):
        paths = []
        for chunk in (1 << 19, 256):
            monkeypatch.setattr(write, "CHUNK", chunk)
            opt, p = optimizer_for(rule, w, storage=storage)
            paths.append(run(opt, p, g))
        for x, y in zip(*paths, strict=True):
            assert torch.equal(x, y), storage
