"""Zeroth-order Frank-Wolfe: training under a constraint, from losses alone and without projections."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base_forward import law_of
from tare.methods.registry import Card, Trial, register
from tare.zeroth.coordinates import Coordinates
from tare.zeroth.coordinatewise import CoordinateOptimizer
from tare.zeroth.directions import Directed, Law, Untouched
from tare.zeroth.exchange import Exchange
from tare.zeroth.frank_wolfe import DIMENSION, Ball, FrankWolfe, Kiefer, RandomDirections, Schedule
from tare.zeroth.memory import Memory, Moved
from tare.zeroth.probes import Probe
from tare.zeroth.record import Recorder

CARD = Card(
    key="zo-frank-wolfe",
    title="Towards Gradient Free and Projection Free Stochastic Optimization",
    authors="Sahu, Zaheer, Kar",
    year=2019,
    arxiv="1810.03233",
    idea="A linear minimisation oracle instead of a projection, on a running average that tames the noise of finite differences.",
    axes={"directions": "Gaussian, or coordinates", "probe": "one-sided, decaying c", "rule": "Frank-Wolfe", "memory": "in forward"},
    defaults={
        "lr": "1.0: multiplies gamma = 2 / (t + 8) (paper)", "estimator": "i-rdsa (paper: all three)", "m": "6 (paper)",
        "ball": "linf (ours; paper: any convex set)", "radius": "1.0 (ours)", "center": "start (ours; paper: zero)",
        "least_c": "1e-3 (ours; paper: 0)", "rho": "None: the paper's schedule", "gamma": "None: the paper's schedule",
    },
    presets={"*": {"lr": 1.0}},
    limits=(
        "The first steps go a quarter of the way to the border of the set: around zero that undoes what a model has learned.",
        "The paper's c of random directions falls as d^(-3/2), below what fp32 resolves from about d = 1e3 on; hence least_c.",
        "kwsa evaluates every trained scalar at each step.",
        "One set for each leaf; the whole is their product. A single l1 or l2 ball over several leaves is not offered.",
        "The nuclear ball takes an SVD of each matrix at each step.",
    ),
    differences=(
        "No official code: checked against traces of the written equations. Public ones disagree with the paper: one has the exponent "
        "1/3 in rho of RDSA, one the schedule of m = 6 for 938 directions.",
        "The set is around the first weights by default, which are kept; center='zero' is the paper's.",
    ),
    release="no",
    auto_rank=310,
    kind="forward",
    state="8 m n; 4 m n with center='zero' or 'here'",
    trial=Trial(lr=1.0, hyper={"radius": 0.5, "m": 12}),
)  # fmt: skip


@register(CARD)
class ZOFrankWolfe(CoordinateOptimizer):
    """W <- W + lr gamma_t (v - W), v = argmin of <v, d_t> over C, d_t = (1 - rho_t) d_(t-1) + rho_t g_t (arXiv 1810.03233).

    Args:
        params: the model that the closure runs (preferred), or what `tare.Optimizer` takes.
        lr: multiplies gamma; 1 is the paper's, and up to 4 no step leaves C.
        estimator: of g: `kwsa` (every coordinate), `rdsa` (one direction), `i-rdsa` (mean over m).
        m: directions of i-rdsa.
        ball: C: `l1`, `l2`, `linf`, `nuclear`, `simplex`; of each leaf.
        radius: of C.
        center: `start`: C lies around the first weights; `zero`: as the paper; `here`: around the weights of each step, unconstrained.
        gamma, rho: constants in place of the schedules.
        least_c: c is never below; see the limits.
        directions: `gaussian`, `rademacher`, or a `Law`; not read by kwsa.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        reuse, together, memory, exchange, storage, seed, maximize, patience, on_step, model: as `DeepZero` and `ForwardOptimizer`.

    Raises:
        InputError: values out of range; center `zero` and weights outside of C.

    >>> import torch
    >>> net = torch.nn.Linear(6, 1, bias=False)
    >>> opt = ZOFrankWolfe(net, estimator="kwsa", ball="l2", radius=0.1)
    >>> start = net.weight.detach().clone()
    >>> for _ in range(20):
    ...     _ = opt.step(lambda: net(torch.ones(1, 6)).square().mean())
    >>> bool((net.weight - start).norm() <= 0.1)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, *, estimator: Literal["kwsa", "rdsa", "i-rdsa"] = "i-rdsa", m: int = 6,
        ball: Literal["l1", "l2", "linf", "nuclear", "simplex"] = "linf", radius: float = 1.0,
        center: Literal["start", "zero", "here"] = "start", gamma: float | None = None, rho: float | None = None,
        least_c: float = 1e-3, directions: str | Law = "gaussian", targets: Match = "*", reuse: bool = True,
        together: int | None = None, memory: str | Memory = "auto", exchange: Exchange | None = None,
        storage: Storage | dict[str, Any] | None = None, seed: int = 0, maximize: bool = False, patience: int = 10,
        on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        schedule = Schedule(estimator, m, gamma, rho, least_c)
        rule = FrankWolfe(Ball(ball, radius), schedule, center)
        law = law_of(directions)
        kiefer = estimator == "kwsa"
        probe: Probe = Kiefer(schedule=schedule) if kiefer else RandomDirections(schedule)
        own = Directed(Coordinates() if kiefer else law, rule)
        entries = ((targets, own),) if targets == "*" else ((targets, own), ("*", Untouched()))
        super().__init__(
            params, Recipe(entries), lr, probe=probe, reuse=reuse, together=together, memory=memory, exchange=exchange,
            storage=storage, seed=seed, maximize=maximize, patience=patience, on_step=on_step, model=model,
        )  # fmt: skip
        if center == "zero":
            for leaf in self._moved():
                found = rule.ball.norm(leaf.parameter.detach(), leaf.draw(0).leaf)
                if found > radius * (1.0 + 1e-6):
                    raise InputError(
                        f"{leaf.name}: its weights lie outside of the {rule.ball.describe()} (norm {found:.4g}); give a larger radius, "
                        "scale them, or use center='start'"
                    )

    def _number(self, leaves: list[Moved]) -> None:
        super()._number(leaves)
        dimension = sum(leaf.draw(0).leaf.numel for leaf in leaves)
        assert isinstance(self.probe, Kiefer | RandomDirections)
        self.probe = replace(self.probe, dimension=dimension)
        for group in self.param_groups:
            group[DIMENSION] = dimension
