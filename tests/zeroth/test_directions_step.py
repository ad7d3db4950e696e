"""Steps of plain SGD written in one pass: the numbers of a dense gradient, in every form of weight, and no gradient is formed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.recipe import Recipe
from tare.core.state import State
from tare.core.transform import Transform
from tare.kernels import directions
from tare.plan.measure import StepMeter
from tare.rules.maps import MAPS
from tare.rules.momentum import Momentum
from tare.rules.stateless import Stateless
from tare.zeroth import drawn
from tare.zeroth.directions import Directed, Draw, Gaussian, Law, Rademacher
from tare.zeroth.laws import Sphere
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import Term, TwoSided
from tare.zeroth.record import Record

TERMS = (Term(0, 0.8), Term(3, -1.7), Term(1, 0.05))


@dataclass(frozen=True)
class Apart(Law):
    """Of the same numbers as `Gaussian`, drawn by the plain twin and added to a gradient by torch."""

    partial: ClassVar[bool] = True
    stream: directions.Law = "gaussian"

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = draw.leaf.numel if stop is None else stop
        return directions.draw(self.stream, draw.key, start, stop - start, weight.device).to(draw.leaf.compute_dtype)


class Net(nn.Module):
    """Leaves of all kinds: a matrix, one of several pieces, a convolution, a transposed weight, a vector, a scalar."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        shapes = {"small": (5, 7), "large": (700, 400), "conv": (6, 3, 5, 5), "bias": (9,), "scalar": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g).to(dtype)))
        self.turned = nn.Parameter(torch.randn(20, 30, generator=g).to(dtype).T)


def optimizer(net: nn.Module, law: Law, rule: Transform | None = None, decay: Any = "before", **options: Any) -> Any:
    recipe = Recipe((("*", Directed(law, rule or Momentum(0.0))),), decay=decay)
    given = {"lr": 0.1, "weight_decay": 0.02, "probe": TwoSided(), **options}
    return ForwardOptimizer(net, recipe, **given)


def after(law: Law, dtype: torch.dtype, steps: int = 2, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Weights after some recorded steps."""
    net = Net(dtype)
    opt = optimizer(net, law, **options)
    names = tuple(name for name, _ in net.named_parameters())
    for step in range(steps):
        opt.replay(Record(step, TERMS, 1.5, ((0.1, 0.02),), leaves=names))
    return {name: p.detach() for name, p in net.named_parameters()}, opt


FORMS = [
    (torch.float64, {}),
    (torch.float32, {}),
    (torch.bfloat16, {"weight": "stochastic"}),
    (torch.bfloat16, {"weight": "split24"}),
    (torch.bfloat16, {"weight": "master"}),
    (torch.float16, {"weight": "master"}),
]


@pytest.mark.parametrize(("dtype", "storage"), FORMS)
@pytest.mark.parametrize("law", ["gaussian", "signs"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"decay": "after"},
        {"decay": "prox"},
        {"decay": "l2"},
        {"rule": Stateless(scale=0.5)},
    ],
    ids=["sgd", "ascends", "after", "prox", "l2", "scaled"],
)
def test_one_pass_gives_the_weights_of_a_dense_gradient(dtype, storage, law, options):
    """Forms that round on their own: the same bits. Plain fp32 and fp64: a fused multiply-add apart, one unit of the last place of
    the larger of weight and update (8 here), a step."""
    ours, opt = after({"gaussian": Gaussian(), "signs": Rademacher()}[law], dtype, storage=storage, **options)
    theirs, other = after(Apart(law), dtype, storage=storage, **options)
    for name, w in ours.items():
        if storage and name != "turned":
            assert torch.equal(w, theirs[name]), name
        else:
            unit = torch.finfo(dtype).eps
            assert float((w - theirs[name]).abs().max()) <= 2 * 8 * unit, name
    for p, q in zip(opt.state, other.state, strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        if storage.get("weight") == "split24" and p.is_contiguous():
            assert torch.equal(opt.state[p]["weight_low"], other.state[q]["weight_low"])


def test_int8_weights_are_written_alike():
    found = []
    for law in (Gaussian(), Apart()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 300))
        tare.quantize_weights_(net)
        opt = optimizer(net, law, storage={"weight": "int8"})
        names = tuple(name for name, _ in net.named_parameters())
        opt.replay(Record(0, TERMS, 1.0, ((0.01, 0.02),), leaves=names))
        found.append([p.dense() if hasattr(p, "dense") else p.detach() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_twins_write_the_same_bits(dtype, monkeypatch):
    """Without the C++ kernels, as on a machine that has no compiler, or a GPU without Triton."""
    storage = {"weight": "stochastic"} if dtype == torch.bfloat16 else {}
    ours, _ = after(Gaussian(), dtype, storage=storage)
    monkeypatch.setenv("TARE_NATIVE", "0")
    theirs, _ = after(Gaussian(), dtype, storage=storage)
    for name, w in ours.items():
        assert torch.equal(w, theirs[name]), name


def test_sums_are_the_same_whoever_adds_them_up():
    """A step of two terms is not two steps' rounding: the sum is formed first, as a dense gradient's is."""
    w, _ = after(Gaussian(), torch.float64, steps=1)
    net = Net(torch.float64)
    for name, p in net.named_parameters():
        g = torch.zeros(p.numel(), dtype=torch.float64)
        for term in TERMS:
            leaf = next(leaf for leaf in optimizer(Net(torch.float64), Gaussian()).leaves if leaf.name == name)
            z = directions.draw("gaussian", Draw(leaf, name, 0, 0, term.member).key, 0, p.numel())
            g += term.coefficient * z.double()
        want = (1 - 0.15 * 0.02) * p.detach() - 0.15 * g.view(p.shape)
        assert torch.allclose(w[name], want, rtol=1e-14, atol=1e-14), name


@pytest.mark.parametrize("storage", [{}, {"weight": "stochastic"}, {"weight": "split24"}])
def test_no_gradient_is_formed(storage):
    """A step of a leaf of 4 MiB and more holds less than 200 KiB beyond what was there."""
    dtype = torch.bfloat16 if storage else torch.float32
    net = nn.Linear(1024, 1024, bias=False).to(dtype)
    opt = optimizer(net, Gaussian(), storage=storage)
    opt.replay(Record(0, TERMS, 1.0, ((0.1, 0.02),), leaves=("weight",)))
    with StepMeter(net, opt) as meter:
        opt.replay(Record(1, TERMS, 1.0, ((0.1, 0.02),), leaves=("weight",)))
    assert meter.peak - meter.baseline < 200 * 1024


def test_which_steps_go_in_one_pass(monkeypatch):
    """Rules that only multiply; not those with state or a map, nor coupled decay, nor where lost updates of bf16 weights are counted."""
    calls: list[str] = []
    real = drawn.Drawn._write
    monkeypatch.setattr(drawn.Drawn, "_write", lambda *given, **named: calls.append("") or real(*given, **named))

    def passes(law: Law = Gaussian(), dtype: torch.dtype = torch.float32, **options: Any) -> int:  # noqa: B008
        calls.clear()
        after(law, dtype, steps=1, **options)
        return len(calls)

    leaves = 6
    assert passes() == leaves
    assert passes(Sphere()) == leaves
    assert passes(rule=Stateless()) == leaves
    assert passes(rule=Momentum(0.9)) == 0
    assert passes(rule=Stateless(MAPS["sign"]())) == 0
    assert passes(decay="l2") == 0
    assert passes(Apart()) == 0
    assert (
        passes(dtype=torch.bfloat16, storage={"weight": "plain"}) == 1
    )  # the strided one, of which nothing is counted
    assert passes(dtype=torch.bfloat16, storage={"weight": "stochastic"}) == leaves - 1


def test_rules_say_whether_they_only_multiply():
    assert Momentum(0.0).proportional == 1.0
    assert Momentum(0.9).proportional is None
    assert Stateless(scale=0.25).proportional == 0.25
    assert Stateless(MAPS["sign"]()).proportional is None
    assert Transform().proportional is None


def test_a_step_of_training_is_the_replay_of_its_record():
    """And the same whatever the number of threads."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 2))
    start = [(name, p.detach().clone()) for name, p in net.named_parameters()]
    x = torch.randn(4, 300)
    records: list[Record] = []
    tare.MeZO(net, lr=1e-3, n=2, on_step=records.append).step(lambda: net(x).square().mean())
    before = torch.get_num_threads()
    for threads in (1, 3):
        again = [(name, p.clone().requires_grad_()) for name, p in start]
        torch.set_num_threads(threads)
        try:
            tare.MeZO(again, lr=1e-3, n=2).replay(records[0])
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for (_, a), b in zip(again, net.parameters(), strict=True))
