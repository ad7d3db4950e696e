"""Sparse-MeZO: MeZO that perturbs and steps only the small weights of each tensor."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from tare.core.errors import InputError, nearest
from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import NO_DECAY, law_of
from tare.methods.mezo import MeZO
from tare.methods.registry import Card, Trial, register
from tare.zeroth.coefficients import Coefficients
from tare.zeroth.directions import Law
from tare.zeroth.exchange import Exchange
from tare.zeroth.masks import Mask, Masked
from tare.zeroth.memory import Memory
from tare.zeroth.probes import Probe
from tare.zeroth.record import Recorder

CARD = Card(
    key="sparse-mezo",
    title="Sparse-MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
    authors="Liu, Zhu, Gong, Cheng, Hsieh, You",
    year=2024,
    arxiv="2402.15751",
    idea="Noise of the estimate hurts large weights most: leave them out, and take larger steps with the small ones.",
    axes={"directions": "Gaussian, zero where |w| > h", "probe": "two-sided", "rule": "SGD", "memory": "in forward"},
    defaults={
        "lr": "3e-6: thrice MeZO's (the paper's values could not be read; 2 to 5 times MeZO's go with it)", "eps": "1e-3 (paper)",
        "sparsity": "0.75 (paper: 0.5 to 0.8 work, 0.8 is best on most tasks)", "mask": "dynamic (paper)",
        "masked": "all leaves, each with its own threshold (not said in the paper)",
    },
    presets={"*": {"lr": 3e-6}},
    limits=(
        "Weight decay and rules with moments move weights that the mask leaves out.",
        "Int8 weights are encoded anew by groups, those that are left out among them.",
    ),
    differences=(
        "The printed mask compares w itself with h, which would keep all negative weights; here |w|, as the text says.",
        "The mask is that of the unperturbed weights at all points of a step; an implementation that perturbs in place and computes it "
        "anew gets another one at each. In place, a copy of the trained weights is kept instead.",
        "The authors' code could not be opened: checked against traces of the written equations.",
    ),
    release="no",
    auto_rank=210,
    kind="forward",
    state="4 bytes a leaf; m n / 8 with a constant mask",
    trial=Trial(lr=1e-1, hyper={"sparsity": 0.5}),
)  # fmt: skip


@register(CARD)
class SparseMeZO(MeZO):
    """W <- W - lr delta m z, m = 1 where |W| <= h, delta = (f(W + eps m z) - f(W - eps m z)) / (2 eps) (arXiv 2402.15751).

    Args:
        params, lr, eps, n, mean, probe, coefficients, rule, momentum, betas, adam_eps, directions, targets, undecayed: as `MeZO`.
        sparsity: share of each leaf's weights that are left out, from 0 (which is MeZO) to below 1.
        mask: `dynamic`: h is found once, membership follows the weights; `constant`: fixed at the first step, one bit a weight;
            `random`: the control R-MeZO, nothing kept.
        masked: leaves with a mask; as the patterns of a `Recipe`. The others are trained whole.
        thresholds: h by the names of leaves, in place of the quantiles.
        memory, exchange, weight_decay, storage, seed, maximize, patience, on_step, model: as `ForwardOptimizer`.

    Raises:
        InputError: values out of range.

    >>> import torch
    >>> net = torch.nn.Linear(8, 4)
    >>> opt = SparseMeZO(net, lr=1e-2, sparsity=0.5)
    >>> before = net.weight.detach().clone()
    >>> loss = opt.step(lambda: net(torch.ones(2, 8)).square().mean())
    >>> int((net.weight != before).sum()), opt.state_bytes().total
    (16, 8)
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 3e-6, eps: float = 1e-3, *, sparsity: float = 0.75, mask: Mask = "dynamic",
        masked: Match = "*", thresholds: Mapping[str, float] | None = None, n: int = 1, mean: bool = True,
        probe: str | Probe = "two-sided", coefficients: Literal["plain", "sign"] | Coefficients = "plain",
        rule: Literal["sgd", "momentum", "adam"] | Transform = "sgd", momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, directions: str | Law = "gaussian",
        targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY, memory: str | Memory = "auto",
        exchange: Exchange | None = None, weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__(
            params, lr, eps, n=n, mean=mean, probe=probe, coefficients=coefficients, rule=rule, momentum=momentum, betas=betas,
            adam_eps=adam_eps, directions=Masked(law_of(directions), sparsity, mask, masked, thresholds), targets=targets,
            undecayed=undecayed, memory=memory, exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed,
            maximize=maximize, patience=patience, on_step=on_step, model=model,
        )  # fmt: skip
        names = [entry.leaf.name for entry in self._entries.values()]
        for name in thresholds or {}:
            if name not in names:
                raise InputError(f"thresholds: no leaf is called {name!r}{nearest(name, names)}")
