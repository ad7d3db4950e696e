"""Consensus hopping and consensus-based optimisation: the recorded traces, their limits, state, resume and refusals."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import Trace, load

from tare.core.errors import InputError
from tare.methods.consensus import Consensus
from tare.methods.mezo import MeZO
from tare.testing.directions import RecordedDirections
from tare.zeroth.consensus import Hopping, Swarm, gibbs
from tare.zeroth.lowrank import LowRank
from tare.zeroth.record import Record


class Waves(nn.Module):
    """sum 0.5 (x - 0.3)^2 + 0.45 (1 - cos 2 pi (x - 0.3)), the function of the traces; several leaves if asked."""

    def __init__(self, *starts: Tensor):
        super().__init__()
        for number, start in enumerate(starts):
            self.register_parameter(f"part{number}", nn.Parameter(start.clone()))

    @property
    def parts(self) -> list[Tensor]:
        return list(self._parameters.values())  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        x = (
            torch.cat([part.flatten() for part in self.parts]).to(
                torch.promote_types(self.parts[0].dtype, torch.float32)
            )
            - 0.3
        )
        return (0.5 * x.square() + 0.45 * (1 - torch.cos(2 * math.pi * x))).sum()


def close(found: Tensor, expected: Tensor, trace: Trace, key: str) -> None:
    assert (found - expected).abs().max().item() <= trace.meta["tolerance"][key]


@pytest.mark.parametrize("name", ["hopping_f64", "hopping_decay_f64"])
def test_hopping_trace(name: str) -> None:
    trace = load(name)
    h, t = trace.hyper, trace.tensors
    net, records = Waves(t["x0"]), list[Record]()
    opt = Consensus(
        net, n=h["N"], sigma=h["sigma"], alpha=h["alpha"], decay=h["decay"] and tuple(h["decay"]),
        directions=RecordedDirections(dict(enumerate(t["xi"]))), on_step=records.append,
    )  # fmt: skip
    for step in range(trace.steps):
        opt.step(net)
        close(torch.tensor(records[step].losses, dtype=torch.float64), t["energy"][step], trace, "energy")
        close(torch.tensor(records[step].deltas, dtype=torch.float64), t["weights"][step], trace, "weights")
        close(net.parts[0].detach(), t["consensus"][step], trace, "consensus")
    assert opt.state_bytes().total == 0


@pytest.mark.parametrize("name", ["cbo_cbxpy_anisotropic_f64", "cbo_cbxpy_isotropic_f64", "cbo_matlab_anisotropic_f64"])
def test_particle_trace(name: str) -> None:
    trace = load(name)
    h, t = trace.hyper, trace.tensors
    net, records = Waves(torch.zeros(h["d"], dtype=torch.float64)), list[Record]()
    opt = Consensus(
        net, form="particles", n=h["N"], sigma=h["sigma"], alpha=h["alpha"], dt=h["dt"], drift=h["lamda"], noise=h["noise"],
        absolute="matlab" in name, directions=RecordedDirections(dict(enumerate(t["xi"]))), on_step=records.append,
    )  # fmt: skip
    state = opt.state[net.parts[0]]
    state["particles"].copy_(t["x0"])
    state["placed"] = 1
    for step in range(trace.steps):
        opt.step(net)
        close(torch.tensor(records[step].losses, dtype=torch.float64), t["energy"][step], trace, "energy")
        close(net.parts[0].detach(), t["consensus"][step], trace, "consensus")
        close(state["particles"], t["x"][step], trace, "x")
    assert opt.state_bytes().total == h["N"] * h["d"] * 8


# -- weights -----------------------------------------------------------------------------------------------------------


def test_equal_values_weigh_alike_and_an_endless_alpha_picks_the_best() -> None:
    assert gibbs([3.0] * 5, 1e300) == [0.2] * 5
    assert gibbs([3.0, 1.0, 2.0], 1e300) == [0.0, 1.0, 0.0]
    assert gibbs([1.0, 1.0, 2.0], 1e300) == [0.5, 0.5, 0.0]
    far = gibbs([1e6, 1e6 + 1], 1.0)  # exp of either alone underflows
    assert far == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def swarm_of(net: Waves, **own: Any) -> Consensus:
    return Consensus(net, **{"form": "particles", "n": 8, "sigma": 0.3, "alpha": 4.0, **own})


def particles_of(opt: Consensus) -> list[Tensor]:
    return [opt.state[p]["particles"] for p in opt.model.parameters()]  # type: ignore[union-attr]


def two_leaves() -> Waves:
    generator = torch.Generator().manual_seed(0)
    return Waves(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (4,))))


def test_equal_values_lead_to_the_mean() -> None:
    net = two_leaves()
    opt = swarm_of(net, sigma=0.0, drift=0.0)
    opt.step(lambda: 2.5)
    for p, particles in zip(net.parameters(), particles_of(opt), strict=True):
        assert torch.allclose(p, particles.mean(0), rtol=0, atol=1e-14)


def test_pairs_of_equal_values_stay_where_they_are() -> None:
    """Hopping goes to the plain mean of equal members: near the weights, and with members in pairs upon them, to the last bit."""
    for antithetic in (False, True):
        net, start = two_leaves(), two_leaves()
        opt = Consensus(net, n=16, sigma=0.1, antithetic=antithetic)
        opt.step(lambda: 2.5)
        moved = torch.cat(
            [(p - q).detach().flatten() for p, q in zip(net.parameters(), start.parameters(), strict=True)]
        )
        if antithetic:
            assert not moved.any()
        else:
            assert 0.1 / 4 / 2 < moved.square().mean().sqrt().item() < 2 * 0.1 / 4  # sigma / sqrt(n)


def test_an_endless_alpha_leads_to_the_best_particle() -> None:
    net = two_leaves()
    opt = swarm_of(net, sigma=0.0, drift=0.0, alpha=1e300)
    losses: list[Record] = []
    opt.on_step = losses.append
    opt.step(net)
    best = min(range(8), key=lambda i: losses[0].losses[i])
    for p, particles in zip(net.parameters(), particles_of(opt), strict=True):
        assert torch.allclose(p, particles[best], rtol=0, atol=1e-14)


def test_without_noise_and_with_the_whole_way_all_particles_jump_to_the_mean() -> None:
    net = two_leaves()
    opt = swarm_of(net, sigma=0.0, drift=10.0, dt=0.1)
    opt.step(net)
    for p, particles in zip(net.parameters(), particles_of(opt), strict=True):
        assert torch.allclose(particles, p.detach().expand_as(particles), rtol=0, atol=1e-14)


@pytest.mark.parametrize("antithetic", [False, True])
def test_hopping_on_a_linear_function_steps_by_alpha_sigma_squared_times_the_slope(antithetic: bool) -> None:
    """E Delta -> -alpha sigma^2 g as n grows: under softmax weights a Gaussian is shifted by exactly that."""
    d = 6
    slope = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    net = Waves(torch.zeros(d, dtype=torch.float64))
    sigma, alpha, rounds = 0.05, 8.0, 5
    opt = Consensus(net, n=1000, sigma=sigma, alpha=alpha, antithetic=antithetic, memory="in-place")
    for _ in range(rounds):
        opt.step(lambda: net.parts[0] @ slope)
    expected = -rounds * alpha * sigma**2 * slope
    noise = sigma * math.sqrt(rounds / 1000)  # of a mean of 1000 normals, each round
    assert torch.allclose(net.parts[0].detach(), expected, rtol=0, atol=4 * noise)
    assert expected.norm() > 20 * noise


def test_an_antithetic_pair_at_high_temperature_is_spsa() -> None:
    """kappa_+- = (1 -+ alpha (l+ - l-) / 2) / 2 as alpha -> 0: MeZO with the same direction and lr alpha sigma^2 / 2 ... to first order."""
    alpha, sigma = 1e-7, 0.1
    one, other = two_leaves(), two_leaves()
    Consensus(one, n=2, sigma=sigma, alpha=alpha, antithetic=True).step(one)
    MeZO(other, lr=alpha * sigma**2, eps=sigma).step(other)
    start = two_leaves()
    for p, q, r in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        moved, expected = (p - r).detach(), (q - r).detach()
        assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-13)
        assert expected.abs().max() > 1e-12


def test_a_part_of_the_way() -> None:
    whole, half, start = two_leaves(), two_leaves(), two_leaves()
    Consensus(whole, n=6, sigma=0.3, alpha=3.0).step(whole)
    Consensus(half, lr=0.5, n=6, sigma=0.3, alpha=3.0).step(half)
    for p, q, r in zip(whole.parameters(), half.parameters(), start.parameters(), strict=True):
        assert torch.allclose(q - r, 0.5 * (p - r), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["hopping", "particles"])
def test_larger_is_better_where_it_is_maximized(form: Any) -> None:
    one, other = two_leaves(), two_leaves()
    low = Consensus(one, form=form, n=6, sigma=0.2, alpha=3.0)
    high = Consensus(other, form=form, n=6, sigma=0.2, alpha=3.0, maximize=True)
    for _ in range(3):
        low.step(one)
        high.step(lambda: -other())
    assert all(p.equal(q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_hopping_cools() -> None:
    probe = Hopping(4, 0.5, decay=(3, 0.1))
    assert [probe.width(step) for step in (0, 2, 3, 6)] == pytest.approx([0.5, 0.5, 0.05, 0.005])


def test_particles_cool_as_in_the_authors_training() -> None:
    probe = Swarm(4, alpha=50.0, sigma=0.6, cooling=10)
    sigma, alpha = 0.6, 50.0
    for epoch in range(5):
        assert probe.strength(10 * epoch + 3) == pytest.approx(sigma)
        assert probe.temperature(10 * epoch + 9) == pytest.approx(alpha)
        sigma *= math.log2(epoch + 2) / math.log2(epoch + 3)  # their epochs count from 1
        alpha *= 2
    assert math.isfinite(probe.temperature(10**6))


# -- noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "absolute"), [("anisotropic", False), ("anisotropic", True), ("isotropic", False)])
def test_noise_of_particles(noise: Any, absolute: bool) -> None:
    """Against the equations, over two leaves: isotropic noise knows the distance over all of them."""
    net = two_leaves()
    opt = swarm_of(net, noise=noise, absolute=absolute, sigma=0.7, dt=0.2, drift=1.5)
    opt.step(net)  # places them
    before = [particles.clone() for particles in particles_of(opt)]
    leaves = opt._moved()
    xi = [
        torch.stack([leaf.directed.law.brownian.draw(leaf.draw(i), leaf.state, p).view(p.shape) for i in range(8)])  # type: ignore[attr-defined]
        for leaf, p in zip(leaves, net.parameters(), strict=True)
    ]
    opt.step(net)
    ways = [x - p.detach() for x, p in zip(before, net.parameters(), strict=True)]
    reach = sum(way.flatten(1).square().sum(1) for way in ways).sqrt()
    for x, way, z, after in zip(before, ways, xi, particles_of(opt), strict=True):
        size = reach.view(-1, *[1] * (way.ndim - 1)) if noise == "isotropic" else (way.abs() if absolute else way)
        expected = x - 1.5 * 0.2 * way + 0.7 * math.sqrt(0.2) * size * z
        assert torch.allclose(after, expected, rtol=0, atol=1e-13)


def test_signed_and_absolute_noise_have_the_same_law() -> None:
    """One step of 4000 particles from the same places: the same mean and variance of every coordinate, up to sampling."""
    spreads = []
    for absolute in (False, True):
        net = Waves(torch.zeros(2, dtype=torch.float64))
        opt = swarm_of(net, n=4000, absolute=absolute, sigma=1.0, dt=0.5, alpha=1e-9, batch=2)
        opt.step(net)
        spreads.append(torch.stack([particles_of(opt)[0].mean(0), particles_of(opt)[0].var(0)]))
    assert not spreads[0].equal(spreads[1])
    assert torch.allclose(spreads[0], spreads[1], rtol=0.1, atol=0.08)


def test_a_kick_where_the_mean_stands_still() -> None:
    net = two_leaves()
    plain, kicked = swarm_of(net, sigma=0.5, kick=0.0, spread=0.0), None
    other = two_leaves()
    kicked = swarm_of(other, sigma=0.5, kick=1e-5, spread=0.0)
    for opt, own in ((plain, net), (kicked, other)):
        opt.step(own)  # all particles at the mean: nothing moves, drift and noise vanish
    assert all(x.sub(p.detach()).abs().max() == 0 for x, p in zip(particles_of(plain), net.parameters(), strict=True))
    moved = torch.cat(
        [x.sub(p.detach()).flatten() for x, p in zip(particles_of(kicked), other.parameters(), strict=True)]
    )
    assert moved.std().item() == pytest.approx(0.5 * math.sqrt(0.1), rel=0.25)
    assert kicked.param_groups[0]["forward_kept"] == {"kick": 1.0}
    kicked.step(other)
    assert kicked.param_groups[0]["forward_kept"] == {"kick": 0.0}


# -- batches of particles ------------------------------------------------------------------------------------------------


def test_batches_deal_out_all_particles_in_turn() -> None:
    probe = Swarm(12, batch=4, seed=3)
    turns = [[i for step in range(3 * turn, 3 * turn + 3) for i in probe.chosen(step)] for turn in range(3)]
    assert all(sorted(turn) == list(range(12)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]


@pytest.mark.parametrize("moved", ["all", "batch"])
def test_only_a_batch_is_evaluated(moved: Any) -> None:
    net = two_leaves()
    opt = swarm_of(net, batch=2, moved=moved)
    opt.step(net)
    assert opt.evaluated == 2
    assert not opt.memory.elsewhere  # type: ignore[attr-defined]
    before = [particles.clone() for particles in particles_of(opt)]
    chosen = opt.probe.chosen(1)  # type: ignore[attr-defined]
    opt.step(net)
    for x, after in zip(before, particles_of(opt), strict=True):
        changed = [i for i in range(8) if not x[i].equal(after[i])]
        assert changed == (sorted(chosen) if moved == "batch" else list(range(8)))


# -- state, records, refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hopping", "particles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_and_replay_are_exact(form: Any, dtype: torch.dtype) -> None:
    def fresh() -> Waves:
        return Waves(*(p.detach().to(dtype) for p in two_leaves().parameters()))

    own: dict[str, Any] = {"form": form, "n": 6, "sigma": 0.3, "alpha": 3.0, "seed": 5}
    if form == "particles":
        own |= {"kick": 1.0, "batch": 3}
    records: list[Record] = []
    net = fresh()
    opt = Consensus(net, on_step=records.append, **own)
    opt.step(net)
    opt.step(net)
    saved, again = copy.deepcopy(opt.state_dict()), copy.deepcopy(net)
    opt.step(lambda: float("nan"))  # skipped: nothing moves
    middle = [p.detach().clone() for p in net.parameters()]
    assert all(p.equal(q) for p, q in zip(middle, again.parameters(), strict=True))
    opt.step(net)
    resumed = Consensus(again, **own)
    resumed.load_state_dict(saved)
    resumed.step(lambda: float("nan"))
    resumed.step(again)
    replayed = fresh()
    other = Consensus(replayed, **own)
    for record in records:
        other.replay(record)
    for p, q, r in zip(net.parameters(), again.parameters(), replayed.parameters(), strict=True):
        assert p.equal(q)
        assert p.equal(r)
    if form == "particles":
        for x, y, z in zip(particles_of(opt), particles_of(resumed), particles_of(other), strict=True):
            assert x.equal(y)
            assert x.equal(z)
            assert x.dtype == torch.float32


def test_members_side_by_side() -> None:
    torch.manual_seed(0)
    one = nn.Linear(4, 3, dtype=torch.float64)
    other, x = copy.deepcopy(one), torch.randn(5, 4, dtype=torch.float64)
    for net, together in ((one, 1), (other, None)):
        opt = Consensus(net, n=6, sigma=0.1, directions=LowRank(2), together=together)
        for _ in range(3):
            opt.step(lambda members, net=net: members.mean(net(members.repeat(x)).square()))
    assert all(
        torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "own", [{"form": "particles", "n": 60, "sigma": 1.2, "spread": 3.0}, {"n": 40, "sigma": 1.0, "decay": (5, 0.8)}]
)
def test_it_finds_the_lowest_of_many_valleys(own: dict[str, Any]) -> None:
    """Where the gradient of the waves leads to the nearest valley: particles from far away, and hopping over the walls."""
    net = Waves(torch.full((2,), 3.0, dtype=torch.float64))
    opt = Consensus(net, alpha=30.0, memory="in-place-exact", **own)
    for _ in range(80):
        opt.step(net)
    assert (net.parts[0].detach() - 0.3).abs().max() < 0.3


def test_bytes_of_particles_are_known_beforehand() -> None:
    net = two_leaves()
    opt = swarm_of(net, n=5)
    kept = sum(x.numel() * x.element_size() for x in particles_of(opt))
    assert opt.state_bytes().total == kept == 5 * 10 * 8


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"form": "hop"}, "form: 'hop'; expected one of hopping, particles"),
        ({"n": 1}, "n: 1"),
        ({"n": 0}, "n: 0"),
        ({"sigma": 0.0}, "sigma"),
        ({"alpha": -1.0}, "alpha"),
        ({"n": 5, "antithetic": True}, "come in pairs"),
        ({"decay": (0, 0.5)}, "decay's period"),
        ({"dt": 0.2}, "dt: not an option of form='hopping'"),
        ({"form": "particles", "decay": (3, 0.5)}, "decay: not an option of form='particles'"),
        ({"form": "particles", "n": 10, "batch": 3}, "divides n = 10"),
        ({"form": "particles", "noise": "white"}, "noise: 'white'"),
        ({"form": "particles", "moved": "some"}, "moved: 'some'"),
        ({"form": "particles", "cooling": 0}, "cooling"),
        ({"directions": "gauss"}, "did you mean 'gaussian'"),
    ],
)
def test_bad_input_is_one_clear_line(own: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as found:
        Consensus(two_leaves(), **own)
    assert "\n" not in str(found.value)
