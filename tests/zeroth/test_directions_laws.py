"""Laws of directions: their second-moment factors, their limits, what they refuse, and that one leaf can be drawn by itself."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State, allocate
from tare.core.storage import Storage
from tare.rules.momentum import Momentum
from tare.zeroth.directions import Directed, Draw, Gaussian, Law, Rademacher
from tare.zeroth.laws import LAWS, Coordinate, Sphere, Subspace, law, squared_norm
from tare.zeroth.lowrank import LowRank
from tare.zeroth.record import Record

MATRIX = Leaf("w", (3, 4), torch.float64, "linear")
VECTOR = Leaf("b", (5,), torch.float64, "bias")
CONV = Leaf("c", (3, 2, 2, 1), torch.float64, "conv")
EXPERTS = Leaf("e", (2, 3, 2), torch.float64, "expert")
ALL = [Gaussian(), Rademacher(), Sphere(), Coordinate(), LowRank(2), LowRank(1), Subspace(2), Subspace(100)]


def drawn(law: Law, leaf: Leaf, member: int = 0, step: int = 0, seed: int = 0, state: State | None = None) -> Tensor:
    draw = Draw(leaf, leaf.name, seed, step, member)
    weight = torch.zeros(leaf.shape, dtype=leaf.dtype)
    return law.draw(draw, state or State({}, {}), weight).view(leaf.shape)


def many(law: Law, leaf: Leaf, count: int) -> Tensor:
    """[count, numel] of members and steps."""
    state = kept(law, leaf)
    law.prepare(Draw(leaf, leaf.name, 0, 0), state, torch.zeros(leaf.shape))
    found = [drawn(law, leaf, member=k % 10, step=k // 10, state=state).flatten() for k in range(count)]
    return torch.stack(found).double()


def kept(law: Law, leaf: Leaf, **storage: Any) -> State:
    """Fresh state of a law for a leaf."""
    slots = Storage(**storage).slots(leaf, law.spec(leaf))
    return State(allocate(slots, torch.device("cpu")), slots)


ELEMENTWISE = [(law, MATRIX) for law in (Gaussian(), Rademacher(), Sphere(), Coordinate())]
STRUCTURED = [(LowRank(rank), leaf) for rank in (1, 3) for leaf in (MATRIX, VECTOR, CONV, EXPERTS)]


@pytest.mark.parametrize(
    ("law", "leaf"), [*ELEMENTWISE, *STRUCTURED], ids=lambda x: x.name if isinstance(x, Leaf) else x.describe()
)
def test_estimates_have_the_mean_and_the_factor_of_section_15(law, leaf):
    """E (z . g) z = g and E ||(z . g) z||^2 = V ||g||^2, within 4.5 standard deviations of 2,500 directions' means."""
    count = 2500
    z = many(law, leaf, count)
    g = torch.linspace(-1.0, 1.5, leaf.numel, dtype=torch.float64)
    estimates = (z @ g).unsqueeze(1) * z
    error = (estimates.mean(0) - g) / (estimates.std(0) / math.sqrt(count) + 1e-12)
    assert float(error.abs().max()) < 4.5
    squares = estimates.square().sum(1) / g.square().sum()
    assert abs(float(squares.mean()) - law.factor(leaf)) < 4.5 * float(squares.std()) / math.sqrt(count) + 1e-9


@pytest.mark.parametrize("leaf", [MATRIX, VECTOR, CONV, EXPERTS], ids=lambda leaf: leaf.name)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_subspace_sees_the_projection_of_the_gradient_and_nothing_else(leaf, rank):
    """E z z^T = P P^T, a projection of rank k; z stays in it; V = k + 2 on P g. Bounds as above, over 2,000 directions of one basis."""
    law, count = Subspace(rank, period=0), 2000
    z = many(law, leaf, count)
    values, vectors = torch.linalg.eigh(z.T @ z / count)
    k = law.dimensions(leaf)
    assert (values > 1e-9).sum() == k
    p = vectors[:, -k:]
    inside = z @ p
    assert torch.allclose(inside.square().sum(1), z.square().sum(1), rtol=1e-9)
    covariance = inside.T @ inside / count
    assert float((covariance - torch.eye(k, dtype=torch.float64)).abs().max()) < 5 * math.sqrt(2 / count)
    g = p @ (p.T @ torch.linspace(-1.0, 1.5, leaf.numel, dtype=torch.float64))
    squares = (z @ g).square() * z.square().sum(1) / g.square().sum()
    assert abs(float(squares.mean()) - law.factor(leaf)) < 4.5 * float(squares.std()) / math.sqrt(count)


def test_a_mean_over_n_directions_has_the_factor_v_plus_n_minus_1_over_n():
    z, g, n = many(Gaussian(), MATRIX, 6_000), torch.linspace(-1.0, 1.5, 12, dtype=torch.float64), 4
    estimates = ((z @ g).unsqueeze(1) * z).view(-1, n, 12).mean(1)
    squares = estimates.square().sum(1) / g.square().sum()
    want = (Gaussian().factor(MATRIX) + n - 1) / n
    assert abs(float(squares.mean()) - want) < 4.5 * float(squares.std()) / math.sqrt(squares.numel())


@pytest.mark.parametrize("numel", [1, 2, 7, 1000, 300_000])
def test_the_sphere_has_its_radius(numel):
    leaf = Leaf("w", (numel,), torch.float32, "norm")
    for step in range(3):
        z = drawn(Sphere(), leaf, step=step).double()
        assert float(z.square().sum()) == pytest.approx(numel, rel=1e-6)


def test_the_sphere_has_its_radius_wherever_it_is_cut():
    """A piece, and a sum that is added to a piece, know the length of the whole leaf; the order of squares does not matter."""
    leaf = Leaf("w", (5000,), torch.float32, "norm")
    draw, state, weight = Draw(leaf, "w", 0, 3), State({}, {}), torch.zeros(5000)
    whole = Sphere().draw(draw, state, weight)
    assert torch.equal(Sphere().draw(draw, state, weight, 77, 4000), whole[77:4000])
    part = torch.ones(100)
    Sphere().add_(part, draw, state, weight, 0.5, start=1234)
    assert torch.allclose(part, 1.0 + 0.5 * whole[1234:1334], rtol=1e-6)
    exact = sum(x * x for x in Gaussian().draw(draw, state, weight).double().tolist())
    assert squared_norm(draw.key, 5000, torch.device("cpu")) == pytest.approx(exact, rel=1e-12)


def test_a_coordinate_is_one_and_every_one_is_met():
    z = many(Coordinate(), MATRIX, 600)
    assert ((z != 0).sum(1) == 1).all()
    assert torch.allclose(z.abs().max(1).values, torch.tensor(math.sqrt(12.0), dtype=torch.float64))
    hits = (z != 0).sum(0)
    assert float((hits - 50.0).abs().max()) < 4.5 * math.sqrt(50 * 11 / 12)
    assert abs(float(z.sum(1).sign().sum())) < 4 * math.sqrt(600)


def test_a_coordinate_of_a_strided_leaf_is_the_same_one():
    leaf = Leaf("w", (6, 5), torch.float32, "linear")
    target = torch.zeros(5, 6).T
    Coordinate().add_(target, Draw(leaf, "w", 0, 0), State({}, {}), target, 2.0)
    assert torch.equal(target, 2.0 * drawn(Coordinate(), leaf))


# ---- one leaf, one piece, any state


@pytest.mark.parametrize(
    "leaf", [MATRIX, VECTOR, CONV, EXPERTS, Leaf("s", (), torch.float32, "scalar")], ids=lambda x: x.name
)
@pytest.mark.parametrize("law", ALL, ids=lambda law: law.describe())
def test_a_piece_is_a_piece_of_the_whole(law, leaf):
    draw, state, weight = Draw(leaf, leaf.name, 4, 2, 1), State({}, {}), torch.zeros(leaf.shape, dtype=leaf.dtype)
    whole = law.draw(draw, state, weight)
    assert whole.dtype == leaf.compute_dtype
    assert whole.shape == (leaf.numel,)
    for start in range(leaf.numel):
        for stop in range(start + 1, leaf.numel + 1):
            # products of a part of the rows may round otherwise
            assert torch.allclose(law.draw(draw, state, weight, start, stop), whole[start:stop], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.describe())
def test_adding_is_drawing_and_adding(law):
    leaf = Leaf("w", (30, 20), torch.float32, "linear")
    state, weight = State({}, {}), torch.zeros(30, 20)
    draws = [Draw(leaf, "w", 1, 0, member) for member in range(3)]
    terms = list(zip(draws, (0.5, -2.0, 1e-3), strict=True))
    z = [law.draw(draw, state, weight).view(30, 20) for draw in draws]
    want = 1.0 + 0.5 * z[0] - 2.0 * z[1] + 1e-3 * z[2]
    for target in (torch.ones(30, 20), torch.ones(20, 30).T):
        one_by_one, together = target.clone(), target.clone()
        for draw, c in terms:
            law.add_(one_by_one, draw, state, weight, c)
        law.gather_(together, terms, state, weight)
        fresh = law.moved(target, terms, state, weight)
        for found in (one_by_one, together, fresh):
            assert torch.allclose(found, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(together, fresh)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch.ones(30, 20, dtype=dtype)
        law.gather_(rounded, terms, state, weight)
        # every term may round once
        assert torch.allclose(rounded.float(), want, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.describe())
def test_what_is_drawn_depends_on_name_seed_step_and_member_alone(law):
    state = State({}, {})
    base = drawn(law, MATRIX)
    assert torch.equal(drawn(law, MATRIX), base)
    others = [drawn(law, MATRIX, member=1), drawn(law, MATRIX, step=1), drawn(law, MATRIX, seed=1)]
    others.append(law.draw(Draw(MATRIX, "v", 0, 0), state, torch.zeros(3, 4, dtype=torch.float64)).view(3, 4))
    for other in others:
        assert not torch.equal(other, base)
    for_bf16 = law.draw(Draw(Leaf("w", (3, 4), torch.bfloat16, "linear"), "w", 0, 0), state, torch.zeros(3, 4))
    assert torch.equal(for_bf16.view(3, 4), drawn(law, Leaf("w", (3, 4), torch.float32, "linear")))


def test_fp64_directions_are_the_fp32_ones():
    for own in (Gaussian(), Rademacher()):
        single = drawn(own, Leaf("w", (40,), torch.float32, "norm"))
        assert torch.equal(drawn(own, Leaf("w", (40,), torch.float64, "norm")), single.double())


@dataclass(frozen=True)
class Listening(Gaussian):
    """Gaussian; to see that a wrapper may override what an element is multiplied by."""

    def gain(self, draw: Draw, device: torch.device) -> float:
        return 3.0


def test_gain_reaches_every_use():
    leaf = Leaf("w", (50,), torch.float32, "norm")
    assert torch.allclose(drawn(Listening(), leaf), 3.0 * drawn(Gaussian(), leaf))


# ---- subspaces: state, periods, limits


def test_a_subspace_that_is_everything_is_gaussian():
    for leaf in (MATRIX, VECTOR, CONV, EXPERTS):
        assert torch.equal(drawn(Subspace(leaf.numel), leaf), drawn(Gaussian(), leaf))
        assert Subspace(leaf.numel).factor(leaf) == Gaussian().factor(leaf)
        assert Subspace(leaf.numel).spec(leaf) == {}


@pytest.mark.parametrize("basis", ["fp32", "seed"])
def test_bases_in_the_state_are_those_that_are_drawn_without_it(basis):
    law = Subspace(2, period=3)
    for leaf in (Leaf("w", (9, 7), torch.float32, "linear"), Leaf("e", (2, 5, 4), torch.float32, "expert")):
        state = kept(law, leaf, basis=basis)
        for step in range(7):
            draw = Draw(leaf, leaf.name, 0, step)
            law.prepare(draw, state, torch.zeros(leaf.shape))
            assert torch.equal(drawn(law, leaf, step=step, state=state), drawn(law, leaf, step=step))
            assert state["span_index"] == step // 3 + 1
            u = law.basis(draw, state, "span_left", torch.device("cpu"))
            assert u is not None
            assert torch.allclose(u.mT @ u, torch.eye(2).expand(*u.shape[:-2], 2, 2), atol=1e-6)
        tensors = [name for name, value in state.raw.items() if isinstance(value, Tensor)]
        assert tensors == (["span_left", "span_right"] if basis == "fp32" else [])


def test_bases_change_with_the_period_only():
    law, leaf = Subspace(2, period=3), Leaf("w", (9, 7), torch.float32, "linear")
    bases = [law.basis(Draw(leaf, "w", 0, t), State({}, {}), "span_left", torch.device("cpu")) for t in range(4)]
    assert torch.equal(bases[0], bases[2])
    assert not torch.allclose(bases[2], bases[3])


@pytest.mark.parametrize("storage", [{}, {"basis": "seed"}, {"basis": "bf16"}])
def test_training_in_subspaces_resumes_bit_for_bit(storage):
    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        return net, tare.MeZO(net, lr=1e-2, directions=Subspace(2, period=2), storage=storage, rule="momentum")

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    net, opt = build()
    for _ in range(3):
        opt.step(lambda: net(x).square().mean())
    saved = {"model": {k: v.clone() for k, v in net.state_dict().items()}, "opt": opt.state_dict()}
    again, other = build()
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    for _ in range(3):
        opt.step(lambda: net(x).square().mean())
        other.step(lambda: again(x).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


# ---- training: every law goes through the optimizer


@pytest.mark.parametrize("name", list(LAWS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_law_descends_a_quadratic(name, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(20, 6, dtype=dtype)
    own = {"rank": 2} if name == "subspace" else {}
    opt = tare.MeZO(net, lr=5e-3, eps=1e-2 if dtype == torch.bfloat16 else 1e-3, n=4, directions=law(name, **own))
    losses = [opt.step(lambda: (net(x).float() - 1.0).square().mean()) for _ in range(40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.describe())
def test_one_leaf_alone_can_be_replayed(law):
    """A step of the whole model, and the same record on one of its leaves in an optimizer of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    single = net[1].weight.detach().clone().requires_grad_()
    records: list[Record] = []
    opt = tare.MeZO(net, lr=1e-2, n=2, directions=law, on_step=records.append)
    alone = tare.MeZO([("1.weight", single)], lr=1e-2, n=2, directions=law)
    x = torch.randn(5, 6)
    for _ in range(3):
        opt.step(lambda: net(x).square().mean())
    for record in records:
        alone.replay(Record(record.step, record.terms, record.factor, record.rates, leaves=("1.weight",)))
    assert torch.equal(single, net[1].weight)


# ---- names and refusals


def test_laws_have_names():
    assert list(LAWS) == ["gaussian", "rademacher", "sphere", "coordinate", "low-rank", "subspace"]
    assert law("gaussian") == Gaussian()
    assert law("low-rank", rank=4) == LowRank(4)
    assert law("subspace", rank=3, period=5) == Subspace(3, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gausian", {}, r"directions: 'gausian' is not one of gaussian, .*\(did you mean 'gaussian'\?\)"),
        ("gaussian", {"rank": 2}, "directions: gaussian takes no options, not 'rank'"),
        ("subspace", {"ranks": 2}, "directions: subspace takes rank, period, not 'ranks'"),
        ("subspace", {"rank": 0}, "Invalid rank: 0; expected a whole number >= 1"),
        ("subspace", {"period": -1}, "Invalid period: -1"),
        ("low-rank", {"rank": 1.5}, "Invalid rank: 1.5"),
    ],
)
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        law(name, **options)


def test_rules_that_recall_need_directions_that_depend_on_nothing_else():
    from tare.zeroth.recall import Recall

    with pytest.raises(InputError, match="draws former directions again"):
        tare.MeZO(nn.Linear(8, 8), directions=Subspace(2), rule=Recall(Momentum(0.9), 3))
    assert Directed(Gaussian(), Momentum(0.0)).proportional == 1.0
