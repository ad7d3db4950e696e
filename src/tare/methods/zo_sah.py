"""ZO-SAH: second-order steps from losses alone, in random two-dimensional planes."""

from typing import Any

from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.methods.base_forward import NO_DECAY, forward_recipe, law_of
from tare.methods.registry import Card, Trial, register
from tare.rules.momentum import Momentum
from tare.zeroth.directions import Law
from tare.zeroth.exchange import Exchange
from tare.zeroth.memory import Memory
from tare.zeroth.planes import Held, PlaneOptimizer, Planes
from tare.zeroth.record import Recorder

CARD = Card(
    key="zo-sah",
    title="Subspace-based Approximate Hessian Method for Zeroth-Order Optimization",
    authors="Kim and others",
    year=2025,
    arxiv="2507.06125",
    idea="Newton steps in random planes: the 2 x 2 curvature of each is read off a quadratic fitted to six losses.",
    axes={"directions": "Gaussian, made orthonormal", "probe": "quadratic fits in planes", "rule": "SGD", "memory": "in forward"},
    defaults={
        "lr": "1.0 (ours): a whole Newton step", "planes": "4 (ours)", "eps": "1e-2 (ours)", "period": "1 (ours)", "ridge": "1e-9 (ours)",
        "eigen_floor": "1e-2 of the larger (ours)", "cap": "1.0 (ours)", "reuse": "False (ours; paper: reused)",
    },
    presets={"*": {"lr": 1.0}},
    limits=(
        "Steps of planes are summed: twice the planes go twice as far.",
        "Curvature is a difference of differences: at eps 1e-2 an fp32 loss gives it to about 1e-3 of the loss; return it in float64.",
        "Values of different batches cannot be fitted together: reuse=True asks for one batch during a period, and takes one plane.",
        "Every evaluation draws up to 2 planes directions.",
    ),
    differences=(
        "The paper's full text could not be read, and no code was found: the period, the points of the fit, its regulariser, the floor and "
        "the cap are ours, and checked against traces of our own equations.",
        "The forward differences of the step are not those of the fit, as in the paper's summary.",
    ),
    release="no",
    auto_rank=300,
    kind="forward",
    state="none",
    trial=Trial(lr=1.0, hyper={"planes": 2, "cap": 0.5}, steps=30),
)  # fmt: skip


@register(CARD)
class ZOSAH(PlaneOptimizer):
    """W <- W - lr sum_j P_j^T |H_j|^-1 g_j over orthonormal planes P_j; g_j and H_j from six losses each (arXiv 2507.06125).

    Args:
        params: the model that the closure runs (preferred), or what `tare.Optimizer` takes.
        lr: 1 is a Newton step in every plane.
        planes: how many; 5 evaluations each, and one at theta.
        eps: how far points stand off.
        period: steps that planes stay; 0: for good.
        curvature: False: plain descent in the planes, H = 1; 2 evaluations each.
        reuse: former values in the plane take part in the fit; planes=1, and the same batch for a period. See the limits.
        ridge, eigen_floor, cap: of the fit, of the eigenvalues, of the longest step of a plane; see `zeroth.planes.Planes`.
        extra: further points of the fit by step and plane; for traces.
        directions: `gaussian`, `rademacher`, or a `Law`; planes are made orthonormal of 2 planes directions.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        undecayed, memory, exchange, weight_decay, storage, seed, maximize, patience, on_step, model: as `MeZO` and `ForwardOptimizer`.

    Raises:
        InputError: values out of range, or choices that exclude one another.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1, bias=False).double()
    >>> opt = ZOSAH(net, planes=1, cap=None)
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    >>> loss = [opt.step(lambda: (net(x) - 1).square().sum()) for _ in range(3)]
    >>> loss[-1] < 0.05  # as far as forward differences see
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, *, planes: int = 4, eps: float = 1e-2, period: int = 1, curvature: bool = True,
        reuse: bool = False, ridge: float = 1e-9, eigen_floor: float = 1e-2, cap: float | None = 1.0, extra: Any = None,
        directions: str | Law = "gaussian", targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY, memory: str | Memory = "auto",
        exchange: Exchange | None = None, weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        probe = Planes(planes, eps, curvature, ridge, eigen_floor, cap, reuse, period, bool(maximize), extra)
        law = law_of(directions)
        if law.reads_weight:
            raise InputError(
                "directions: planes stay for a period, but these directions change with the weights; give others"
            )
        if reuse and weight_decay:
            raise InputError("reuse: decay moves the weights out of the plane; use weight_decay=0")
        super().__init__(
            params, forward_recipe(Held(law, period), Momentum(0.0), targets, undecayed), lr, probe=probe, memory=memory,
            exchange=exchange, weight_decay=weight_decay, storage=storage, seed=seed, maximize=maximize, patience=patience,
            on_step=on_step, model=model,
        )  # fmt: skip
