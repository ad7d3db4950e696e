"""Consensus: move to the Gibbs-weighted mean of what members found (Riedl, Klock, Geldhauser, Fornasier, arXiv 2306.09778).

Consensus hopping draws its members afresh around the weights and keeps none of them: seeds and scalars. Consensus-based optimisation keeps
N particles that drift to the mean and diffuse in proportion to their distance from it; the weights are the mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.random import bits, make_key
from tare.core.state import State
from tare.core.transform import StateSpec
from tare.zeroth.assembly import Assembly
from tare.zeroth.directions import CHUNK, Draw, Law, spans
from tare.zeroth.memory import Moved
from tare.zeroth.population import PopulationOptimizer
from tare.zeroth.probes import Asking, Estimate, Point, Term, away
from tare.zeroth.record import KEPT, SKIPPED, Record


def gibbs(values: Sequence[float], alpha: float) -> list[float]:
    """softmax(-alpha values), whatever their size. Sums are exact, so every machine gets the same numbers.

    >>> gibbs([5.0, 5.0], 1e9)
    [0.5, 0.5]
    """
    least = min(values)
    weights = [math.exp(-alpha * (value - least)) if value > least else 1.0 for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class Hopping:
    """theta <- theta + lr sigma sum_i w_i xi_i, w = softmax(-alpha f(theta + sigma xi)); near -alpha sigma^2 grad f for small sigma.

    Args:
        n: members. sigma: their distance. alpha: inverse temperature.
        decay: (period, factor): sigma is multiplied by the factor every so many steps; None: stays.
        antithetic: members in pairs +-xi; n is even then.
        higher: whether larger values are better.
    """

    n: int = 50
    sigma: float = 1e-2
    alpha: float = 100.0
    decay: tuple[int, float] | None = None
    antithetic: bool = False
    higher: bool = False

    def __post_init__(self) -> None:
        if check_whole("n", self.n, 2) % 2 and self.antithetic:
            raise InputError(f"Invalid n: {self.n}; antithetic members come in pairs, so n is even")
        check_number("sigma", self.sigma, 0.0)
        check_number("alpha", self.alpha, 0.0)
        if self.decay is not None:
            period, factor = self.decay
            check_whole("decay's period", period, 1)
            check_number("decay's factor", factor, 0.0)

    def width(self, step: int) -> float:
        """sigma at a step."""
        return self.sigma if self.decay is None else self.sigma * self.decay[1] ** (step // self.decay[0])

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        sigma = self.width(step)
        places = [(i // 2, sigma * (-1) ** i) if self.antithetic else (i, sigma) for i in range(self.n)]
        values = yield [away(member, offset) for member, offset in places]
        weights = gibbs([-v for v in values] if self.higher else values, self.alpha)
        shares: dict[int, float] = {}
        for (member, offset), weight in zip(places, weights, strict=True):
            shares[member] = shares.get(member, 0.0) - weight * offset
        return Estimate([Term(member, share) for member, share in shares.items()], weights)

    @property
    def worst(self) -> float:
        """The loss of a member without one: it weighs nothing."""
        return -math.inf if self.higher else math.inf

    def bearable(self, points: Sequence[Point]) -> int:
        """Finite losses that are enough."""
        return 1

    @property
    def evaluations(self) -> float:
        return float(self.n)

    def describe(self) -> str:
        return f"consensus hopping, {self.n} members, sigma {self.sigma:g}, alpha {self.alpha:g}"


@dataclass(frozen=True)
class Swarm:
    """x_i <- x_i - drift dt D_i + sigma sqrt(dt) noise_i, D_i = x_i - mean; the weights go to the mean, sum_i w_i x_i.

    Args:
        n: particles. alpha: inverse temperature. dt: time step. drift: lambda. sigma: strength of the noise.
        noise: `anisotropic`: xi D element by element; `isotropic`: xi ||D_i||, over all leaves together.
        absolute: anisotropic noise is xi |D|, as the authors' Matlab code has; else xi D (CBXpy): other paths, the same law.
        batch: particles that are evaluated in one step, dealt out in a new order once all have been; None: all.
        moved: whether `all` particles move towards the mean of a batch, or only the `batch`.
        kick: where no coordinate of the mean moves by so much, every particle also moves by sigma sqrt(dt) xi; 0: never.
        cooling: steps after which alpha doubles and sigma is as in the authors' training of nets, sigma / log2(epoch + 2); None: never.
        spread: particles begin at theta + spread xi.
        higher: whether larger values are better. seed: of the order in which particles are dealt out.
    """

    n: int = 100
    alpha: float = 50.0
    dt: float = 0.1
    drift: float = 1.0
    sigma: float = math.sqrt(0.4)
    noise: Literal["anisotropic", "isotropic"] = "anisotropic"
    absolute: bool = False
    batch: int | None = None
    moved: Literal["all", "batch"] = "all"
    kick: float = 0.0
    cooling: int | None = None
    spread: float = 1.0
    higher: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("n", self.n, 2)
        check_number("alpha", self.alpha, 0.0)
        check_number("dt", self.dt, 0.0)
        for name in ("drift", "sigma", "kick", "spread"):
            check_number(name, getattr(self, name), 0.0, inclusive=True)
        check_choice("noise", self.noise, ("anisotropic", "isotropic"))
        check_choice("moved", self.moved, ("all", "batch"))
        if self.batch is not None and (check_whole("batch", self.batch, 1) > self.n or self.n % self.batch):
            raise InputError(f"Invalid batch: {self.batch}; expected a number that divides n = {self.n}")
        if self.cooling is not None:
            check_whole("cooling", self.cooling, 1)

    def chosen(self, step: int) -> list[int]:
        """The particles that are evaluated at a step."""
        if self.batch is None:
            return list(range(self.n))
        turn, place = divmod(step, self.n // self.batch)
        order = torch.argsort(bits(make_key(self.seed, "particles", turn), 0, self.n), stable=True).tolist()
        return [int(i) for i in order[place * self.batch : (place + 1) * self.batch]]

    def temperature(self, step: int) -> float:
        """alpha at a step."""
        return self.alpha if self.cooling is None else self.alpha * 2.0 ** min(step // self.cooling, 900)

    def strength(self, step: int) -> float:
        """sigma at a step."""
        return self.sigma if self.cooling is None else self.sigma / math.log2(step // self.cooling + 2)

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        chosen = self.chosen(step)
        values = yield [Point(((i, 1.0),)) for i in chosen]
        weights = gibbs([-v for v in values] if self.higher else values, self.temperature(step))
        return Estimate([Term(i, -weight) for i, weight in zip(chosen, weights, strict=True)], weights)

    @property
    def worst(self) -> float:
        """The loss of a member without one: it weighs nothing."""
        return -math.inf if self.higher else math.inf

    def bearable(self, points: Sequence[Point]) -> int:
        """Finite losses that are enough."""
        return 1

    @property
    def evaluations(self) -> float:
        return float(self.batch or self.n)

    def describe(self) -> str:
        return f"{self.n} particles, {self.noise} noise {self.sigma:g}, drift {self.drift:g}, dt {self.dt:g}, alpha {self.alpha:g}"


@dataclass(frozen=True)
class Particles(Law):
    """z_i = x_i - W: the way from the weight to particle i. Particles are state, n copies of the leaf in its compute dtype."""

    swarm: Swarm
    brownian: Law

    reads_weight: ClassVar[bool] = True

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        shape = (self.swarm.n, *leaf.shape)
        return {"particles": StateSpec(shape, "exact", dtype=leaf.compute_dtype), "placed": StateSpec((), "count")}

    def prepare(self, draw: Draw, state: State, weight: Tensor) -> None:
        """Place the particles around the weight, the first time."""
        if state["placed"]:
            return
        particles: Tensor = state["particles"]
        particles.copy_(weight)
        if self.swarm.spread:
            for i, particle in enumerate(particles):
                start = replace(draw, step=0, member=2 * self.swarm.n + i)
                self.brownian.add_(particle, start, state, weight, self.swarm.spread)
        state["placed"] = 1

    def draw(self, draw: Draw, state: State, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        particle = state["particles"][draw.member].view(-1)[start:stop]
        return particle - weight.reshape(-1)[start:stop].to(particle.dtype)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        if not terms or not target.is_contiguous():
            super().gather_(target, terms, state, weight, start)
            return
        particles, flat = state["particles"].flatten(1), target.view(-1)
        rows = torch.tensor([draw.member for draw, _ in terms], device=target.device)
        shares = torch.tensor([share for _, share in terms], dtype=particles.dtype, device=target.device)
        for first, last in spans(flat.numel(), max(1, CHUNK // len(terms))):
            here = slice(start + first, start + last)
            ways = particles[rows, here] - weight.reshape(-1)[here].to(particles.dtype)
            flat[first:last] += (shares @ ways).to(flat.dtype)

    def factor(self, leaf: Leaf) -> float:
        return math.nan  # no two particles need be independent

    def describe(self) -> str:
        return f"{self.swarm.n} particles"


class ConsensusOptimizer(PopulationOptimizer):
    """A `PopulationOptimizer` whose particles, where it has any, move after each step."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if isinstance(self.probe, Swarm):  # whose particles are dealt out in the order of the saved seed
            self.probe = replace(self.probe, seed=int(self.param_groups[0]["seed"]))

    def _record(self, estimate: Estimate | None, losses: list[float], leaves: list[Moved]) -> Record:
        record = super()._record(estimate, losses, leaves)
        if record.skipped or not isinstance(self.probe, Swarm) or not self.probe.kick:
            return record
        steps = [Assembly(leaf, record.terms).whole().abs().max().item() for leaf in leaves]
        return replace(record, keep={"kick": float(max(steps, default=0.0) < self.probe.kick)})

    @torch.no_grad()
    def stepped(self) -> None:
        super().stepped()
        if isinstance(self.probe, Swarm) and not int(self.param_groups[0][SKIPPED]):
            self._follow(self.probe, self.steps - 1)

    def _follow(self, swarm: Swarm, step: int) -> None:
        """Drift, noise and kick after a step, whose mean the weights are now."""
        leaves, sigma = self._moved(), swarm.strength(step) * math.sqrt(swarm.dt)
        for i in range(swarm.n) if swarm.moved == "all" else swarm.chosen(step):
            reach = 0.0
            if swarm.noise == "isotropic":
                reach = math.sqrt(math.fsum(_way(leaf, i).double().square().sum().item() for leaf in leaves))
            for leaf in leaves:
                _move(swarm, leaf, i, step, sigma, reach)
        if self.param_groups[0][KEPT].get("kick"):
            for leaf in leaves:
                for i, particle in enumerate(leaf.state["particles"]):
                    draw = replace(leaf.draw(swarm.n + i), step=step)
                    _brownian(leaf).add_(particle, draw, leaf.state, leaf.parameter.detach(), sigma)


def _move(swarm: Swarm, leaf: Moved, i: int, step: int, sigma: float, reach: float) -> None:
    """One particle of one leaf: drift and noise. reach: its distance from the mean over all leaves."""
    particle, weight = leaf.state["particles"][i].view(-1), leaf.parameter.detach()
    draw = replace(leaf.draw(i), step=step)
    for start, stop in spans(particle.numel()):
        part = particle[start:stop]
        way = part - weight.reshape(-1)[start:stop].to(part.dtype)
        part.sub_(way, alpha=swarm.drift * swarm.dt)
        if sigma:
            xi = _brownian(leaf).draw(draw, leaf.state, weight, start, stop).to(part.dtype)
            size = reach if swarm.noise == "isotropic" else (way.abs() if swarm.absolute else way)
            part.add_(xi * size, alpha=sigma)


def _brownian(leaf: Moved) -> Law:
    assert isinstance(leaf.directed.law, Particles)
    return leaf.directed.law.brownian


def _way(leaf: Moved, i: int) -> Tensor:
    """From the weight to particle i."""
    particle: Tensor = leaf.state["particles"][i]
    return particle - leaf.parameter.detach().to(particle.dtype)
