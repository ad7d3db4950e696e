"""ZO-RankSGD: the recorded traces, its weights and limits, line search, and answers from programs and people."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import Trace, load

from tare.core.errors import InputError
from tare.methods.zo_rank import ZORank
from tare.testing.directions import RecordedDirections
from tare.zeroth.inforward import ReadElsewhere
from tare.zeroth.lowrank import LowRank
from tare.zeroth.ranking import Candidate, Ranking
from tare.zeroth.record import Record


class Point(nn.Module):
    """f(x) = 0.5 ||A x - b||^2."""

    def __init__(self, start: Tensor, a: Tensor, b: Tensor):
        super().__init__()
        self.x, self.a, self.b = nn.Parameter(start.clone()), a, b

    def forward(self) -> Tensor:
        return 0.5 * (self.a @ self.x - self.b).square().sum()


def point_of(d: int, seed: int = 0) -> Point:
    generator = torch.Generator().manual_seed(seed)
    a, b, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((d + 2, d), (d + 2,), (d,)))
    return Point(x, a, b)


def built(trace: Trace, **own: Any) -> tuple[Point, ZORank]:
    h, t = trace.hyper, trace.tensors
    published = trace.name == "ranksgd_code_f64"
    net = Point(t["x0"], t["A"], t["b"])
    opt = ZORank(
        net, h["stepsize"] * (h["mu"] if published else 1.0), h["mu"], m=h["m"], k=h["k"], line_search=h["line_search"],
        gamma=h["gamma"], weights="published" if published else "zero-sum", keep_best=published,
        directions=RecordedDirections(dict(enumerate(t["xi"]))), **own,
    )  # fmt: skip
    return net, opt


def best_of(candidates: list[Candidate], net: Point) -> list[int]:
    losses = []
    for candidate in candidates:
        with candidate:
            losses.append(float(net()))
    return sorted(range(len(losses)), key=losses.__getitem__)


@pytest.mark.parametrize("told", ["losses", "order", "by hand"])
@pytest.mark.parametrize("memory", ["forward", "in-place-exact"])
@pytest.mark.parametrize("name", ["ranksgd_code_f64", "ranksgd_zero_sum_f64"])
def test_trace(name: str, memory: str, told: str) -> None:
    trace = load(name)
    h = trace.hyper
    records: list[Record] = []
    net, opt = built(trace, on_step=records.append, memory=memory)
    scale = h["mu"] if name == "ranksgd_code_f64" else 1.0
    for t in range(trace.steps):
        before = dict(opt.param_groups[0]["forward_kept"])
        if told == "losses":
            opt.step(net)
        elif told == "order":
            opt.step(ranker=lambda candidates: best_of(candidates, net)[: h["k"]])
        else:
            while not opt.tell(torch.tensor(best_of(opt.ask(), net))):
                pass
        assert net.x.detach().sub(trace.tensors["x"][t]).abs().max() <= trace.meta["tolerance"]["x"]
        assert records[t].deltas[:-1] == tuple(trace.tensors["ranked"][t].tolist())
        assert records[t].deltas[-1] == trace.tensors["picked"][t]
        fresh = dict(enumerate(opt.probe.weigh([int(i) for i in records[t].deltas[:-1]])))
        direction = scale * sum(w * trace.tensors["xi"][t, i] for i, w in fresh.items())
        earlier = {place: w for place, w in before.items() if "/" in place}
        rounds = 1 + len({place.partition("/")[0] for place in earlier})
        for place, w in earlier.items():
            when, _, i = place.partition("/")
            direction = direction + scale * w * trace.tensors["xi"][int(when), int(i)]
        assert (direction / rounds - trace.tensors["direction"][t]).abs().max() <= trace.meta["tolerance"]["direction"]


def published_slowly(
    net: Point, xi: Tensor, *, k: int, mu: float, stepsize: float, lengths: int, top: int
) -> tuple[list[Tensor], int]:
    """The released procedure with a dense running mean of directions; (points after each round, failed searches)."""
    x, search, rounds, failed, found = net.x.detach().clone(), torch.zeros_like(net.x), 0, 0, []

    def f(point: Tensor) -> float:
        return float(0.5 * (net.a @ point - net.b).square().sum())

    for own in xi:
        m = len(own)
        queries = [x + mu * z for z in own]
        ranked = sorted(range(m), key=lambda i: f(queries[i]))[:k]
        direction = torch.zeros_like(x)
        for i in range(m):
            direction += (top - 2 * ranked.index(i) if i in ranked else -k) * (queries[i] - x)
        search = (search * rounds + direction / (k * (k - 1) / 2 + k * (m - k))) / (rounds + 1)
        rounds += 1
        tried = [*(x + stepsize * 0.5**i * search for i in range(lengths)), queries[ranked[0]], x]
        best = min(range(len(tried)), key=lambda i: f(tried[i]))
        if best == len(tried) - 1:
            failed += 1
        else:
            x, search, rounds = tried[best], torch.zeros_like(x), 0
        found.append(x.clone())
    return found, failed


@pytest.mark.parametrize("weights", ["published", "zero-sum"])
def test_the_released_procedure_with_searches_that_fail(weights: Any) -> None:
    """The recorded trace has none, so its running mean of directions is met here."""
    net, mu, stepsize = point_of(7), 0.3, 40.0
    xi = torch.randn(40, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    top = 5 if weights == "published" else 4
    expected, failed = published_slowly(net, xi, k=2, mu=mu, stepsize=stepsize, lengths=3, top=top)
    assert failed > 10
    opt = ZORank(
        net,
        stepsize * mu,
        mu,
        m=5,
        k=2,
        weights=weights,
        line_search=3,
        directions=RecordedDirections(dict(enumerate(xi))),
    )
    for point in expected:
        opt.step(net)
        assert torch.allclose(net.x, point, rtol=0, atol=1e-11)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(2, 1), (2, 2), (6, 3), (8, 8), (5, 1)])
def test_weights_are_sums_over_pairs_whose_order_is_known(m: int, k: int) -> None:
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m)).tolist()
    ranked, rest = order[:k], order[k:]
    edges = [*itertools.combinations(ranked, 2), *itertools.product(ranked, rest)]
    expected = [0.0] * m
    for better, worse in edges:
        expected[better] += 1 / len(edges)
        expected[worse] -= 1 / len(edges)
    weights = Ranking(m, k).weigh(ranked)
    assert weights == pytest.approx(expected)
    assert sum(weights) == pytest.approx(0.0, abs=1e-12)
    published = Ranking(m, k, weights="published").weigh(ranked)
    assert sum(published) == pytest.approx(k / len(edges))


def test_one_better_of_two_steps_along_their_difference() -> None:
    net = point_of(4)
    before = net.x.detach().clone()
    xi = torch.randn(2, 4, dtype=torch.float64)
    ZORank(net, 0.3, 0.1, m=2, k=1, directions=RecordedDirections({0: xi})).step(net)
    values = [net.a @ (before + 0.1 * z) - net.b for z in xi]
    better, worse = sorted((0, 1), key=lambda i: float(values[i].square().sum()))
    assert torch.allclose(net.x, before - 0.3 * (xi[worse] - xi[better]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("search", [0, 3])
@pytest.mark.parametrize("change", [lambda v: v.exp(), lambda v: v**3, lambda v: 1e6 * v - 7, lambda v: v.log()])
def test_only_the_order_of_losses_counts(change: Any, search: int) -> None:
    one, other = point_of(5), point_of(5)
    plain, changed = (ZORank(net, 0.05, 0.05, line_search=search) for net in (one, other))
    for _ in range(4):
        plain.step(one)
        changed.step(lambda: change(other()))
    assert one.x.equal(other.x)


def test_on_a_linear_function_the_mean_step_is_along_the_gradient() -> None:
    """E g is a positive multiple of the slope: over 1000 steps within what sqrt(d / steps) leaves."""
    d, steps = 12, 1000
    slope = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(d, dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.x @ slope

    for k in (1, 3, 6):
        net = Linear()
        opt = ZORank(net, 1.0, 0.1, k=k)
        for _ in range(steps):
            opt.step(net)
        assert torch.cosine_similarity(net.x.detach(), -slope, dim=0) > 0.97


def test_larger_is_better_where_it_is_maximized() -> None:
    one, other = point_of(5), point_of(5)
    for line_search in (0, 3):
        low = ZORank(one, 0.05, 0.05, line_search=line_search)
        high = ZORank(other, 0.05, 0.05, line_search=line_search, maximize=True)
        for _ in range(3):
            low.step(one)
            high.step(lambda: -other())
        assert one.x.equal(other.x)
    for opt, net in ((low, one), (high, other)):  # an order has the best first, whatever the values mean
        opt.step(ranker=lambda candidates, net=net: best_of(candidates, net))
    assert one.x.equal(other.x)


# -- line search ---------------------------------------------------------------------------------------------------------


def test_weights_decay_but_for_names_that_are_passed_by() -> None:
    torch.manual_seed(0)
    start = nn.Linear(4, 3, dtype=torch.float64)
    x, nets = torch.randn(5, 4, dtype=torch.float64), []
    for decay in (0.0, 0.5):
        nets.append(net := copy.deepcopy(start))
        ZORank(net, 0.1, 1e-2, weight_decay=decay).step(lambda net=net: net(x).square().mean())
    plain, decayed = nets
    assert not plain.weight.equal(start.weight)
    assert torch.allclose(decayed.weight, plain.weight - 0.1 * 0.5 * start.weight, rtol=0, atol=1e-15)
    assert decayed.bias.equal(plain.bias)


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_line_search_never_takes_a_worse_point_than_its_candidates(keep_best: bool) -> None:
    net = point_of(6)
    opt = ZORank(net, 2.0, 0.1, line_search=5, keep_best=keep_best)
    values = [net().item()]
    for _ in range(40):
        opt.step(net)
        values.append(net().item())
    if keep_best:
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values))
    assert values[-1] < 0.3 * values[0]


def test_failed_directions_are_averaged_and_a_skipped_step_does_not_shift_them() -> None:
    """An objective that is worse everywhere but at theta fails every search; its directions are those of their own steps."""
    net = point_of(4)
    xi = torch.randn(4, 3, 4, dtype=torch.float64)
    opt = ZORank(net, 0.5, 0.1, m=3, k=3, line_search=2, directions=RecordedDirections(dict(enumerate(xi))))
    start = net.x.detach().clone()

    def worse() -> float:
        with torch.no_grad():
            return 0.0 if net.x.equal(start) else 1.0 + float(net.x[0])

    opt.step(worse)
    opt.step(lambda: float("nan"))  # skipped, and counted
    opt.step(worse)
    assert net.x.equal(start)
    kept = opt.param_groups[0]["forward_kept"]
    assert {place.partition("/")[0] for place in kept} == {"0", "2"}
    seen: list[Tensor] = []

    def looking() -> float:
        seen.append(net.x.detach().clone())
        return float(len(seen))  # the first of each question is the best

    opt.step(looking)
    way = sum(w * xi[int(place.partition("/")[0]), int(place.partition("/")[2])] for place, w in kept.items())
    way = way + sum(w * xi[3, i] for i, w in enumerate(opt.probe.weigh([0, 1, 2])))
    assert torch.allclose(net.x, start + 0.5 * way / 3, rtol=0, atol=1e-13)
    assert opt.param_groups[0]["forward_kept"] == {}


def test_resume_between_failed_searches_is_exact() -> None:
    net = point_of(4)
    start = net.x.detach().clone()

    def worse() -> float:
        return 0.0 if net.x.equal(start) else 1.0 + float(net.x.detach()[0])

    opt = ZORank(net, 0.5, 0.1, line_search=2, seed=5)
    opt.step(worse)
    opt.step(worse)
    assert net.x.equal(start)
    saved = copy.deepcopy(opt.state_dict())
    again = copy.deepcopy(net)
    resumed = ZORank(again, 0.5, 0.1, line_search=2, seed=5)
    resumed.load_state_dict(saved)
    for _ in range(2):
        opt.step(net)
        resumed.step(again)
    assert again.x.equal(net.x)
    assert not again.x.equal(start)


@pytest.mark.parametrize("directions", ["gaussian", "rademacher", LowRank(2)])
def test_records_replay(directions: Any) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3, dtype=torch.float64)
    again, x = copy.deepcopy(net), torch.randn(5, 4, dtype=torch.float64)
    records: list[Record] = []
    opt = ZORank(net, 0.5, 0.1, line_search=3, directions=directions, on_step=records.append)
    for _ in range(8):
        opt.step(lambda: net(x).square().mean())
    other = ZORank(again, 0.5, 0.1, line_search=3, directions=directions)
    for record in records:
        other.replay(record)
    assert all(p.equal(q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


# -- answers -------------------------------------------------------------------------------------------------------------


def test_a_question_stays_open_until_it_is_answered() -> None:
    net = point_of(5)
    opt = ZORank(net, 0.1, 0.1, line_search=2)
    before = net.x.detach().clone()
    first, again = opt.ask(), opt.ask()
    assert [c.point for c in first] == [c.point for c in again]
    for wrong, says in (
        ([0, 1], "best 3 of 6"), ([0, 0, 1], "each once"), ([0, 1, 6], "from 0 to 5"), ([-1, 0, 1], "from 0 to 5"), (4, "int"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            opt.tell(wrong)  # type: ignore[arg-type]
    assert opt.steps == 0
    assert not opt.tell([3, 1, 4])
    assert len(opt.ask()) == 4  # two lengths, the best of the six, and theta
    assert opt.tell([2])
    assert opt.steps == 1
    assert not net.x.equal(before)
    with pytest.raises(InputError, match="nothing was asked"):
        opt.tell([0, 1, 2])


def test_a_question_is_the_same_in_a_process_that_resumes() -> None:
    net, again = point_of(5), point_of(5)
    opt = ZORank(net, 0.1, 0.1)
    opt.step(net)
    asked = opt.ask()
    saved = copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        again.x.copy_(net.x)
    resumed = ZORank(again, 0.1, 0.1)
    resumed.ask()  # of another step: dropped by what is loaded
    resumed.load_state_dict(saved)
    for mine, theirs in zip(asked, resumed.ask(), strict=True):
        with mine:
            here = net().item()
        with theirs:
            assert again().item() == here


def test_candidates_share_random_numbers_and_leave_the_generators_alone() -> None:
    net = point_of(3)
    opt = ZORank(net, 0.1, 0.1)
    before = torch.get_rng_state()
    drawn = []
    for candidate in opt.ask():
        with candidate:
            drawn.append(torch.rand(2))
            assert not torch.is_grad_enabled()
    assert all(d.equal(drawn[0]) for d in drawn)
    assert torch.get_rng_state().equal(before)
    opt.tell([0, 1, 2])
    with opt.ask()[0]:
        assert not torch.rand(2).equal(drawn[0])


@pytest.mark.parametrize("memory", ["forward", "in-place", "in-place-exact"])
def test_candidates_restore_the_weights(memory: str) -> None:
    net = point_of(3)
    opt = ZORank(net, 0.1, 0.1, memory=memory)
    before = net.x.detach().clone()
    for candidate in opt.ask():
        with candidate:
            moved = net().item()
        assert torch.allclose(net.x, before, rtol=0, atol=1e-15)
        assert moved != net().item()
    closure = lambda: net()  # noqa: E731
    opt.step(closure)  # an open question is dropped
    assert opt.steps == 1


class Aside(Point):
    """Reads its parameter past the module that owns it."""

    def __init__(self) -> None:
        inner = point_of(3)
        super().__init__(inner.x, inner.a, inner.b)
        self.holder, self.x = nn.Module(), None  # type: ignore[assignment]
        self.holder.x = nn.Parameter(inner.x.detach().clone())

    def forward(self) -> Tensor:
        return 0.5 * (self.a @ self.holder.x - self.b).square().sum()


def test_a_weight_read_past_its_module_is_found_out() -> None:
    net = Aside()
    opt = ZORank(net, 0.1, 0.1)
    first = opt.ask()[0]
    with pytest.raises(ReadElsewhere, match=r"holder\.x: read outside"), first:
        wrong = net().item()
    with first:
        right = net().item()
    assert wrong == net().item() != right
    again = ZORank(Aside(), 0.1, 0.1)
    again.step(ranker=lambda candidates: best_of(candidates, again.model))  # type: ignore[arg-type]
    opt.step(opt.model)
    assert again.model.holder.x.equal(net.holder.x)  # type: ignore[union-attr]


def test_a_schedule_may_follow() -> None:
    net = point_of(3)
    opt = ZORank(net, 0.1, 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while not opt.tell(best_of(opt.ask(), net)):
            pass
        schedule.step()
    assert opt.param_groups[0]["lr"] == 0.05


def test_lr_zero_stays() -> None:
    net = point_of(3)
    before = net.x.detach().clone()
    for own in ({}, {"line_search": 2}):
        opt = ZORank(net, 0.0, 0.1, **own)
        opt.step(net)
        assert net.x.equal(before)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"m": 1}, "m: 1"),
        ({"k": 9}, "at most m = 6"),
        ({"k": 0}, "k: 0"),
        ({"mu": 0.0}, "mu"),
        ({"gamma": 1.0}, "gamma"),
        ({"weights": "zero"}, "weights: 'zero'"),
        ({"line_search": -1}, "line_search"),
        ({"line_search": 2, "rule": "adam"}, "plain SGD"),
        ({"directions": "gausian"}, "did you mean 'gaussian'"),
    ],
)
def test_bad_input_is_one_clear_line(own: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as found:
        ZORank(point_of(3), 0.1, **own)
    assert "\n" not in str(found.value)


def test_steps_want_one_source() -> None:
    net = point_of(3)
    opt = ZORank(net, 0.1)

    def ranker(candidates: list[Candidate]) -> Sequence[int]:
        return range(3)

    for both in ({}, {"closure": net, "ranker": ranker}):
        with pytest.raises(InputError, match="give a closure that returns losses, or ranker="):
            opt.step(**both)


def test_groups_with_rates_of_their_own_have_no_line() -> None:
    net = nn.Linear(3, 2)
    groups = [{"params": [net.weight], "lr": 0.1}, {"params": [net.bias], "lr": 0.2}]
    opt = ZORank(groups, 0.1, line_search=2)
    with pytest.raises(InputError, match="one learning rate for all groups"):
        opt.step(lambda: net(torch.ones(1, 3)).sum())
    ZORank(groups, 0.1).step(lambda: net(torch.ones(1, 3)).sum())
