"""ZO2: MeZO for models that do not fit the device. Blocks come from the host one after another, and take the last step's update there."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tare.core.checks import check_whole
from tare.core.errors import InputError
from tare.core.random import make_key
from tare.core.recipe import Match
from tare.core.state import State
from tare.core.storage import Storage
from tare.methods.base_forward import NO_DECAY, forward_recipe, law_of
from tare.methods.registry import Card, Trial, register
from tare.rules.momentum import Momentum
from tare.zeroth.directions import Directed, Draw, Law
from tare.zeroth.moved import Moved
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.past import Past
from tare.zeroth.probes import TwoSided
from tare.zeroth.record import Record, Recorder
from tare.zeroth.stream import Stream, StreamReport
from tare.zeroth.stream_memory import Streamed

CARD = Card(
    key="zo2",
    title="ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU Memory",
    authors="Wang, Ren, Yang, Li, Li, Wang, Wang",
    year=2025,
    arxiv="2503.12668",
    idea="A block is brought to the device once a step: it takes the last step's update there, and both points pass it while it is.",
    axes={"directions": "Gaussian", "probe": "two-sided", "rule": "SGD, taken a step late", "memory": "block by block from the host"},
    defaults={
        "lr": "1e-7 (paper's recipe, MeZO's; code: 1e-3)", "eps": "1e-3 (paper)", "n": "1 (paper)",
        "weight_decay": "0 (code: 0.1); skips names with bias, layer_norm, layernorm (code: ln too)",
        "ahead": "1 block (paper: up to three blocks on the device)", "together": "2: both points of a direction (paper)",
    },
    presets={"*": {"lr": 1e-7}},
    limits=(
        "The host holds all weights; on the device are embeddings, norms, head and buffers, two blocks, and a module's perturbed copy.",
        "SGD only: a rule with moments would move them along with the weights.",
        "Weights of blocks are a step behind when they are read by hand between steps: call opt.flush() before. Forwards of the model, "
        "state_dict, load_state_dict, logs and saving the optimizer need no call.",
        "A weight that must be perturbed in place, or a closure whose two runs get in each other's way, costs a pass for each point.",
    ),
    differences=(
        "The code applies the pending update with the learning rate of the next step; here with that of its own step, so that the run is "
        "MeZO's bit for bit.",
        "The code never applies the last update, not before evaluation nor when it saves; here it is, by itself.",
        "The code takes a derivative of zero for nothing pending, and skips weight decay with it.",
        "The code casts weights down to the host's precision by rounding to nearest, where small updates are lost, and computes with what "
        "it had before; here low-bit transfer rounds at random, and the forward sees what is kept.",
        "The code perturbs the weights that it moves, +eps, -2 eps, +eps; here a module's copy is perturbed and nothing drifts.",
        "Tied embeddings are perturbed as one weight; the code draws twice for them.",
        "The code declares every model anew, and needs modules registered as they run; here hooks find the blocks of any model.",
    ),
    release="no",
    auto_rank=205,
    kind="forward",
    state="none",
    trial=Trial(
        hyper={"device": "cpu"},
        problem="tare.testing.blocks:regression",
        exempt={
            "order_does_not_matter": "it finds the blocks in the model, and takes nothing else",
            "shapes_of_all_kinds": "tried on a model without a list of blocks",
        },
    ),
)  # fmt: skip


@register(CARD)
class ZO2(ForwardOptimizer):
    """W <- W - lr (delta z + wd W), as `MeZO`, with the blocks of the model on the host (arXiv 2503.12668).

    Args:
        params: the model that the closure runs.
        lr: learning rate.
        eps: length of the perturbation.
        n: directions a step; their estimates are averaged, or summed where `mean` is False.
        directions: `gaussian`, `rademacher`, or a `Law` that neither reads weights nor keeps state.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        undecayed: words of names that weight decay passes by.
        blocks: names of the lists of blocks; None: the largest `nn.ModuleList` of modules of one class.
        device: where blocks are brought to: `cuda`, or `cpu`, which only counts bytes; None: CUDA where there is one.
        budget: bytes of weights that may be on the device; None: as many as a GPU has.
        ahead: blocks that are brought while one computes; fewer where the budget is short.
        together: points that pass a block while it is there; 1: every point takes a pass of its own.
        transfer: how matrices of blocks are kept on the host and moved: `exact`, or `bf16`, `fp16`, `fp8`, `int8`, rounded at random after
            each step, which is no longer MeZO's run but has its mean.
        weight_decay, storage, seed, maximize, patience, on_step: as `ForwardOptimizer`; weights as they are or rounded stochastically.

    Raises:
        InputError: no model, or one without a list of blocks; blocks that share weights; a device too small; values out of range.

    >>> net = nn.Module()
    >>> net.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    >>> opt = ZO2(net, lr=1e-2, device="cpu", budget=4 * (3 * 72))
    >>> def closure():
    ...     x = torch.ones(2, 8)
    ...     for layer in net.layers:
    ...         x = layer(x).tanh()
    ...     return x.square().mean()
    >>> losses = [opt.step(closure) for _ in range(3)]
    >>> opt.stream_report().moves, opt.stream_report().brought
    (4, 1152)
    """

    shares: ClassVar[bool] = False

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-7, eps: float = 1e-3, *, n: int = 1, mean: bool = True,
        directions: str | Law = "gaussian", targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY,
        blocks: str | Sequence[str] | None = None, device: str | None = None, budget: int | None = None, ahead: int = 1,
        together: int = 2, transfer: str = "exact", weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None,
        seed: int = 0, maximize: bool = False, patience: int = 10, on_step: Recorder | None = None,
    ):  # fmt: skip
        if not isinstance(params, nn.Module):
            raise InputError(
                f"params: zo2 finds the blocks in the model; give the model itself, not {type(params).__name__}"
            )
        check_whole("ahead", ahead, 0)
        check_whole("together", together, 1)
        if budget is not None:
            check_whole("budget", budget, 1)
        law = law_of(directions)
        probe = TwoSided(eps, check_whole("n", n, 1), mean)
        self.stream = Stream(params, blocks, device=device, budget=budget, ahead=ahead, transfer=transfer)
        self._delays = True
        try:
            super().__init__(
                params, forward_recipe(law, Momentum(0.0), targets, undecayed), lr, probe=probe,
                memory=Streamed(self.stream, together), weight_decay=weight_decay, storage=storage, seed=seed, maximize=maximize,
                patience=patience, on_step=on_step,
            )  # fmt: skip
            self._check_streamed(law)
        except Exception:
            self.stream.detach()
            raise
        self.stream.pay = self._pay

    def _check_streamed(self, law: Law) -> None:
        """Nothing but weights comes and goes."""
        if self.storage.weight not in ("plain", "stochastic"):
            raise InputError(
                f"storage.weight: {self.storage.weight!r} keeps something beside the weight, which is not streamed; use 'plain' or "
                "'stochastic'"
            )
        kept = [entry.leaf.name for entry in self._entries.values() if entry.slots]
        if law.reads_weight or kept:
            raise InputError(
                f"directions: {law.describe()} ones depend on weights or state, and weights of blocks are a step behind; use 'mezo'"
            )

    # -- updates that are put off --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        self.stream.count()

    def _step_leaf(self, leaf: Moved, record: Record, past: Past | None) -> None:
        p = leaf.parameter
        if self._delays and p in self.stream.streamed and p not in self.memory.elsewhere:  # type: ignore[attr-defined]
            self.stream.owed.setdefault(p, []).append(record)
        else:
            super()._step_leaf(leaf, record, past)

    @torch.no_grad()
    def _pay(self, p: Tensor, record: Record) -> int:
        """Take a step that a leaf has been owed, with the rates of its own step."""
        entry = self._entries[p]
        assert isinstance(entry.transform, Directed)
        group, number = entry.group, next(i for i, g in enumerate(self.param_groups) if g is entry.group)
        rates, seed = (group["lr"], group["weight_decay"]), int(group["seed"])
        state = State(self._raw(p, entry), entry.slots)
        leaf = Moved(p, entry.transform, state, lambda member: Draw(entry.leaf, entry.key, seed, record.step, member))
        try:
            group["lr"], group["weight_decay"] = record.rates[number]
            super()._step_leaf(leaf, record, None)
        finally:
            group["lr"], group["weight_decay"] = rates
        return make_key(seed, f"{entry.key}/transfer", record.step)

    def flush(self) -> None:
        """Take all updates that are put off: afterwards every weight is that of MeZO after as many steps."""
        self.stream.flush()

    def replay(self, record: Record) -> None:
        """As `ForwardOptimizer.replay`, and at once: on the host, where weights travel as they are."""
        self.flush()
        self._delays = bool(self.stream.codes)
        try:
            super().replay(record)
            self.flush()
        finally:
            self._delays = True

    def state_dict(self) -> dict[str, Any]:
        """As in torch, of weights that are up to date."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, after the updates that are put off."""
        self.flush()
        super().load_state_dict(state_dict)

    def close(self) -> None:
        """Flush, and take the hooks off the model, whose blocks stay on the host."""
        self.flush()
        self.stream.detach()
        super().close()

    def stream_report(self) -> StreamReport:
        """What has been moved, and the peak on the device."""
        return self.stream.report()

    def explain(self, every_leaf: bool = False) -> str:
        """As `ForwardOptimizer.explain`, and the stream's report."""
        return f"{super().explain(every_leaf)}\nstream: {self.stream_report()}"
