"""FederatedOptimizer: clients step along gradients of surrogates of what they have queried, and meet (FZooS, arXiv 2308.04077).

Trained leaves in a row are one vector x, in the order of their names. Queries are state: n clients x capacity x the leaf, in fp64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_betas, check_choice, check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.random import make_key
from tare.core.recipe import Recipe
from tare.core.state import State
from tare.core.transform import StateSpec
from tare.zeroth.clients import Clients
from tare.zeroth.coordinates import FIRST, Coordinates
from tare.zeroth.directions import Directed, Draw
from tare.zeroth.memory import Moved
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import Asking, Estimate, Point, Term
from tare.zeroth.record import Record
from tare.zeroth.surrogate import (
    KERNELS,
    Kernel,
    Posterior,
    around,
    best_lengthscale,
    features,
    nearest,
)  # fmt: skip

MOST = 1000  # trained scalars
QUERIES, VALUES, ASKED = "queries", "query_values", "queries_asked"


@dataclass
class Table:
    """What law, probe and optimizer share during a step; empty between steps.

    x: [d], where the weights stand. known: of each client, what it queried so far, [q, d] and [q]. rows: displacements that are asked
    for now, [k, d]. reached: displacement -> where a forward then sees the weights. place: which of the closures here is asked.
    losses: of each client its mean, where clients are processes.
    """

    x: Tensor | None = None
    known: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: Tensor | None = None
    reached: Callable[[Tensor], Tensor] | None = None
    seed: int = 0
    place: int = 0
    fresh: list[int] = field(default_factory=list)  # queries of each client in this step
    scales: dict[int, float] = field(default_factory=dict)  # length-scale of each client's surrogate
    losses: list[float] = field(default_factory=list)

    def clear(self) -> None:
        self.x, self.known, self.rows, self.reached, self.fresh, self.scales = None, [], None, None, [], {}
        self.losses = []


@dataclass(frozen=True)
class Placed(Coordinates):
    """Members below d are coordinates; member d + k is row k of what is asked for now.

    clients: that are here. capacity: how many queries each keeps.
    """

    clients: int = 1
    capacity: int = 1000
    table: Table = field(default_factory=Table, compare=False, repr=False)

    partial: ClassVar[bool] = True

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        shape = (self.clients, self.capacity)
        return {
            FIRST: StateSpec((), "count"), ASKED: StateSpec((), "count"),
            QUERIES: StateSpec((*shape, leaf.numel), "exact", dtype=torch.float64),
            VALUES: StateSpec(shape, "exact", dtype=torch.float64),
        }  # fmt: skip

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        rows = self.table.rows
        if rows is None:
            super().gather_(target, terms, state, weight, start)
            return
        d, first = rows.shape[1], state[FIRST] + start
        for draw, scale in terms:
            by = scale * rows[draw.member - d, first : first + target.numel()]
            target.copy_(_moved(target, by.view(target.shape)))

    def describe(self) -> str:
        return f"queries of {self.clients} client{'s' if self.clients > 1 else ''}"


def _moved(weight: Tensor, by: Tensor) -> Tensor:
    """weight + by as a forward sees it: summed in fp32 (fp64), rounded once."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (weight.to(dtype) + by.to(device=weight.device, dtype=dtype)).to(weight.dtype)


@dataclass(frozen=True)
class Federated:
    """One round. Every client: queries near x; T local Adam steps along the gradient of its surrogate, corrected by the difference of
    everybody's and its own; a query where each step ends, and where the surrogate knows least. The gradient is x - the mean of the ends.

    Clients are simulated here in turn, or are processes (`others`); what they need of one another goes through `_met` only.

    Args: see `tare.FZooS`.
    """

    clients: int = 1
    local_steps: int = 10
    local_lr: float = 0.01
    near: int = 50
    active: int = 5
    reach: float = 0.01
    kernel: Literal["matern-5/2", "rbf"] = "matern-5/2"
    lengthscale: float | None = None
    noise: float = 1e-6
    nearest: int = 150
    components: int = 10_000
    features_lengthscale: float = 1.0
    features_nearest: int = 500
    correction: float | None = None
    weights: tuple[float, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    table: Table = field(default_factory=Table, compare=False, repr=False)
    others: Clients | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("clients", "local_steps", "near", "nearest", "components", "features_nearest"):
            check_whole(name, getattr(self, name), 2 if name == "near" else 1)
        check_whole("active", self.active, 0)
        check_betas(self.betas)
        for name in ("local_lr", "reach", "features_lengthscale", "eps"):
            check_number(name, getattr(self, name), 0.0)
        check_number("noise", self.noise, 1e-12, inclusive=True)  # below, K may be singular in fp64
        check_choice("kernel", self.kernel, KERNELS)
        if self.lengthscale is not None:
            check_number("lengthscale", self.lengthscale, 0.0)
        if self.correction is not None:
            check_number("correction", self.correction, 0.0, inclusive=True)
        if self.weights and (
            len(self.weights) != self.clients or min(self.weights) < 0.0 or not sum(self.weights) > 0.0
        ):
            raise InputError(
                f"Invalid weights: {self.weights}; expected a number >= 0 for each of {self.clients} clients"
            )

    @property
    def shares(self) -> list[float]:
        """Of the clients; they sum to 1."""
        weights = self.weights or (1.0,) * self.clients
        return [weight / sum(weights) for weight in weights]

    @property
    def here(self) -> list[int]:
        """The clients whose closures this process has."""
        return list(range(self.clients)) if self.others is None else [self.others.place(self.clients)]

    def _met(self, own: list[Tensor], last: bool = False) -> list[Tensor] | None:
        """A tensor of each client here -> of each client; None where the round is skipped."""
        return own if self.others is None else self.others.meet(own[0], last)

    def posterior(self, x: Tensor, place: int) -> Posterior:
        """A client's surrogate, from its queries nearest to x. place: its number among those here."""
        places, values = self.table.known[place]
        near = nearest(x, places, self.nearest)
        places, values = places[near], values[near]
        scales = self.table.scales
        if place not in scales:
            scales[place] = self.lengthscale or best_lengthscale(self.kernel, places, values, self.noise)
        return Posterior(Kernel(self.kernel, scales[place]), places, values, self.noise)

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        table = self.table
        assert table.x is not None
        start, radius = table.x, kept.get("radius", self.reach)
        for place in range(len(self.here)):
            where = self._unsure(start, place, radius, 4 * self.near, self.near, step, 0)
            yield from self._query(place, where)
        table.scales.clear()
        drift = self._drift(start)
        if drift is None:
            return None
        ends = []
        for place in range(len(self.here)):
            x, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
            for t in range(1, self.local_steps + 1):
                surrogate = self.posterior(x, place)
                g = surrogate.gradient(x)
                gamma = 1.0 / t if self.correction is None else self.correction
                if drift and gamma:
                    g = g + gamma * drift[place](x)
                m.mul_(self.betas[0]).add_(g, alpha=1.0 - self.betas[0])
                v.mul_(self.betas[1]).addcmul_(g, g, value=1.0 - self.betas[1])
                root = (v / (1.0 - self.betas[1] ** t)).sqrt_().add_(self.eps)
                x = x - self.local_lr * (m / (1.0 - self.betas[0] ** t)) / root
                where = x[None]
                if self.active and t < self.local_steps:
                    extra = self._unsure(x, place, self.reach, 20 * self.active, self.active, step, t, surrogate)
                    where = torch.cat([where, extra])
                yield from self._query(place, where)
            ends.append(torch.cat([x, table.known[place][1][-table.fresh[place] :].mean()[None]]))
        met = self._met(ends, last=True)
        if met is None:
            return None
        table.losses = [float(end[-1]) for end in met]
        moved = sum(
            (share * (start - end[:-1]) for share, end in zip(self.shares, met, strict=True)), torch.zeros_like(start)
        )
        away = sum(float((start - end[:-1]).abs().mean()) for end in met) / len(met)
        terms = [Term(i, g) for i, g in enumerate(moved.tolist())]
        return Estimate(terms, [], {"radius": max(0.5 * away, 1e-3 * self.reach)})

    def _unsure(
        self, x: Tensor, place: int, radius: float, count: int, chosen: int, step: int, t: int, surrogate: Posterior | None = None
    ) -> Tensor:  # fmt: skip
        """Of `count` points around x, those whose gradient the surrogate knows least; any, where there is none yet."""
        points = around(x, radius, count, make_key(self.table.seed, f"queries/{self.here[place]}/{t}", step))
        if surrogate is None:
            if not len(self.table.known[place][1]):
                return points[:chosen]
            surrogate = self.posterior(x, place)
        order = torch.argsort(surrogate.uncertainty(points), descending=True, stable=True)
        return points[order[:chosen]]

    def _query(self, place: int, where: Tensor):  # type: ignore[no-untyped-def]
        """Ask for a client's losses at [k, d], and remember them."""
        table = self.table
        assert table.x is not None
        assert table.reached is not None
        table.place, table.rows = place, where - table.x
        values = yield [Point(((len(table.x) + k, 1.0),)) for k in range(len(where))]
        places, known = table.known[place]
        seen = torch.stack([table.reached(row) for row in table.rows])
        table.rows = None
        table.known[place] = torch.cat([places, seen]), torch.cat([known, torch.tensor(values, dtype=torch.float64)])
        table.fresh[place] += len(where)

    def _drift(self, x: Tensor) -> list[Callable[[Tensor], Tensor]] | None:
        """For each client here, the gradient of everybody's surrogate less its own, from random features. Nothing where there is one
        client; None where the round is skipped."""
        if self.clients == 1 or self.correction == 0.0:
            return []
        made = features(self.table.seed, len(x), self.components, self.features_lengthscale)
        own = []
        for places, values in self.table.known:
            near = nearest(x, places, self.features_nearest)
            own.append(made.fit(places[near], values[near], self.noise))
        met = self._met(own)
        if met is None:
            return None
        others = [sum((w * (nu - mine) for w, nu in zip(self.shares, met, strict=True)), 0.0 * mine) for mine in own]
        return [lambda x, nu=nu: made.gradient(x, nu) for nu in others]  # type: ignore[misc]

    @property
    def evaluations(self) -> float:
        return float(len(self.here) * (self.near + self.local_steps + self.active * (self.local_steps - 1)))

    def describe(self) -> str:
        return f"{self.clients} client{'s' if self.clients > 1 else ''}, {self.local_steps} local steps on {self.kernel} surrogates"


class FederatedOptimizer(ForwardOptimizer):
    """A `ForwardOptimizer` whose probe is `Federated` and whose law is `Placed`. `step` takes a closure, or one for each client."""

    probe: Federated

    shares: ClassVar[bool] = False

    def __init__(self, params: Any, recipe: Recipe, lr: float | Tensor, *, probe: Federated, **rest: Any):
        super().__init__(params, recipe, lr, probe=probe, **rest)
        self._check_size([entry.leaf for entry in self._entries.values() if isinstance(entry.transform, Directed)])

    def _check_size(self, leaves: Sequence[Leaf]) -> None:
        d = sum(leaf.numel for leaf in leaves)
        if d > MOST:
            raise InputError(
                f"targets: {d:,} scalars are trained, and a surrogate of {MOST:,} is the most that can be learned from queries; train a "
                "prompt, scales or a token, or use mezo"
            )

    def _prepare_laws(self, leaves: list[Moved]) -> None:
        super()._prepare_laws(leaves)
        self._check_size([leaf.draw(0).leaf for leaf in leaves])
        self._bind(leaves)

    def _bind(self, leaves: list[Moved]) -> None:
        """Put the leaves in a row, and give those that have rested the queries that were made meanwhile."""
        leaves, first = _ordered(leaves), 0
        most = max((leaf.state for leaf in leaves), key=lambda state: int(state[ASKED]))
        for leaf in leaves:
            state = leaf.state
            state.raw[FIRST] = first
            first += leaf.parameter.numel()
            if state[ASKED] < most[ASKED]:
                capacity = state[QUERIES].shape[1]
                rows = [number % capacity for number in range(state[ASKED], most[ASKED])][-capacity:]
                state[QUERIES][:, rows] = leaf.parameter.detach().double().reshape(-1)
                state[VALUES].copy_(most[VALUES])
                state[ASKED] = most[ASKED]

    def _ask(self, leaves: list[Moved], closure: Any, losses: list[float]) -> Estimate | None:
        others = self.probe.others
        with nullcontext() if others is None else others.round():
            found = self._asked(leaves, closure, losses)
            if others is not None:
                if found is None:
                    others.skip()
                losses[:] = self.probe.table.losses or [math.nan]
        return found

    def _asked(self, leaves: list[Moved], closure: Any, losses: list[float]) -> Estimate | None:
        closures, here = [closure] if callable(closure) else list(closure), len(self.probe.here)
        if len(closures) != here or not all(map(callable, closures)):
            raise InputError(
                f"closure: expected one for each of {here} clients here, got {len(closures)}; give clients=, or a list of as many"
            )
        table, row = self.probe.table, _ordered(leaves)
        states = [leaf.state for leaf in row]
        count = min(int(states[0][ASKED]), states[0][VALUES].shape[1])
        order = torch.arange(int(states[0][ASKED]) - count, int(states[0][ASKED])) % states[0][VALUES].shape[1]
        table.clear()
        table.x = torch.cat([leaf.parameter.detach().double().reshape(-1).cpu() for leaf in row])
        for place in range(here):
            places = torch.cat([state[QUERIES][place].cpu()[order] for state in states], 1)
            table.known.append((places, states[0][VALUES][place].cpu()[order]))
        table.fresh = [0] * here
        table.seed = int(self.param_groups[0]["seed"])
        weights = [leaf.parameter.detach().reshape(-1) for leaf in row]

        def reached(by: Tensor) -> Tensor:
            parts = by.split([w.numel() for w in weights])
            return torch.cat([_moved(w, part).double().cpu() for w, part in zip(weights, parts, strict=True)])

        table.reached = reached
        try:
            found = super()._ask(leaves, lambda: closures[table.place](), losses)
        except BaseException:
            table.clear()
            raise
        table.rows = None
        return found

    def _record(self, estimate: Estimate | None, losses: list[float], leaves: list[Moved]) -> Record:
        record = super()._record(estimate, losses, leaves)
        if not record.skipped:
            self._remember(_ordered(leaves))
        self.probe.table.clear()
        return record

    def _remember(self, row: list[Moved]) -> None:
        """Keep the queries of this step; the oldest make room."""
        table = self.probe.table
        for leaf in row:
            state, numel = leaf.state, leaf.parameter.numel()
            capacity, first, asked = state[VALUES].shape[1], state[FIRST], int(state[ASKED])
            for place, (places, values) in enumerate(table.known):
                fresh = min(table.fresh[place], capacity)
                end = asked + table.fresh[place]
                at = (torch.arange(end - fresh, end) % capacity).to(state[VALUES].device)
                state[QUERIES][place, at] = places[-fresh:, first : first + numel].to(at.device)
                state[VALUES][place, at] = values[-fresh:].to(at.device)
            state[ASKED] = asked + table.fresh[0]


def _ordered(leaves: list[Moved]) -> list[Moved]:
    """By name, so that neither groups nor the order of parameters change a number."""
    return sorted(leaves, key=lambda leaf: leaf.draw(0).name)
