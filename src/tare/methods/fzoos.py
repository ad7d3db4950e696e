"""FZooS: federated tuning of prompts and scales from losses alone, along gradients of surrogates of what was queried."""

from typing import Any, Literal

from torch import Tensor, nn

from tare.core.checks import check_whole
from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import NO_DECAY, forward_recipe, pick
from tare.methods.registry import Card, Trial, register
from tare.rules.momentum import Momentum
from tare.zeroth.clients import Clients
from tare.zeroth.exchange import Exchange
from tare.zeroth.federated import Federated, FederatedOptimizer, Placed, Table
from tare.zeroth.memory import Memory
from tare.zeroth.record import Recorder

CARD = Card(
    key="fzoos",
    title="Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients",
    authors="Shu, Lin, Dai, Low",
    year=2023,
    arxiv="2308.04077",
    idea="A Gaussian process through a client's past queries gives its gradient without new ones; clients exchange random features of "
    "it and correct their drift at any point.",
    axes={"directions": "none: queries on the trajectory", "probe": "posterior gradient, corrected", "rule": "SGD on the mean move of the "
          "clients' local Adam", "memory": "in forward"},
    defaults={
        "lr": "1.0: of the server (code)", "local_lr": "0.01 (code)", "local_steps": "10 (code: 10 to 30)", "near": "50 (code)",
        "active": "5 of 100 candidates (code)", "reach": "0.01 (code)", "nearest": "150 (code)", "features_nearest": "500 (code)",
        "components": "10,000 (code)", "noise": "1e-6 (code)", "kernel": "matern-5/2 (code)", "capacity": "1000 (ours; code: all)",
        "lengthscale": "None: the likeliest, once a round (ours; code: at each local step)", "correction": "None: 1 / t (code)",
    },
    presets={"*": {"lr": 1.0}},
    limits=(
        "At most 1,000 trained scalars; more are refused. A surrogate costs O(nearest^3) per local step.",
        "Each client's closure is to be one function: other data at each step is noise that the surrogate takes for shape.",
        "reach and local_lr are distances in weights; the published code scales its domain to [0, 1]^d.",
        "A log of seeds repeats the weights of a run, but does not hold the queries.",
        "Clients are simulated in one process, or are processes (`exchange=Clients()`), each with its own closure; the two take the same "
        "rounds. A client's queries are state of its process, and saved there.",
    ),
    differences=(
        "The code differentiates the posterior mean numerically with a step of 1e-20, which only works because that step is replaced "
        "silently; here the gradient is the closed form.",
        "The code queries near the new x at the end of a round; here at the beginning of the next one, so the first round needs no other "
        "start. The first radius is `reach`.",
        "Which candidates are queried: the code takes the variance of the first partial derivative under an RBF kernel; here of all, under "
        "the kernel of the surrogate.",
        "The code's server rejects a round after which the true global loss is higher, which it evaluates for this. Left out.",
        "Features are fitted with a ridge of `noise`; the code's least squares have none, and the shorter solution.",
    ),
    release="no",
    auto_rank=330,
    kind="forward",
    state="8 clients capacity (m n + 1)",
    trial=Trial(
        lr=1.0, steps=8, problem="tare.testing.forward_few:prompt",
        hyper={"local_steps": 4, "near": 12, "active": 2, "nearest": 40, "capacity": 60, "local_lr": 0.03, "reach": 0.03},
    ),
)  # fmt: skip


@register(CARD)
class FZooS(FederatedOptimizer):
    """x <- x - lr sum_i w_i (x - x_i), x_i where client i ends after local Adam along grad mu_i + (grad nu - grad nu_i) / t.

    mu_i is the posterior mean of a Gaussian process through the client's queries near x, nu_i its fit by random features, nu their mean
    (arXiv 2308.04077).

    Args:
        params: the model that the closures run (preferred), or what `tare.Optimizer` takes.
        lr: of the server.
        clients: `step` takes a list of as many closures, or just a closure where there is one. One client needs no correction.
            With `exchange=Clients()` as many as there are processes, and `step` takes the closure of this one.
        weights: of the clients, their data for instance; default: alike.
        local_steps, local_lr, betas, adam_eps: of the clients' Adam, new in each round.
        near: queries around x at the beginning of a round, of four times as many candidates.
        active: queries around x after each local step but the last, of twenty times as many candidates.
        reach: half the side of the cube of those; and of the first `near`, whose later ones follow from how far clients moved.
        kernel: `matern-5/2` or `rbf`. lengthscale: None: the likeliest, found anew in each round. noise: on the diagonal.
        nearest, features_nearest: queries that surrogate and features are fitted to.
        components: random features. features_lengthscale: of their kernel.
        correction: a constant in place of 1 / t; 0: FedAvg with surrogate gradients.
        capacity: queries that each client keeps; the oldest make room.
        rule: of the server: `sgd`, or a rule of `tare.rules`.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        exchange: `Clients()`: a process for each client. `Workers()`: workers that share all queries; each has every closure.
        undecayed, memory, weight_decay, storage, seed, patience, on_step, model: as `MeZO`.

    Raises:
        InputError: values out of range; more than 1,000 trained scalars.

    >>> import torch
    >>> x = torch.nn.Parameter(torch.zeros(4))
    >>> opt = FZooS([("x", x)], clients=2, local_lr=0.05, near=20, components=200)
    >>> parts = [lambda: (x - 1.0).square().sum(), lambda: (x + 0.5).square().sum()]
    >>> for _ in range(8):
    ...     _ = opt.step(parts)
    >>> bool((x - 0.25).abs().max() < 0.1)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, *, clients: int = 1, weights: tuple[float, ...] = (), local_steps: int = 10,
        local_lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, near: int = 50, active: int = 5,
        reach: float = 0.01, kernel: Literal["matern-5/2", "rbf"] = "matern-5/2", lengthscale: float | None = None,
        noise: float = 1e-6, nearest: int = 150, features_nearest: int = 500, components: int = 10_000,
        features_lengthscale: float = 1.0, correction: float | None = None, capacity: int = 1000,
        rule: Literal["sgd"] | Transform = "sgd", targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY,
        memory: str | Memory = "auto", exchange: Exchange | None = None, weight_decay: float = 0.0,
        storage: Storage | dict[str, Any] | None = None, seed: int = 0, patience: int = 10, on_step: Recorder | None = None,
        model: nn.Module | None = None,
    ):  # fmt: skip
        table, others = Table(), exchange if isinstance(exchange, Clients) else None
        probe = Federated(
            clients, local_steps, local_lr, near, active, reach, kernel, lengthscale, noise, nearest, components,
            features_lengthscale, features_nearest, correction, tuple(weights), betas, adam_eps, table, others,
        )  # fmt: skip
        law = Placed(clients=len(probe.here), capacity=check_whole("capacity", capacity, 2), table=table)
        super().__init__(
            params, forward_recipe(law, pick("rule", rule, {"sgd": Momentum(0.0)}), targets, undecayed), lr, probe=probe,
            memory=memory, exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed, patience=patience,
            on_step=on_step, model=model,
        )  # fmt: skip
