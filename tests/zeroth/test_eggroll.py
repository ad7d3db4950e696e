"""EGGROLL: its directions, its limits, workers that exchange losses, resume, and what it refuses."""

import copy
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.methods.eggroll import Eggroll
from tare.methods.mezo import MeZO
from tare.zeroth.directions import Draw
from tare.zeroth.fitness import Baseline, Raw, ZScore
from tare.zeroth.lowrank import LowRank, runs
from tare.zeroth.members import Members
from tare.zeroth.population import Antithetic
from tare.zeroth.probes import Point
from tare.zeroth.record import Record

NOTHING = State({}, {})


def leaf_of(*shape: int, role: Any = "linear", dtype: torch.dtype = torch.float64) -> Leaf:
    return Leaf("w", shape, dtype, role)


def drawn(law: LowRank, leaf: Leaf, member: int = 0, step: int = 0) -> Tensor:
    weight = torch.zeros(leaf.shape, dtype=leaf.dtype)
    return law.draw(Draw(leaf, "w", 0, step, member), NOTHING, weight).view(leaf.shape)


def net_of(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers).to(dtype)


# -- directions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_direction_is_the_product_of_its_factors(shape: tuple[int, int], rank: int) -> None:
    law, leaf = LowRank(rank), leaf_of(*shape)
    a, b = law.factors(Draw(leaf, "w", 0, 3), [2], torch.device("cpu"))
    whole = drawn(law, leaf, 2, 3)
    assert torch.allclose(whole, a[0] @ b[0].mT / math.sqrt(rank), rtol=0, atol=1e-14)
    assert torch.linalg.matrix_rank(whole) == min(rank, *shape)
    flat = whole.flatten()
    for start, stop in ((0, 3), (2, 9), (4, leaf.numel)):  # any part is that part of the whole
        part = law.draw(Draw(leaf, "w", 0, 3, 2), NOTHING, whole, start, min(stop, leaf.numel))
        assert torch.allclose(part, flat[start:stop], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "leaf", [leaf_of(3, 4, 5, role="expert"), leaf_of(4, 2, 3, 3, role="conv"), leaf_of(6, role="norm")]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_of_directions_are_sums(leaf: Leaf, dtype: torch.dtype) -> None:
    law, leaf = LowRank(2), Leaf("w", leaf.shape, dtype, leaf.role)
    target = torch.zeros(leaf.shape, dtype=leaf.dtype)
    terms = [(Draw(leaf, "w", 0, 0, member), c) for member, c in ((4, 0.5), (0, -1.0), (1, 2.0))]
    law.gather_(target, terms, NOTHING, target)
    one_by_one = torch.zeros(leaf.shape, dtype=leaf.compute_dtype)
    for draw, c in terms:
        one_by_one += c * law.draw(draw, NOTHING, target).view(leaf.shape)
    assert torch.allclose(
        target.to(one_by_one.dtype), one_by_one, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    part = torch.zeros(3, dtype=leaf.compute_dtype)
    law.gather_(part, terms, NOTHING, target, start=2)
    assert torch.allclose(part, one_by_one.flatten()[2:5], rtol=1e-5, atol=1e-6)


def test_a_perturbed_16_bit_weight_is_rounded_once() -> None:
    law, leaf = LowRank(3), leaf_of(300, 1000, dtype=torch.bfloat16)
    weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for target in (weight.clone(), weight.mT.contiguous().mT):  # contiguous, and not
        law.add_(target, Draw(leaf, "w", 0, 0), NOTHING, weight, 0.1)
        exact = weight.float() + 0.1 * drawn(law, leaf)
        assert ((target.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_many_members_are_drawn_as_each_alone() -> None:
    law, leaf, cpu = LowRank(2), leaf_of(5, 3), torch.device("cpu")
    members = [0, 1, 2, 7, 5, 6]
    together = law.noise(Draw(leaf, "w", 0, 0), members, cpu)
    for place, member in enumerate(members):
        assert together[place].equal(law.noise(Draw(leaf, "w", 0, 0), [member], cpu)[0])
    assert runs(members) == [(0, 0, 3), (3, 7, 1), (4, 5, 2)]


def test_noise_is_of_the_seed_the_leaf_and_the_step() -> None:
    law, leaf, cpu = LowRank(), leaf_of(4, 4), torch.device("cpu")
    seen = [
        law.noise(Draw(leaf, name, seed, step), [0], cpu)
        for name, seed, step in (("w", 0, 0), ("v", 0, 0), ("w", 1, 0), ("w", 0, 1))
    ]
    assert all(not a.equal(b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(("reuse", "periods"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 0, 0, 1, 1, 1]), (0, [0] * 6)])
def test_noise_is_reused(reuse: int, periods: list[int]) -> None:
    law, leaf = LowRank(1, reuse), leaf_of(4, 3)
    once = LowRank()
    for step, period in enumerate(periods):
        assert drawn(law, leaf, 1, step).equal(drawn(once, leaf, 1, period))


@pytest.mark.parametrize(("shape", "rank"), [((3, 5), 1), ((5, 3), 2), ((4, 4), 64)])
def test_moments_of_entries(shape: tuple[int, int], rank: int) -> None:
    """Uncorrelated, mean 0, variance 1 at any rank; fourth moment 3 + 6 / r, the Gaussian's 3 as the rank grows."""
    law, leaf, count = LowRank(rank), leaf_of(*shape), 40_000
    a, b = law.factors(Draw(leaf, "w", 0, 0), range(count), torch.device("cpu"))
    e = (a @ b.mT / math.sqrt(rank)).flatten(1)  # [count, m n]
    noise = 5 / math.sqrt(count)  # five standard errors, times the spread of what is averaged
    assert e.mean(0).abs().max() < noise
    covariance = e.mT @ e / count
    spread = 3.0 if rank == 1 else 2.0  # of a product of two entries: at most sqrt(9 - 1) at rank 1
    assert (covariance - torch.eye(leaf.numel, dtype=torch.float64)).abs().max() < noise * spread
    fourth = e.pow(4).mean().item()
    assert fourth == pytest.approx(3 + 6 / rank, rel=0.1)


@pytest.mark.parametrize(
    ("leaf", "rank"),
    [(leaf_of(3, 5), 1), (leaf_of(5, 3), 3), (leaf_of(6, role="norm"), 1), (leaf_of(2, 3, 2, role="expert"), 1)],
)
def test_the_variance_factor(leaf: Leaf, rank: int) -> None:
    """E||<g, E> E||^2 = V ||g||^2: against 200,000 draws, within 5 %: the fourth moments of products of normals are large."""
    law, count = LowRank(rank), 200_000
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(leaf.numel, generator=generator, dtype=torch.float64)
    if leaf.matrix is None:
        e = law.vectors(Draw(leaf, "w", 0, 0), range(count), torch.device("cpu"))
    else:
        a, b = law.factors(Draw(leaf, "w", 0, 0), range(count), torch.device("cpu"))
        e = (a @ b.mT / math.sqrt(rank)).flatten(1)
    found = ((e @ g).square() * e.square().sum(1)).mean() / g.square().sum()
    assert found.item() == pytest.approx(law.factor(leaf), rel=0.05)
    mean = (e * (e @ g)[:, None]).mean(0)  # unbiased for a linear function, whatever the rank
    assert (mean - g).norm() / g.norm() < 0.05


def test_the_factor_of_rank_one_and_of_many() -> None:
    leaf = leaf_of(4, 6)
    assert LowRank(1).factor(leaf) == (4 + 2) * (6 + 2)
    assert LowRank(10**6).factor(leaf) == pytest.approx(4 * 6 + 2, rel=1e-5)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_two_members_without_shaping_are_spsa(rank: int) -> None:
    """G = sqrt(2) sigma^2 delta E, delta = (l+ - l-) / (2 sigma): MeZO along E, its lr times a known number."""
    x = torch.randn(5, 4, dtype=torch.float64)
    sigma, lr = 0.02, 0.7
    one, other = net_of(4, 6, 3), net_of(4, 6, 3)
    eggroll = Eggroll(one, lr, sigma, members=2, rank=rank, shaping="none", vectors="gaussian")
    mezo = MeZO(other, lr * math.sqrt(2) * sigma**2, sigma, directions=LowRank(rank))
    for _ in range(3):
        a = eggroll.step(lambda: one(x).square().mean())
        b = mezo.step(lambda: other(x).square().mean())
        assert a == pytest.approx(b, rel=1e-12)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("shaping", "group"), [("zscore", None), ("zscore", 4), ("none", None), ("baseline", None)])
def test_a_constant_added_to_all_rewards_changes_nothing(shaping: Any, group: int | None) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    weights = []
    for constant in (0.0, 1000.0):
        net = net_of(4, 3)
        opt = Eggroll(net, 0.5, 0.1, members=8, shaping=shaping, group=group)
        for _ in range(2):
            opt.step(lambda net=net, c=constant: net(x).square().mean() + c)
        weights.append(net[0].weight.detach())
    assert torch.allclose(*weights, rtol=0, atol=1e-9)  # 1000 takes three digits off the losses
    assert not weights[0].equal(net_of(4, 3)[0].weight)


def test_equal_rewards_change_nothing() -> None:
    net, x = net_of(4, 3), torch.randn(2, 4)
    before = net[0].weight.detach().clone()
    Eggroll(net, 1.0, members=6).step(lambda: 3.25)
    assert net[0].weight.equal(before)
    assert x.numel()


def test_groups_are_compared_with_one_another() -> None:
    """Whatever a prompt adds to its own group's rewards does not weigh in, but for the common spread."""
    rewards = [1.0, 2.0, 11.0, 13.0]
    shaped = ZScore(2)([rewards])
    spread = math.sqrt(torch.tensor(rewards).double().var(correction=0).item() + 1e-5)
    assert shaped == pytest.approx([-0.5 / spread, 0.5 / spread, -1.0 / spread, 1.0 / spread])
    assert ZScore(4)([rewards]) == ZScore()([rewards])


def test_shapings_over_prompts() -> None:
    rewards = [[1.0, 2.0, 5.0, 0.0], [3.0, 3.0, 4.0, 2.0]]
    assert Raw()(rewards) == [2.0, 2.5, 4.5, 1.0]
    shaped = Baseline()(rewards)
    assert shaped[:2] == [0.0, 0.0]
    spreads = [torch.tensor(row).double().std(correction=0).item() + 1e-8 for row in rewards]
    assert shaped[2] == pytest.approx((4.0 / spreads[0] + 1.0 / spreads[1]) / 2)
    one_by_one = [ZScore()([row]) for row in rewards]
    assert [s > 0 for s in ZScore()(rewards)] == [sum(column) > 0 for column in zip(*one_by_one, strict=True)]


def test_it_descends_in_expectation_along_the_gradient() -> None:
    """Many members on a linear function: the step is parallel to the gradient up to noise of sqrt(V / N)."""
    net = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    slope = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = net.weight.detach().clone()
    n = 4096
    x = torch.eye(6, dtype=torch.float64)  # <W, slope> is the sum of W x * slope
    Eggroll(net, 1.0, 1e-2, members=n).step(
        lambda members: members.mean((net(members.repeat(x)) * members.repeat(slope.mT)).sum(1))
    )
    moved = (net.weight.detach() - before).flatten()
    cosine = torch.cosine_similarity(moved, -slope.flatten(), dim=0).item()
    v = LowRank(1).factor(leaf_of(5, 6))
    assert cosine > 1 - 2 * v / n


def test_a_steps_entries_are_about_lr_sigma() -> None:
    for n in (16, 256):
        net = net_of(8, 8)
        before = net[0].weight.detach().clone()
        Eggroll(net, 0.5, 1e-2, members=n).step(lambda net=net: float(net[0].weight.detach().mul(1e3).sin().sum()))
        rms = (net[0].weight.detach() - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.5 * 1e-2, rel=0.4)


def test_sums_of_the_update_do_not_depend_on_how_many_members_are_gathered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = []
    for gathered in (1, 40, 1 << 22):
        monkeypatch.setattr("tare.zeroth.lowrank.GATHERED", gathered)
        net, x = net_of(4, 5), torch.ones(2, 4, dtype=torch.float64)
        Eggroll(net, 1.0, 0.1, members=12, rank=2, vectors="gaussian").step(lambda net=net, x=x: net(x).square().mean())
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-14)
    assert torch.allclose(weights[0], weights[2], rtol=0, atol=1e-14)


def test_maximize_ascends() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    one, other = net_of(4, 3), net_of(4, 3)
    Eggroll(one, 0.5, 0.1, members=8).step(lambda: one(x).square().mean())
    Eggroll(other, 0.5, 0.1, members=8, maximize=True).step(lambda: -other(x).square().mean())
    assert torch.allclose(one[0].weight, other[0].weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_bounds_the_gradient_of_all_leaves_together(limit: float) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    moves = []
    for clip in (None, limit):
        net = net_of(4, 6, 3)
        before = [p.detach().clone() for p in net.parameters()]
        Eggroll(net, 1.0, 0.1, members=8, clip=clip, vectors="gaussian").step(lambda net=net: net(x).square().mean())
        moves.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(net.parameters(), before, strict=True)]))
    norm = moves[0].norm().item()
    assert norm > 1e-3
    expected = moves[0] * min(1.0, limit / norm)
    assert torch.allclose(moves[1], expected, rtol=1e-9, atol=1e-15)


# -- workers, resume, 16 bits --------------------------------------------------------------------------------------------


class Shared:
    """An exchange between threads: each evaluates its slice of the points, all get all losses."""

    def __init__(self, workers: int):
        self.barrier, self.found, self.workers = threading.Barrier(workers), [None] * workers, workers

    def of(self, rank: int) -> Any:
        shared = self

        class One:
            def evaluate(self, points: list[Point], losses_at: Callable[[list[Point]], list[float]]) -> list[float]:
                each = len(points) // shared.workers
                shared.found[rank] = losses_at(points[rank * each : (rank + 1) * each])
                shared.barrier.wait()
                everything = [loss for part in shared.found for loss in part]
                shared.barrier.wait()
                return everything

        return One()


@pytest.mark.parametrize("together", [None, 1, 2])
def test_workers_that_exchange_losses_stay_bitwise_equal(together: int | None) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    shared, start = Shared(2), net_of(4, 6, 3)
    nets = [copy.deepcopy(start) for _ in range(3)]
    evaluated = []

    def work(net: nn.Module, exchange: Any) -> None:
        opt = Eggroll(net, 0.5, 0.1, members=8, exchange=exchange, together=together, rule="adam")
        opt._compared = True
        for _ in range(3):
            opt.step(lambda members: members.mean(net(members.repeat(x)).square()))
        evaluated.append(opt.evaluated)

    threads = [threading.Thread(target=work, args=(nets[rank], shared.of(rank))) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    work(nets[2], None)
    assert evaluated == [12, 12, 24]
    for p, q, r in zip(*(net.parameters() for net in nets), strict=True):
        assert p.equal(q)
        assert torch.allclose(p, r, rtol=0, atol=1e-12)  # fewer members in one product: other roundings of the losses
        if together == 1:
            assert p.equal(r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_resume_is_exact(dtype: torch.dtype, rule: Any) -> None:
    x = torch.randn(5, 4).to(dtype)

    def closure_of(net: nn.Module) -> Callable[[Members], Tensor]:
        return lambda members: members.mean(net(members.repeat(x)).float().square())

    net = net_of(4, 6, 3, dtype=dtype)
    own = {"members": 6, "sigma": 0.05, "rule": rule, "vectors": "gaussian", "seed": 3}
    opt = Eggroll(net, 0.1, **own)
    for _ in range(2):
        opt.step(closure_of(net))
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    for _ in range(3):
        opt.step(closure_of(net))
    again = net_of(4, 6, 3, dtype=dtype)
    again.load_state_dict(weights)
    resumed = Eggroll(again, 0.1, **own)
    resumed.load_state_dict(saved)
    for _ in range(3):
        resumed.step(closure_of(again))
    assert all(p.equal(q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("together", [None, 1])
def test_16_bit_weights_learn(together: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = (x @ torch.randn(6, 2)).bfloat16()
    net = nn.Linear(6, 2).bfloat16()
    opt = Eggroll(net, 0.5, 0.1, members=16, vectors="gaussian", together=together)
    losses = [
        opt.step(lambda members: members.mean((net(members.repeat(x.bfloat16())) - members.repeat(y)).float().square()))
        for _ in range(40)
    ]
    assert losses[-1] < 0.3 * losses[0]


def test_records_replay() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    net, again = net_of(4, 6, 3), net_of(4, 6, 3)
    records: list[Record] = []
    own = {"members": 8, "sigma": 0.1, "shaping": "baseline", "clip": 0.01, "rule": "momentum"}
    opt = Eggroll(net, 0.5, on_step=records.append, **own)
    for _ in range(3):
        opt.step(lambda: net(x).square().mean())
    replayed = Eggroll(again, 0.5, **own)
    for record in records:
        replayed.replay(record)
    assert all(p.equal(q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


# -- which leaves, what is refused ---------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.token(x)))


@pytest.mark.parametrize(
    ("own", "moved"),
    [
        ({}, {"head.weight"}),
        ({"embeddings": True}, {"head.weight", "token.weight"}),
        ({"vectors": "gaussian"}, {"head.weight", "head.bias", "norm.weight", "norm.bias"}),
        ({"vectors": "gaussian", "targets": "head*"}, {"head.weight", "head.bias"}),
    ],
)
def test_which_leaves_move(own: dict[str, Any], moved: set[str]) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.arange(7)[:, None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Eggroll(model, 0.5, 0.1, members=8, **own).step(lambda: model(x).square().mean())
    assert {name for name, p in model.named_parameters() if not p.equal(before[name])} == moved


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"members": 7}, "members: 7; expected an even number"),
        ({"members": 0}, "members: 0"),
        ({"members": 2, "shaping": "baseline"}, "at least 4"),
        ({"members": 8, "group": 3}, "8 members do not divide into groups of 3"),
        ({"shaping": "none", "group": 4}, "use shaping='zscore'"),
        ({"shaping": "zscores"}, "did you mean 'zscore'"),
        ({"members": 8, "group": 4, "prompts": 2}, "groups answer one prompt each"),
        ({"scaling": "papers"}, "did you mean 'paper'"),
        ({"sigma": 0.0}, "sigma"),
        ({"rank": 0}, "rank"),
        ({"reuse": -1}, "reuse"),
        ({"vectors": "thawed"}, "vectors: 'thawed'"),
        ({"clip": -1.0}, "clip"),
        ({"rule": "sgdm"}, "Invalid rule"),
        ({"targets": "nothing.*"}, "matches no parameter"),
        ({"directions": "gausian"}, "did you mean 'gaussian'"),
        ({"directions": "gaussian", "rank": 2}, "options of directions='low-rank'"),
    ],
)
def test_bad_input_is_one_clear_line(own: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as found:
        Eggroll(nn.Linear(4, 3), 1.0, **own)
    assert "\n" not in str(found.value)


def test_a_model_of_vectors_alone_has_nothing_to_train() -> None:
    with pytest.raises(InputError, match="no leaf is trained"):
        Eggroll(nn.LayerNorm(4), 1.0)


def test_what_explain_says() -> None:
    told = Eggroll(Small(), 1.0, members=8).explain(every_leaf=True)
    assert "8 antithetic members, sigma 0.001, fitness by zscore: 8 evaluations a step" in told
    assert "rank 1 gaussian" in told
    assert "untouched" in told


def test_the_probe_alone() -> None:
    probe = Antithetic(4, 0.5, Raw())
    asking = probe.ask(0, {})
    points = next(asking)
    assert [p.members for p in points] == [{0: 0.5}, {0: -0.5}, {1: 0.5}, {1: -0.5}]
    with pytest.raises(StopIteration) as done:
        asking.send([1.0, 2.0, 5.0, 3.0])
    terms = done.value.value.terms
    assert [t.coefficient for t in terms] == pytest.approx([-0.25 * 1.0, -0.25 * -2.0])
