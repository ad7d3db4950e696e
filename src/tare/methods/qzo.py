"""QZO: a quantised model trained by its scales alone, with forward passes only; the derivative is clipped."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tare.core.checks import check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf, named_roles
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base_forward import NO_DECAY, law_of
from tare.methods.registry import Card, Trial, register
from tare.rules.momentum import Momentum
from tare.zeroth.coefficients import Clip, Plain
from tare.zeroth.directions import Directed, Law, Untouched
from tare.zeroth.exchange import Exchange
from tare.zeroth.memory import InForward, Memory, Moved
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import TwoSided
from tare.zeroth.record import Record, Recorder
from tare.zeroth.scales import Relative, find_scales

CARD = Card(
    key="qzo",
    title="Fine-tuning Quantized Neural Networks with Zeroth-order Optimization",
    authors="Shang, Zhou, Lin, Li, Zhou",
    year=2025,
    arxiv="2505.13430",
    idea="Codes stay frozen; the scales of their groups, a hundredth as many, are perturbed and stepped. The derivative is clipped.",
    axes={"directions": "Gaussian, on scales", "probe": "two-sided", "coefficients": "clip", "rule": "SGD", "memory": "in forward"},
    defaults={
        "lr": "1e-7 (paper; the published script: 1e-5)", "eps": "1e-3 (paper), absolute", "clip": "100 (paper)",
        "floor": "1e-7 (code; the paper: 0)", "weight_decay": "0; never on scales (code)",
    },
    presets={"*": {"lr": 1e-7}},
    limits=(
        "eps is absolute by default, and 1e-3 is a tenth of a usual 4-bit scale: then differences are far from derivatives; see relative.",
        "The floor holds for updates, not for the points where the loss is evaluated: there scales may be negative.",
        "Scales of torchao tensors and of layers of other packages are parts of the model but none of its parameters: build the optimizer "
        "after the model is on its device, and save the model's own state with it.",
    ),
    differences=(
        "The paper says that clipping keeps the estimate unbiased. It keeps its direction and makes it shorter: with Gaussian directions "
        "and a linear loss the mean is P(|z . g| <= C) g.",
        "The published code turns a NaN into -C, a full step; here the step is skipped and counted.",
        "The published code keeps AQLM's codebooks frozen, and so does this.",
    ),
    release="no",
    auto_rank=220,
    kind="forward",
    state="none",
    trial=Trial(
        lr=2e-4, hyper={"relative": False}, steps=80, problem="tare.testing.forward_quantized:regression",
        exempt={
            "order_does_not_matter": "it finds the scales in the model, and takes nothing else",
            "shapes_of_all_kinds": "it trains scales of quantised layers only",
            "batch_statistics_are_refused": "tried on a model that is not quantised",
        },
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Named:
    """Matches leaves of these names."""

    names: frozenset[str]

    def __call__(self, leaf: Leaf) -> bool:
        return leaf.name in self.names


@register(CARD)
class QZO(ForwardOptimizer):
    """D <- max(D - lr clip(delta, C) z, floor) for the scales D of a quantised model (arXiv 2505.13430).

    Args:
        params: the model, with quantised layers: `tare.quantize_linear_`, `tare.quantize_weights_`, torchao's, GPTQ-like ones.
        lr: learning rate.
        eps: length of the perturbation.
        clip: C, the largest derivative along a direction; None or inf: any.
        floor: the least scale after a step; None: any.
        relative: perturb and step scales by shares of themselves, D (1 + eps z). eps and lr then mean shares.
        rest: which other trainable leaves (norms, biases, embeddings) are trained jointly, by MeZO; as the patterns of a `Recipe`.
        n: directions a step. directions: `gaussian`, `rademacher`, or a `Law`.
        weight_decay: of the rest; names with a word of `undecayed` are passed by, and scales always.
        memory: `auto` or `forward`: layers are given perturbed scales while they run; `in-place-exact` or `in-place`.
        exchange, storage, seed, maximize, patience, on_step: as `ForwardOptimizer`.

    Raises:
        InputError: no model; nothing quantised in it, or in a way that is not known; values out of range.

    >>> import tare
    >>> net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> names = tare.quantize_linear_(net, group=4)
    >>> opt = QZO(net, lr=1e-4)
    >>> loss = opt.step(lambda: net(torch.ones(2, 16)).square().mean())
    >>> [leaf.name for leaf in opt.leaves]
    ['0.scale', '2.scale']
    """

    trains_scales = True  # of a model that is held in few bits

    shares: ClassVar[bool] = False

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-7, eps: float = 1e-3, *, clip: float | None = 100.0,
        floor: float | None = 1e-7, relative: bool = False, rest: Match | None = None, n: int = 1,
        directions: str | Law = "gaussian", undecayed: tuple[str, ...] = NO_DECAY, memory: str | Memory = "auto",
        exchange: Exchange | None = None, weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None,
    ):  # fmt: skip
        if not isinstance(params, nn.Module):
            raise InputError(
                f"params: qzo finds the scales in the model; give the model itself, not {type(params).__name__}"
            )
        self._scales = find_scales(params)
        if not self._scales:
            raise InputError(
                "params: qzo trains the scales of quantised layers, and the model has none; call tare.quantize_linear_(model) first, or "
                "use 'mezo'"
            )
        self.floor = None if floor is None else check_number("floor", floor, 0.0, inclusive=True)
        law = law_of(directions)
        ours = Named(frozenset(scale.name for scale in self._scales))
        groups: list[dict[str, Any]] = [{"params": [(s.name, s.tensor) for s in self._scales], "role": "scalar"}]
        entries: list[Any] = [(ours, Directed(Relative(law) if relative else law, Momentum(0.0), decays=False))]
        if rest is not None:
            groups += _others(params, {scale.tensor for scale in self._scales})
            entries.append((rest, Directed(law, Momentum(0.0), undecayed=undecayed)))
        if memory in ("auto", "forward"):
            memory = InForward(params, {s.tensor: [s.site] for s in self._scales if s.site is not None})
        coefficients = Plain() if clip is None or clip == math.inf else Clip(clip)
        super().__init__(
            groups, Recipe((*entries, ("*", Untouched()))), lr, probe=TwoSided(eps, check_whole("n", n, 1), coefficients=coefficients),
            memory=memory, exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed, maximize=maximize,
            patience=patience, on_step=on_step, model=params,
        )  # fmt: skip
        self.from_module = True

    def _moved(self, names: set[str] | None = None) -> list[Moved]:
        for scale in self._scales:
            if not scale.linked():
                raise InputError(
                    f"{scale.name}: the model no longer computes with the scales that the optimizer was built for; build it after the "
                    "model is loaded, cast or moved"
                )
        return super()._moved(names)

    @torch.no_grad()
    def _take(self, leaves: list[Moved], record: Record) -> None:
        super()._take(leaves, record)
        if record.moved and self.floor is not None:
            stepped = {leaf.parameter for leaf in leaves}
            for scale in self._scales:
                if scale.tensor in stepped:
                    scale.tensor.clamp_(min=self.floor)  # a NaN stays one

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for scale in self._scales:  # copied with the model, they are to share its memory again
            scale.relink()


def _others(model: nn.Module, scales: set[nn.Parameter]) -> list[dict[str, Any]]:
    """The model's float parameters that are no scales, a group for each role."""
    groups: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, p, role in named_roles(model):
        if type(p) is nn.Parameter and p.is_floating_point() and p not in scales:
            groups[role].append((name, p))
    return [{"params": named, "role": role} for role, named in groups.items()]
