"""Consensus: hopping to the Gibbs-weighted mean of perturbed copies, or particles that gather there."""

import math
from typing import Any, Literal

from torch import Tensor, nn

from tare.core.checks import check_choice
from tare.core.errors import InputError
from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.methods.base_forward import NO_DECAY, forward_recipe, law_of
from tare.methods.registry import Card, Trial, register
from tare.rules.momentum import Momentum
from tare.zeroth.consensus import ConsensusOptimizer, Hopping, Particles, Swarm
from tare.zeroth.directions import Law
from tare.zeroth.exchange import Exchange
from tare.zeroth.memory import Memory
from tare.zeroth.record import Recorder

CARD = Card(
    key="consensus",
    title="Gradient is All You Need? How Consensus-Based Optimization can be Interpreted as a Stochastic Relaxation of Gradient Descent",
    authors="Riedl, Klock, Geldhauser, Fornasier",
    year=2023,
    arxiv="2306.09778",
    idea="Values of n perturbed copies become Gibbs weights; the weights move to the weighted mean. Hopping keeps no copy, particles stay.",
    axes={"directions": "Gaussian, or particles", "probe": "Gibbs weights of n values", "rule": "SGD, lr 1", "memory": "in forward"},
    defaults={
        "lr": "1.0: to the mean (paper)", "n": "50 hopping (ours; demo 200), 100 particles (code, MNIST)",
        "sigma": "1e-2 hopping (ours; demo in two dimensions 0.4 to 0.7), sqrt(0.4) particles (code)",
        "alpha": "100 hopping (demo), 50 particles (code)", "dt": "0.1 (code)", "drift": "1.0 (code)", "spread": "1.0 (code)",
        "decay": "None (a variant of the code: every 100 steps, factor 0.98)", "cooling": "None (code: every epoch)",
        "kick": "0 (code: 1e-5)", "batch": "None (code: 10 of 100)",
    },
    presets={"*": {"lr": 1.0}},
    limits=(
        "Particles are n copies of every trained leaf, in state: for adapters, prompts and small nets.",
        "Hopping steps by about alpha sigma^2 times the gradient, with the variance of n / 2 random directions.",
        "Where all members do equally well hopping still moves, to their plain mean; antithetic=True does not.",
        "alpha too large picks one member, too small the plain mean; without noise particles stay within the span of where they began.",
    ),
    differences=(
        "Anisotropic noise is xi D in CBXpy, xi |D| in the authors' Matlab code: the same law, other paths. absolute=True is the latter.",
        "The authors' code runs all batches of particles on one batch of data; here every step takes one batch of each.",
        "The kick (noise where the mean stands still) and batches of particles are in the code only; both are options.",
        "The code compares the first mean with zero, this with the weights at the beginning.",
        "CBXpy's docstring and its code disagree on dt, sigma and noise; nothing here is its default.",
    ),
    release="no",
    auto_rank=270,
    kind="forward",
    state="none; 4 n m n' for n particles of an m x n' matrix",
    trial=Trial(
        lr=1.0, hyper={"n": 10, "sigma": 5e-2, "alpha": 40.0},
        exempt={
            "equal_losses_move_nothing_but_decay": "members of one value weigh alike: the weights go to their plain mean, and that is not "
            "where they stand",
        },
    ),
)  # fmt: skip

# options of one form only, and what they are where nobody gives them
_HOPPING = {"decay": None, "antithetic": False}
_PARTICLES = {
    "dt": 0.1, "drift": 1.0, "noise": "anisotropic", "absolute": False, "batch": None, "moved": "all", "kick": 0.0, "cooling": None,
    "spread": 1.0,
}  # fmt: skip


@register(CARD)
class Consensus(ConsensusOptimizer):
    """W <- W + lr sum_i w_i (x_i - W), w = softmax(-alpha f(x)): x_i = W + sigma xi_i, or particles (arXiv 2306.09778).

    Args:
        params: the model that the closure runs (preferred), or what `tare.Optimizer` takes.
        lr: share of the way to the mean that is gone; particles: 1.
        form: `hopping` (seeds and scalars, no state), or `particles` (n copies of the trained leaves).
        n: members or particles. sigma: their distance, or the strength of the noise. alpha: inverse temperature.
        decay: hopping: (period, factor) of sigma. antithetic: hopping: members in pairs.
        dt, drift, noise, absolute, batch, moved, kick, cooling, spread: particles: see `zeroth.consensus.Swarm`.
        directions: law of xi: `gaussian`, `rademacher`, or a `Law`.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        maximize: larger values of the closure are better.
        together, memory, exchange, storage, seed, patience, on_step, model: see `PopulationOptimizer` and `ForwardOptimizer`.

    Raises:
        InputError: values out of range, or an option of the other form.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> opt = Consensus(net, form="particles", n=20, sigma=0.3, spread=2.0)
    >>> for _ in range(40):
    ...     _ = opt.step(lambda: (net.weight - 0.5).square().sum())
    >>> bool((net.weight - 0.5).norm() < 0.2), opt.state_bytes().total
    (True, 160)
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, *, form: Literal["hopping", "particles"] = "hopping", n: int | None = None,
        sigma: float | None = None, alpha: float | None = None, decay: tuple[int, float] | None = None, antithetic: bool = False,
        dt: float = 0.1, drift: float = 1.0, noise: Literal["anisotropic", "isotropic"] = "anisotropic", absolute: bool = False,
        batch: int | None = None, moved: Literal["all", "batch"] = "all", kick: float = 0.0, cooling: int | None = None,
        spread: float = 1.0, directions: str | Law = "gaussian", targets: Match = "*", together: int | None = None,
        memory: str | Memory = "auto", exchange: Exchange | None = None, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        check_choice("form", form, ("hopping", "particles"))
        given = {
            "decay": decay, "antithetic": antithetic, "dt": dt, "drift": drift, "noise": noise, "absolute": absolute, "batch": batch,
            "moved": moved, "kick": kick, "cooling": cooling, "spread": spread,
        }  # fmt: skip
        for name, default in (_PARTICLES if form == "hopping" else _HOPPING).items():
            if given[name] != default:
                raise InputError(f"{name}: not an option of form={form!r}; leave it out, or use the other form")
        law = law_of(directions)
        probe: Hopping | Swarm
        if form == "hopping":
            own = _chosen(n, 50, sigma, 1e-2, alpha, 100.0)
            probe = Hopping(*own, decay=decay, antithetic=antithetic, higher=bool(maximize))
        else:
            count, strength, heat = _chosen(n, 100, sigma, math.sqrt(0.4), alpha, 50.0)
            probe = Swarm(
                count, heat, dt, drift, strength, noise, absolute, batch, moved, kick, cooling, spread, bool(maximize), seed
            )  # fmt: skip
            law = Particles(probe, law)
        super().__init__(
            params, forward_recipe(law, Momentum(0.0), targets, NO_DECAY), lr, probe=probe, together=together, memory=memory,
            exchange=exchange, storage=storage, seed=seed, patience=patience, on_step=on_step, model=model,
        )  # fmt: skip


def _chosen(
    n: int | None, count: int, sigma: float | None, width: float, alpha: float | None, heat: float
) -> tuple[int, float, float]:
    """What was given, or the form's default."""
    return count if n is None else n, width if sigma is None else sigma, heat if alpha is None else alpha
