"""EGGROLL: evolution strategies whose perturbations are low-rank, so that a whole population is evaluated in one forward."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from tare.core.checks import check_number
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.recipe import Match, Recipe, matches
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import LAWS, NO_DECAY, pick
from tare.methods.registry import Card, Trial, register
from tare.rules.adam import Adam
from tare.rules.momentum import Momentum
from tare.zeroth.directions import Directed, Law, Untouched
from tare.zeroth.exchange import Exchange
from tare.zeroth.fitness import Baseline, Raw, Shaping, ZScore
from tare.zeroth.lowrank import LowRank
from tare.zeroth.memory import Memory, Moved
from tare.zeroth.population import Antithetic, PopulationOptimizer, clipped
from tare.zeroth.probes import Estimate
from tare.zeroth.record import Record, Recorder

CARD = Card(
    key="eggroll",
    title="Evolution Strategies at the Hyperscale",
    authors="Sarkar, Fellows, Duque, and others",
    year=2025,
    arxiv="2511.16652",
    idea="Members of a population stand at W + sigma A B^T / sqrt(r): one product with W serves them all; A and B are never stored.",
    axes={
        "directions": "A B^T / sqrt(r), rank 1", "probe": "antithetic population, fitness by z-score", "rule": "SGD",
        "memory": "side by side in one forward, or one member at a time",
    },
    defaults={
        "lr": "1.0 (code: lr_scale)", "sigma": "1e-3 (code)", "rank": "1 (paper)", "members": "64 (paper: 1024 a GPU)",
        "reuse": "1 (code's scripts: fresh noise at every step)", "vectors": "frozen (code's scripts)",
        "embeddings": "False (main code; True in nano-egg)", "clip": "none; 1.0 with shaping='baseline' (code)",
        "group": "None (scripts: 8 members a prompt)",
    },
    presets={"*": {"lr": 1.0, "members": 64}},
    limits=(
        "The variance of the estimate is that of evolution strategies: m n parameters, N members. Populations are large for a reason.",
        "Attention caches and activations grow with the members in one forward: `together` bounds them.",
        "Dropout and recurrent modules (nn.GRU) are refused side by side: together=1 runs them. Models that mix rows of a batch run one "
        "member at a time by themselves.",
        "A tied head is an embedding: embeddings=True trains it.",
    ),
    differences=(
        "The code multiplies by sigma sqrt(N), the paper by alpha / N: scaling='code' (default) and 'paper', equal for "
        "lr = alpha / (sigma sqrt(N)).",
        "The library's default noise_reuse=0 means the same noise for ever; its scripts, and this, draw afresh at every step (reuse=1).",
        "Embeddings: the main code raises, nano-egg perturbs them. Default here: frozen, since rows that no token of the batch reads would "
        "move by noise alone.",
        "The code draws noise in the dtype of the parameter (bf16 in bf16 models), and all of it at once; here fp32, in chunks of members.",
        "The baseline variant (shaping='baseline'): members 0 and 1 stay unperturbed and set the baseline, and the gradient is clipped "
        "before the learning rate.",
        "Scripts sum fitness over the prompts that all members answer; here it is their mean.",
        "Integer-only training (nano-egg) is `tare.zeroth.egg`: exact but for weights nobody votes on, which stay (published: -1 at "
        "alpha = 1; still='down'), a mean below 1 in its layer norm, which counts as 1, and stretches of the noise table, never cut short.",
    ),
    release="no",
    auto_rank=230,
    kind="forward",
    state="none; that of the rule",
    trial=Trial(lr=0.3, hyper={"members": 8, "sigma": 5e-2}),
)  # fmt: skip


@dataclass(frozen=True)
class Resting:
    """Matches leaves that stay as they are: all but `targets`, embeddings unless `embeddings`, what is no matrix unless `vectors`."""

    targets: Match
    embeddings: bool
    vectors: bool

    def __call__(self, leaf: Leaf) -> bool:
        trained = (self.vectors or leaf.matrix is not None) and (self.embeddings or leaf.role != "embedding")
        return not (trained and matches(self.targets, leaf))


@register(CARD)
class Eggroll(PopulationOptimizer):
    """W <- W - lr G, G = -(sigma / sqrt(N)) sum_k f_k E_k, E = +-A B^T / sqrt(r), f the z-scored rewards (arXiv 2511.16652).

    Args:
        params: the model that the closure runs (preferred), or what `tare.Optimizer` takes.
        lr: with scaling `code` a step's entries are about lr sigma, whatever N.
        sigma: how far members stand off.
        members: N, even.
        rank: r of the perturbations.
        shaping: `zscore`, `none` (the rewards themselves), `baseline`, or a `Shaping`.
        group: with `zscore`, members that answer the same prompt: they are compared with one another.
        prompts: prompts that every member answers, each by an evaluation of its own; `members.prompts` tells the closure which.
        scaling: `code` or `paper` (alpha / N).
        reuse: steps that share their noise; 0: the first step's for ever.
        vectors: what becomes of leaves that are no matrices: `frozen`, or `gaussian` noise.
        embeddings: whether embeddings are perturbed and trained.
        clip: most norm of the gradient over all leaves; default none, and 1 with `baseline`.
        rule: `sgd`, `momentum`, `adam`, or a rule of `tare.rules`.
        directions: `low-rank`, or another law in its place (`gaussian`, `rademacher` ..., or a `Law`), without rank and reuse; with
            most of them a module runs one member after another.
        targets: which leaves are trained, of those.
        together: members in one forward; see `PopulationOptimizer`, also for what the closure may be.
        exchange, memory, weight_decay, storage, seed, maximize, patience, on_step, model: see `ForwardOptimizer`.

    Raises:
        InputError: values out of range, or choices that exclude one another.

    >>> import torch
    >>> net = torch.nn.Linear(4, 1)
    >>> opt = Eggroll(net, lr=0.3, sigma=0.1, members=16)
    >>> x, y = torch.ones(8, 4), torch.ones(8, 1)
    >>> def closure(members):
    ...     return members.mean((net(members.repeat(x)) - members.repeat(y)).square())
    >>> losses = [opt.step(closure) for _ in range(20)]
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, sigma: float = 1e-3, *, members: int = 64, rank: int = 1,
        shaping: Literal["zscore", "none", "baseline"] | Shaping = "zscore", group: int | None = None, prompts: int = 1,
        scaling: Literal["code", "paper"] = "code", reuse: int = 1, vectors: Literal["frozen", "gaussian"] = "frozen",
        embeddings: bool = False, clip: float | None = None, rule: Literal["sgd", "momentum", "adam"] | Transform = "sgd",
        momentum: float = 0.9, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, directions: str | Law = "low-rank",
        targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY, together: int | None = None, memory: str | Memory = "auto",
        exchange: Exchange | None = None, weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        if group is not None and shaping != "zscore":
            raise InputError("group: groups are compared by z-score; use shaping='zscore'")
        shapings = {"zscore": ZScore(group), "none": Raw(), "baseline": Baseline()}
        solvers = {"sgd": Momentum(0.0), "momentum": Momentum(momentum), "adam": Adam(betas, adam_eps)}
        law = pick("directions", directions, {**LAWS, "low-rank": LowRank(rank, reuse)})
        if directions != "low-rank" and (rank, reuse) != (1, 1):
            raise InputError("rank, reuse: options of directions='low-rank'; leave them out, or give them to the law")
        directed = Directed(law, pick("rule", rule, solvers), undecayed=undecayed)
        resting = Resting(targets, embeddings, pick("vectors", vectors, {"frozen": False, "gaussian": True}))
        self.clip = 1.0 if clip is None and shaping == "baseline" else clip
        if self.clip is not None:
            check_number("clip", self.clip, 0.0)
        super().__init__(
            params, Recipe(((resting, Untouched()), (targets, directed), ("*", Untouched()))), lr,
            probe=Antithetic(members, sigma, pick("shaping", shaping, shapings), prompts, scaling), together=together,
            memory=memory, exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed, maximize=maximize,
            patience=patience, on_step=on_step, model=model,
        )  # fmt: skip

    def _record(self, estimate: Estimate | None, losses: list[float], leaves: list[Moved]) -> Record:
        record = super()._record(estimate, losses, leaves)
        return record if self.clip is None else clipped(record, leaves, self.clip)
