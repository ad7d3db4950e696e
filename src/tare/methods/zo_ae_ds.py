"""ZO-AE-DS: what stands in front of a black box is trained by backpropagation, from a gradient that is estimated at the box."""

from typing import Any, Literal

from torch import Tensor, nn

from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import NO_DECAY, forward_recipe, pick
from tare.methods.registry import Card, Trial, register
from tare.rules.adam import Adam
from tare.rules.momentum import Momentum
from tare.zeroth.cut_training import Carried, CutOptimizer
from tare.zeroth.record import Recorder

CARD = Card(
    key="zo-ae-ds",
    title="How to Robustify Black-Box ML Models? A Zeroth-Order Optimization Perspective",
    authors="Zhang, Yao, Jia, Yi, Hong, Chang, Liu",
    year=2022,
    arxiv="2203.14195",
    idea="Queries estimate the gradient at the input of a box, of each sample on its own; an encoder makes that input small; "
    "the rest is backpropagation.",
    axes={"directions": "unit sphere or coordinates at the cut, per sample", "probe": "RGE one-sided, CGE two-sided",
          "rule": "Adam behind ordinary backward", "memory": "as backpropagation in front of the box"},
    defaults={
        "lr": "1e-3 (paper: Adam for 200 epochs, then SGD)", "estimator": "rge (of BlackBox; paper: both)",
        "q": "20 (of BlackBox; paper: 20, 100, 192)", "mu": "5e-3 (of BlackBox; paper)",
        "two_sided": "cge only (of BlackBox; code. Paper: neither)", "betas": "(0.9, 0.999) (torch)", "adam_eps": "1e-8 (torch)",
    },
    presets={"*": {"lr": 1e-3}},
    limits=(
        "Not forward-only in front of the box: activations there are kept, as for any backward.",
        "The variance of rge is about d / q for a cut of d numbers a sample: put an encoder in front, and its decoder into the box.",
        "cge asks 2 d times a batch.",
        "Answers for a sample may depend on that sample only; a box that returns one number for the batch has one set of directions.",
        "The cut should be in fp32: in 16 bits mu is not much more than the gap between two numbers.",
        "For loops of one's own: what a box needs cannot be planned, and `tare train` has none.",
        "A list of numbers cannot repeat a run (SeedLog), and workers cannot share a step: its gradients are of the data.",
    ),
    differences=(
        "A general wrapper instead of a loss: `tare.zeroth.cut.BlackBox` gives its input a gradient, so the loss after it, what is in "
        "front and the rule are free. Where the box returns losses, it is the published estimate.",
        "One of the code's CGE routines averages over coordinates: d times smaller, which Adam hides. Here it is the sum.",
        "The paper's CGE is one-sided, the code's two-sided (and this one's). Its --q is ignored by CGE.",
        "The frame of forward-only methods is around one backward here: losses that are not finite skip the step, directions go by the "
        "optimizer's seed and step. BlackBox works without it, under any optimizer.",
    ),
    release="no",
    auto_rank=900,
    kind="forward",
    state="8 m n of what is in front of the box",
    trial=Trial(
        lr=1e-2,
        problem="tare.testing.forward_cut:regression",
        exempt={"a_log_replays_the_run": "gradients in front of the cut are of the data, and no list of numbers holds them"},
    ),
)  # fmt: skip


@register(CARD)
class ZOAEDS(CutOptimizer):
    """W <- W - lr rule(d<a, z>/dW), z what goes into the box, a its estimated gradient (arXiv 2203.14195).

    Wrap what can only be queried in `tare.zeroth.cut.BlackBox` and run it in the closure; `step(closure)` runs the closure once, estimates,
    goes backward and steps. The same wrapper works under any other optimizer, with `loss.backward()` as usual.

    Args:
        params: what is in front of the box: a model (in it the box may be), or what `tare.Optimizer` takes.
        lr: learning rate.
        rule: `adam`, `sgd`, `momentum`, or a rule of `tare.rules`.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        undecayed, weight_decay, storage, seed, maximize, patience, on_step, model: as `MeZO`.

    Raises:
        InputError: values out of range; a log of seeds.

    >>> import torch
    >>> from tare.zeroth.cut import BlackBox
    >>> _ = torch.manual_seed(0)
    >>> front = torch.nn.Linear(4, 2)
    >>> box = BlackBox(lambda z: (z - 1.0).square().sum(1), "cge")
    >>> opt = ZOAEDS(front, lr=0.05)
    >>> losses = [opt.step(lambda: box(front(torch.ones(8, 4))).mean()) for _ in range(60)]
    >>> losses[-1] < 0.01
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, *, rule: Literal["adam", "sgd", "momentum"] | Transform = "adam",
        momentum: float = 0.9, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, targets: Match = "*",
        undecayed: tuple[str, ...] = NO_DECAY, weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None,
        seed: int = 0, maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        known = {"adam": Adam(betas, adam_eps), "sgd": Momentum(0.0), "momentum": Momentum(momentum)}
        super().__init__(
            params, forward_recipe(Carried(), pick("rule", rule, known), targets, undecayed), lr, weight_decay=weight_decay,
            storage=storage, seed=seed, maximize=maximize, patience=patience, on_step=on_step, model=model,
        )  # fmt: skip
