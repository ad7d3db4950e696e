"""What a step without backpropagation needs: a forward with the weights of the running module copied, and the step that follows.

The forward of the real model runs on fake tensors under the tracker, each module making copies of its trained weights before it runs and
dropping them after it, as `zeroth.memory` does. State is the optimizer's exact account.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tare.core.write import CHUNK
from tare.plan.activations import Precision, Tokens, Workload, autocast, fake_tensors, opened, skeleton
from tare.plan.cache import cached
from tare.plan.models import DTYPES, full, identity
from tare.plan.profile import Moment
from tare.plan.resolve import Choice
from tare.plan.shapes import ModelShape
from tare.plan.steps import on_paper
from tare.plan.tracker import MemoryTracker
from tare.zeroth.directions import Directed
from tare.zeroth.memory import InForward
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.stream_memory import Streamed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A leaf that is looked through for a threshold: bytes of the counts of 16-bit digits, and for each element of the piece that is counted,
# where the digits are cut out, and where they are counted into a second table.
COUNTS, CUTTING, COUNTING = 8 * 2**16, 17, 8
GENERATOR = 2 * 5056  # torch's state of random numbers on the CPU, kept so that all probes of a step find the same
IN_PLACE = 0.12  # of the trained weights: bits that put them back exactly, at eps 1e-3; measured in tests/zeroth


@dataclass(frozen=True)
class ProbeProfile:
    """Bytes of one forward-only method on one model. probe: an evaluation of a perturbed model; update: the step after it."""

    weights: int
    state: int
    probe: Moment
    update: Moment
    evaluation: Moment
    first: Moment | None = None  # where the directions ask something of the weights before the first step
    remark: str = ""


def probe_profile(
    choice: Choice, config: "PretrainedConfig | ModelShape", batch: int, seq: int, *, dtype: Literal["fp32", "bf16"] = "fp32",
    precision: Precision = "fp32", accumulate: int = 1, work: Workload | None = None,
) -> ProbeProfile:  # fmt: skip
    """The memory of a step of a forward-only method.

    Args:
        choice: the method. config: of the model. batch, seq: sequences of a micro-batch, and their tokens.
        dtype: of the weights. precision: of the arithmetic. accumulate: micro-batches, all of which a step holds as tokens.
        work: what the model is fed; None: packed text.

    Raises:
        InputError: the method does not take the model as it is.
    """
    changed = config if work is None else work.adapt(full(config))
    kind, alter = ("causal", None) if work is None else (work.kind, work.alter)
    optimizer: Any = on_paper(choice, changed, dtype, kind, alter)  # type: ignore[arg-type]
    assert isinstance(optimizer, ForwardOptimizer)
    entries = [e for p, e in optimizer._entries.items() if isinstance(e.transform, Directed) and p.requires_grad]
    trained = [e.leaf for e in entries]
    inside = isinstance(optimizer.memory, InForward)
    names = tuple(leaf.name for leaf in trained) if inside else ()
    what = {
        "kind": "probe", "config": identity(config), "batch": batch, "seq": seq, "dtype": dtype, "precision": precision,
        "trained": sorted(names), "work": None if work is None else work.key(),
    }  # fmt: skip
    tracked = cached(
        what, lambda: _run(full(config), batch, seq, DTYPES[dtype], precision, names, work), dataclasses.asdict, _decode
    )
    size = DTYPES[dtype].itemsize
    account = optimizer.state_bytes()
    beside = 0 if inside else int(IN_PLACE * size * sum(leaf.numel for leaf in trained))
    remark = f"{optimizer.probe.evaluations:g} forward passes a step" + (
        f" and micro-batch of {accumulate}" if accumulate > 1 else ""
    )
    if isinstance(optimizer.memory, Streamed):  # on the CPU host and device are one memory
        stream = optimizer.memory.stream
        beside += sum(stream.footprint)
        there = stream.resident + stream.copies + stream.footprint[0]
        remark += f"; with the blocks on the host {there / 2**20:.2f} MiB of weights on a GPU"
    optimizer.close()
    moved: list[Any] = [e.transform for e in entries]
    largest = max((leaf.numel for leaf in trained), default=0)
    # Where law and rule cannot step in one pass, a leaf's gradient is put together in fp32: a piece at a time, or else whole.
    if all(each.law.fuses and each.proportional is not None for each in moved):
        gradient = 0
    elif all(each.law.partial and each.sharding == "elementwise" for each in moved):
        gradient = 4 * min(largest, 4 * CHUNK)
    else:
        gradient = 4 * largest
    gradient = int(gradient * max((each.workspace - 1.0 for each in moved), default=1.0))
    tokens = tracked.tokens * accumulate + GENERATOR
    step, more = Moment(tokens, 0, gradient), tokens - tracked.tokens
    reads = [leaf.numel for leaf, each in zip(trained, moved, strict=True) if each.law.reads_weight]
    piece = min(max(reads, default=0), CHUNK)
    first = Moment(tokens, 0, max(COUNTS + CUTTING * piece, 2 * COUNTS + COUNTING * piece)) if reads else None
    probe = dataclasses.replace(tracked.probe, activations=tracked.probe.activations + more)
    return ProbeProfile(
        tracked.weights, account.total + account.shared, probe.plus(temporaries=beside), step, tracked.evaluation, first, remark,
    )  # fmt: skip


@dataclass(frozen=True)
class _Tracked:
    weights: int
    tokens: int
    probe: Moment
    evaluation: Moment


def _run(
    config: "PretrainedConfig", batch: int, seq: int, dtype: torch.dtype, precision: Precision, trained: tuple[str, ...],
    work: Workload | None,
) -> _Tracked:  # fmt: skip
    with fake_tensors():
        model = skeleton(config, dtype, work).eval()
        return track_probe(model, work or Tokens(torch.zeros(batch, seq, dtype=torch.long)), set(trained), precision)


def track_probe(model: nn.Module, work: Workload, trained: set[str], precision: Precision = "fp32") -> _Tracked:
    """Track an evaluation of `model`, and one with the trained weights of each module copied while it runs."""
    tracker, batch, held, weights = opened(model, work)
    tokens = tracker.total - weights
    with tracker, torch.no_grad():
        with tracker.phase("evaluation", born="activation"), autocast(precision):
            work.look(model, held)
        with tracker.phase("probe", born="activation"), autocast(precision), _copying(model, trained, tracker):
            work.loss(model, batch)
    return _Tracked(weights, tokens, Moment.of(tracker.peak("probe")), Moment.of(tracker.peak("evaluation")))


@contextmanager
def _copying(model: nn.Module, trained: set[str], tracker: MemoryTracker) -> Iterator[None]:
    """Inside, every module holds copies of its own trained weights while its forward runs."""
    wanted = {p for name, p in model.named_parameters() if name in trained}
    held: dict[nn.Module, list[torch.Tensor]] = {}
    hooks = []

    def enter(module: nn.Module, arguments: Any) -> None:
        if module not in held:
            held[module] = [torch.empty_like(p) for p in module._parameters.values() if p is not None and p in wanted]
            tracker.mark(held[module], "temporary")

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        held.pop(module, None)

    for module in model.modules():
        if any(p is not None and p in wanted for p in module._parameters.values()):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decode(data: dict[str, Any]) -> _Tracked:
    found = _Tracked(data["weights"], data["tokens"], Moment(**data["probe"]), Moment(**data["evaluation"]))
    numbers = [found.weights, found.tokens, *dataclasses.astuple(found.probe), *dataclasses.astuple(found.evaluation)]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("damaged cache entry")
    return found
