"""Subspace-ZO (ZOODiP): tokens, prompts and other small tensors of a frozen, quantised model, where their own history says to look."""

from typing import Any, Literal

from torch import Tensor, nn

from tare.core.checks import check_whole
from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import NO_DECAY, forward_recipe, law_of, pick
from tare.methods.registry import Card, Trial, register
from tare.rules.adam import Adam
from tare.rules.momentum import Momentum
from tare.zeroth.directions import Law
from tare.zeroth.exchange import Exchange
from tare.zeroth.history import Moving
from tare.zeroth.memory import Memory
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import OneSided, Probe, TwoSided
from tare.zeroth.record import Recorder

CARD = Card(
    key="subspace-zo",
    title="Efficient Personalization of Quantized Diffusion Model without Backpropagation",
    authors="Seo, Jeong, Lee, Lee, Chun",
    year=2025,
    arxiv="2503.14868",
    idea="Estimates by few directions are mostly noise: take out of them the directions in which the tensor's last moves did not vary.",
    axes={"directions": "Gaussian", "probe": "one-sided, n = 2", "rule": "Adam, projected on the history", "memory": "in forward"},
    defaults={
        "lr": "5e-3 (paper; launch script: 1e-2)", "eps": "1e-3 (paper: mu)", "n": "2 (paper)", "tau": "128 (paper)",
        "nu": "1e-3 (paper; the code's parser says 0.99)", "adam_eps": "1e-3 (code; not in the paper)",
        "normalize": "True (code; not in the paper)", "standardize": "True (code)", "betas": "(0.9, 0.999) (code)",
    },
    presets={"*": {"lr": 5e-3}},
    limits=(
        "For small tensors: the history is 8 tau bytes for each trained scalar, beside Adam's 8.",
        "Only directions within the span of the last tau weights can be taken out: at most tau - 2 of d.",
        "The first tau updates are those of Adam.",
        "Which timesteps of a diffusion model are sampled (the paper: 500 to 900 of 1000) is up to the closure.",
    ),
    differences=(
        "The code divides the estimate by sqrt((D + n - 1) / n), D dimensions left, which the paper does not mention; under Adam it only "
        "counts through adam_eps. normalize=False leaves it out.",
        "Principal components are of standardised coordinates and are taken out of gradients that are not (code); standardize=False uses "
        "plain ones.",
        "The code's basis always holds one direction of pure rounding noise, because it asks for tau components of tau centred points; "
        "left out here.",
        "The code reseeds the global generator, so that timestep and noise of the next step depend on the directions; here they do not.",
    ),
    release="no",
    auto_rank=320,
    kind="forward",
    state="8 tau m n + 8 m n",
    trial=Trial(lr=2e-2, hyper={"tau": 4, "nu": 0.05, "n": 4}, steps=80),
)  # fmt: skip


@register(CARD)
class SubspaceZO(ForwardOptimizer):
    """g <- g (I - V^T V), V the principal directions of the last tau weights that explain the smallest nu of their variance; then Adam.

    g is the mean of delta_i z_i over n directions, delta_i = (f(W + eps z_i) - f(W)) / eps: n + 1 evaluations (arXiv 2503.14868).

    Args:
        params: the model that the closure runs (preferred), or what `tare.Optimizer` takes. To train single tokens of a table, see
            `tare.zeroth.history.train_rows_`.
        lr: learning rate.
        eps: length of the perturbation (the paper's mu).
        n: directions a step.
        tau: updates between two looks at the history, and how many weights it holds.
        nu: share of their variance that may be left out; 0 takes out nothing, and near 1 one direction of their span stays.
        standardize: compare coordinates by their own spread.
        normalize: divide the estimate by sqrt((D + n - 1) / n), D dimensions left.
        probe: `one-sided`, `two-sided` (2 n evaluations), or a `Probe`.
        rule: `adam`, `sgd`, or a rule of `tare.rules`.
        directions: `gaussian`, `rademacher`, or a `Law`.
        targets: which leaves are trained; as the patterns of a `Recipe`. Each has a history of its own.
        undecayed, memory, exchange, weight_decay, storage, seed, maximize, patience, on_step, model: as `MeZO`.

    Raises:
        InputError: values out of range.

    >>> import torch
    >>> prompt = torch.nn.Parameter(torch.zeros(2, 8))
    >>> opt = SubspaceZO([("prompt", prompt)], lr=0.05, tau=8, nu=0.1)
    >>> losses = [opt.step(lambda: (prompt - 1.0).square().mean()) for _ in range(60)]
    >>> losses[-1] < 0.5 * losses[0]
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 5e-3, eps: float = 1e-3, *, n: int = 2, tau: int = 128, nu: float = 1e-3,
        standardize: bool = True, normalize: bool = True, probe: Literal["one-sided", "two-sided"] | Probe = "one-sided",
        rule: Literal["adam", "sgd"] | Transform = "adam", betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-3,
        directions: str | Law = "gaussian", targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY,
        memory: str | Memory = "auto", exchange: Exchange | None = None, weight_decay: float = 0.0,
        storage: Storage | dict[str, Any] | None = None, seed: int = 0, maximize: bool = False, patience: int = 10,
        on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        check_whole("n", n, 1)
        asking: Probe = pick("probe", probe, {"one-sided": OneSided(eps, n), "two-sided": TwoSided(eps, n)})
        inner: Transform = pick("rule", rule, {"adam": Adam(betas, adam_eps), "sgd": Momentum(0.0)})
        moving = Moving(inner, tau, nu, standardize, n if normalize else 0)
        super().__init__(
            params, forward_recipe(law_of(directions), moving, targets, undecayed), lr, probe=asking, memory=memory,
            exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed, maximize=maximize, patience=patience,
            on_step=on_step, model=model,
        )  # fmt: skip
