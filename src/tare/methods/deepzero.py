"""DeepZero: training from scratch by finite differences along coordinates, few of them at a time."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from tare.core.checks import check_number
from tare.core.errors import InputError
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import law_of, pick
from tare.methods.registry import Card, Trial, register
from tare.rules.adam import Adam
from tare.rules.momentum import Momentum
from tare.zeroth.coordinates import Coordinates, CoordinateWise, Mask, RandomMask
from tare.zeroth.coordinatewise import CoordinateOptimizer, Sparing
from tare.zeroth.directions import Directed, Law, Untouched
from tare.zeroth.exchange import Exchange
from tare.zeroth.grasp import Grasp
from tare.zeroth.memory import Memory
from tare.zeroth.record import Recorder

MASKED = ("linear", "conv", "head", "expert", "embedding")

CARD = Card(
    key="deepzero",
    title="DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training",
    authors="Chen, Zhang, Jia, Diffenderfer, Liu, Parasyris, Zhang, Zhang, Kailkhura, Liu",
    year=2024,
    arxiv="2310.02025",
    idea="Finite differences along single weights, of a random few in each layer; as many as forward-only pruning scores say it needs.",
    axes={"directions": "coordinates of a random mask", "probe": "one-sided", "rule": "SGD with momentum", "memory": "in place"},
    defaults={
        "lr": "0.1 (code; 3 epochs of linear warm-up, then cosine)", "mu": "5e-3 (code)", "sparsity": "0.9 (code's README)",
        "q": "192 (code)", "mask_every": "1000 steps (code: 5 epochs, 980 steps of batch 256)", "momentum": "0.9 (code)",
        "weight_decay": "5e-4 (code), coupled, on all weights", "masked": "matrices, convolutions and embeddings (code: conv and linear)",
    },
    presets={"*": {"lr": 0.1}},
    limits=(
        "One forward pass for each active coordinate: for nets of up to some 1e5 weights, or many workers.",
        "In fp32 derivatives below about 1e-7 f / mu are noise: return the loss in float64, or give a larger mu.",
        "16-bit weights go to the nearest number at least one unit away, and the distance gone is divided by.",
        "Features are reused where the model is, or holds, an nn.Sequential. Models that draw random numbers run whole.",
    ),
    differences=(
        "The released ZO-GraSP never restores the weights between evaluations, so scoring drifts and leaves another model; here they are "
        "put back bit for bit. Its recorded run is repeated in the tests: of a net of 70 weights, 3 are kept in place of 3 others.",
        "It scales every tensor's direction to norm 1 and leaves out the factor for that, which favours small tensors; the paper's are "
        "plain, as here. Grasp(per_tensor=True) is the released estimate.",
        "It prunes by |score|; the paper by the score. Default here: |score|; Grasp(signed=True) is the paper's.",
        "It sends coordinates as float32, exact up to 2^24; workers' batch norms drift apart. Here batch norms are to be in eval mode.",
        "A layer that scoring would leave nothing of keeps one coordinate.",
    ),
    release="no",
    auto_rank=290,
    kind="forward",
    state="4 m n with momentum, and 16 bytes a leaf",
    trial=Trial(
        lr=0.1, hyper={"sparsity": 0.95, "q": 3, "mask_every": 3, "masked": "*"},
        exempt={
            "equal_losses_move_nothing_but_decay": "decay is coupled and goes through the momentum; tests/zeroth/test_deepzero.py has it",
        },
    ),
)  # fmt: skip


@register(CARD)
class DeepZero(CoordinateOptimizer):
    """g_i = (f(W + mu e_i) - f(W)) / mu on a random mask, 0 elsewhere; SGD with momentum on g + wd W (arXiv 2310.02025).

    Args:
        params: the model that the closure runs (preferred), or what `tare.Optimizer` takes.
        lr: learning rate.
        mu: how far a coordinate is moved; `lr`: by the learning rate.
        sparsity: share of all masked weights together that is left out, from 0 to below 1.
        ratios: how it is shared among layers: `grasp` (measured by ZO-GraSP, 2 (q + 1) evaluations, from the first step's loss or that of
            `score(closure)`), `uniform`, shares by the names of leaves, or a `Mask` of one's own.
        mask_every: steps after which masks are drawn anew.
        masked: leaves with a mask; as the patterns of a `Recipe`. The others are looked at whole.
        q: directions of the measurement. grasp: all its options; then `q` is not read.
        two_sided: f(W + mu e_i) - f(W - mu e_i): exact for quadratic losses, twice the evaluations.
        rule: `momentum`, `sgd`, `adam`, or a rule of `tare.rules`.
        directions: of the measurement: `gaussian`, `rademacher`, or a `Law`.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        reuse: run an `nn.Sequential` from the perturbed child on; the losses are the same, bit for bit.
        together: coordinates of one leaf in one forward; None: 64 where the closure takes members, else one. See `PopulationOptimizer`.
        memory, exchange, weight_decay, storage, seed, maximize, patience, on_step, model: as `ForwardOptimizer`; memory `auto` writes
            the one element and puts it back.

    Raises:
        InputError: values out of range, or names that no leaf has.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> opt = DeepZero(net, lr=0.1, sparsity=0.75, q=4)
    >>> x = torch.ones(2, 8)
    >>> losses = [opt.step(lambda: net(x).square().mean()) for _ in range(3)]
    >>> opt.probe.evaluations  # theta, 18 of 72 weights, and 9 biases
    28.0
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 0.1, mu: float | Literal["lr"] = 5e-3, *, sparsity: float = 0.9,
        ratios: Literal["grasp", "uniform"] | Mapping[str, float] | Mask = "grasp", mask_every: int = 1000, masked: Match = MASKED,
        q: int = 192, grasp: Grasp | None = None, two_sided: bool = False,
        rule: Literal["momentum", "sgd", "adam"] | Transform = "momentum", momentum: float = 0.9, directions: str | Law = "gaussian",
        targets: Match = "*", reuse: bool = True, together: int | None = None, memory: str | Memory = "auto",
        exchange: Exchange | None = None, weight_decay: float = 5e-4, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        check_number("sparsity", sparsity, 0.0, inclusive=True, below=1.0)
        if isinstance(ratios, str) and ratios not in ("grasp", "uniform"):
            raise InputError(
                f"Invalid ratios: {ratios!r}; expected grasp, uniform, shares by the names of leaves, or a Mask"
            )
        known = {"momentum": Momentum(momentum), "sgd": Momentum(0.0), "adam": Adam()}
        how = Grasp(q) if grasp is None else grasp
        law = law_of(directions)
        sparing, mask = None, RandomMask(mask_every, masked)
        if not isinstance(ratios, Mask):
            sparing = Sparing(sparsity, ratios, how, law)
        own = Directed(Coordinates(ratios if isinstance(ratios, Mask) else mask), pick("rule", rule, known))
        entries = ((targets, own),) if targets == "*" else ((targets, own), ("*", Untouched()))
        super().__init__(
            params, Recipe(entries, decay="l2"), lr, probe=CoordinateWise(mu, two_sided), sparing=sparing, reuse=reuse,
            together=together, memory=memory, exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed,
            maximize=maximize, patience=patience, on_step=on_step, model=model,
        )  # fmt: skip
