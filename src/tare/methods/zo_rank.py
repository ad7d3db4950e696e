"""ZO-RankSGD: nothing is known of the objective but which of a few points are better than others."""

from typing import Any, Literal

from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import NO_DECAY, forward_recipe, law_of, pick
from tare.methods.registry import Card, Trial, register
from tare.rules.adam import Adam
from tare.rules.momentum import Momentum
from tare.zeroth.directions import Law
from tare.zeroth.exchange import Exchange
from tare.zeroth.memory import Memory
from tare.zeroth.ranking import Ranking, RankingOptimizer, Recalling
from tare.zeroth.record import Recorder

CARD = Card(
    key="zo-rank",
    title="Zeroth-Order Optimization Meets Human Feedback: Provable Learning via Ranking Oracles",
    authors="Tang, Rybin, Chang",
    year=2024,
    arxiv="2303.03751",
    idea="A person or a program orders the best k of m perturbed models; differences of directions over the known pairs are the step.",
    axes={"directions": "Gaussian", "probe": "order of the best k of m", "rule": "SGD", "memory": "in forward"},
    defaults={
        "lr": "1e-3 (ours)", "mu": "1e-3 (ours)", "m": "6 (code's notebooks: 6 to 8)", "k": "3 (code's notebooks: 3, or m)",
        "line_search": "0 (ours; notebooks: 4 to 6)", "gamma": "0.5 (code)",
    },
    presets={"*": {"lr": 1e-3}},
    limits=(
        "The length of a step says nothing about the slope: orders have no scale. Lower lr over time, or search along the line.",
        "Equal losses are ranked as they come, so they move the weights too.",
        "While theta wins line searches, one more round of m directions is drawn again at each.",
    ),
    differences=(
        "The released code weighs ranked points m - 2 t; the sum over all is then k, which adds the mean of the best directions. Default "
        "here: m - 1 - 2 t, which sum to 0; weights='published' is the code's.",
        "The code's directions carry mu: its step size is our lr / mu.",
        "The paper ranks only steps of the line search; the code also the best of the m points and theta, and averages directions "
        "until theta loses. Default here: as the code; keep_best=False is the paper's.",
    ),
    release="no",
    auto_rank=260,
    kind="forward",
    state="none",
    trial=Trial(
        lr=2e-2, hyper={"mu": 5e-2},
        exempt={
            "equal_losses_move_nothing_but_decay": "only an order is seen, and an order has no ties: equal losses are ranked as they come",
        },
    ),
)  # fmt: skip


@register(CARD)
class ZORank(RankingOptimizer):
    """W <- W - lr g, g the mean of xi_worse - xi_better over the pairs whose order is known (arXiv 2303.03751).

    Args:
        params: the model that is asked about (preferred), or what `tare.Optimizer` takes.
        lr: learning rate; with a line search the longest step that is tried.
        mu: how far the points stand off.
        m: points. k: how many of the best are told in order; None: all.
        weights: `zero-sum`, or `published`.
        line_search: how many lengths lr gamma^i are tried; 0: the step is lr g.
        gamma: ratio of the lengths.
        keep_best: whether the best point and theta take part in the line search, and failed directions are averaged.
        rule: `sgd`, `momentum`, `adam`, or a rule of `tare.rules`; with a line search `sgd`.
        directions: `gaussian`, `rademacher`, or a `Law`.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        maximize: larger values of the closure are better. An order always has the best first.
        together: see `PopulationOptimizer`.
        undecayed, memory, exchange, weight_decay, storage, seed, patience, on_step, model: see `MeZO` and `ForwardOptimizer`.

    Raises:
        InputError: values out of range, or choices that exclude one another.

    >>> import torch
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> opt = ZORank(net, lr=0.2, mu=0.1)
    >>> target = torch.ones(1, 3)
    >>> def ranker(candidates):  # a person could do this: candidates are contexts
    ...     distances = []
    ...     for candidate in candidates:
    ...         with candidate:
    ...             distances.append(float((net(torch.eye(3)).T - target).norm()))
    ...     return sorted(range(len(distances)), key=distances.__getitem__)
    >>> for _ in range(60):
    ...     _ = opt.step(ranker=ranker)
    >>> bool((net.weight - target).norm() < 0.5)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, mu: float = 1e-3, *, m: int = 6, k: int | None = 3,
        weights: Literal["zero-sum", "published"] = "zero-sum", line_search: int = 0, gamma: float = 0.5, keep_best: bool = True,
        rule: Literal["sgd", "momentum", "adam"] | Transform = "sgd", momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, directions: str | Law = "gaussian", targets: Match = "*",
        undecayed: tuple[str, ...] = NO_DECAY, together: int | None = None, memory: str | Memory = "auto",
        exchange: Exchange | None = None, weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        solvers = {"sgd": Momentum(0.0), "momentum": Momentum(momentum), "adam": Adam(betas, adam_eps)}
        probe = Ranking(m, m if k is None else k, mu, weights, line_search, gamma, keep_best, bool(maximize))
        if line_search and rule != "sgd":
            raise InputError("line_search: the steps that are tried are those of plain SGD; use rule='sgd'")
        law = law_of(directions)
        if probe.recalls:
            if law.reads_weight:
                raise InputError(
                    "keep_best: directions of former steps are drawn again, but these depend on weights that have changed; use "
                    "keep_best=False"
                )
            law = Recalling(law, m)
        super().__init__(
            params, forward_recipe(law, pick("rule", rule, solvers), targets, undecayed), lr, probe=probe, together=together,
            memory=memory, exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed, patience=patience,
            on_step=on_step, model=model,
        )  # fmt: skip
