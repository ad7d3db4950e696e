"""The memory of a rank whose weights are sharded (FSDP2), by arithmetic from the stretches of a step on one rank.

What `fully_shard` holds at each moment follows from sizes alone. Around a unit's forward and backward its weights are whole; an
all-gather has a buffer of the same size, which in forward stays until the next unit is gathered (in older torch until that is copied
out, too), and in backward is there one unit ahead; a reduce-scatter has one of the size of the unit's gradients, which stays until the
next one. The model around the units (embedding, last norm, head) is whole from its forward to the end of backward.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from tare.plan.profile import Moment, Stretch, highest
from tare.plan.units import ROOT, units


@dataclass(frozen=True)
class Piece:
    """Bytes of one unit on `shards` ranks. Rows are cut evenly and padded, so that every rank holds as much.

    weights: of the unit. shard: what a rank holds of it. gradients, reduced: of what is trained, whole and its shard. sent: that shard as
    ranks send it, in fp32.
    """

    weights: int
    shard: int
    gradients: int
    reduced: int
    sent: int
    shards: int

    @property
    def whole(self) -> int:
        """All shards together."""
        return self.shard * self.shards

    @property
    def buffer(self) -> int:
        """Of an all-gather; one rank has none."""
        return self.whole if self.shards > 1 else 0

    @property
    def unreduced(self) -> int:
        """The input of a reduce-scatter."""
        return self.sent * self.shards


def padded(shape: torch.Size | tuple[int, ...], shards: int) -> int:
    """Elements of a shard: of the rank that has most rows, which is the first.

    >>> padded((21, 4), 2), padded((3, 4), 8), padded((), 2)
    (44, 4, 1)
    """
    rows, *others = tuple(shape) or (1,)
    elements = -(-rows // shards)
    for size in others:
        elements *= size
    return elements


def pieces(model: nn.Module, shards: int, trained: Iterable[str] | None = None) -> dict[int, Piece]:
    """The sizes of the units of a model, by their numbers; trained: names of what has gradients, None for all that require them."""
    names = None if trained is None else set(trained)
    of: dict[nn.Parameter, int] = {}
    for number, (_, part) in enumerate(units(model)):
        for p in part.parameters():
            of.setdefault(p, number)
    sums: dict[int, list[int]] = {}
    for name, p in model.named_parameters():
        sizes = sums.setdefault(of.get(p, ROOT), [0, 0, 0, 0, 0])
        rows = padded(p.shape, shards)
        sizes[0] += p.numel() * p.element_size()
        sizes[1] += rows * p.element_size()
        if p.requires_grad if names is None else name in names:
            sizes[2] += p.numel() * p.element_size()
            sizes[3] += rows * p.element_size()
            sizes[4] += rows * max(p.element_size(), 4)
    return {
        number: Piece(weights, shard, gradients, reduced, sent, shards)
        for number, (weights, shard, gradients, reduced, sent) in sorted(sums.items())
    }


Earlier = Literal["none", "reduced", "whole"]


@dataclass(frozen=True)
class Sharded:
    """The highest moments of a micro-batch on one rank; gradients: the shards of all, when backward has ended."""

    forward: Moment
    backward: Moment
    evaluation: Moment
    gradients: int


def sharded(
    stretches: tuple[Stretch, ...],
    of: Mapping[int, Piece],
    *,
    earlier: Earlier = "none",
    replicas: int = 1,
    release: bool = False,
) -> Sharded:
    """The moments of a rank.

    Args:
        stretches: of a step of one rank with the batch of a rank.
        of: the sizes of the units.
        earlier: what earlier micro-batches have left: nothing, reduced gradients, or whole ones.
        replicas: groups of ranks that hold the same (HSDP).
        release: gradients are gone as soon as they are reduced.
    """
    by = {name: [s for s in stretches if s.phase == name] for name in ("forward", "backward", "evaluation")}
    total = sum(piece.reduced for piece in of.values())
    left = {"none": 0, "reduced": total, "whole": sum(piece.gradients for piece in of.values())}[earlier]
    return Sharded(
        highest([moment.plus(gradients=left) for moment in _forward(by["forward"], of)]),
        highest(list(_Backward(of, earlier, replicas, release).walk(by["backward"]))),
        highest(list(_forward(by["evaluation"], of))),
        0 if release else total,
    )


def _forward(stretches: list[Stretch], of: Mapping[int, Piece]) -> Iterator[Moment]:
    whole = kept = 0  # weights that are whole; the buffer of the last all-gather
    for stretch in stretches:
        piece = of.get(stretch.unit)
        if stretch.begins == "enter" and piece is not None:
            yield stretch.start.plus(gathered=whole + kept + piece.buffer)
            yield stretch.start.plus(gathered=whole + (kept if _kept_in_copies() else 0) + piece.buffer + piece.whole)
            whole, kept = whole + piece.whole, piece.buffer
        elif stretch.begins == "leave" and stretch.unit == ROOT:
            kept = 0
        elif stretch.begins == "leave" and piece is not None:
            whole -= piece.whole
        yield stretch.highest.plus(gathered=whole + kept)


@functools.cache
def _kept_in_copies() -> bool:
    """Whether this torch still holds the buffer of the gather before while it copies out of the next one: 2.13 does, 2.15 does not."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPCommContext
    except ImportError:
        return True
    return not hasattr(FSDPCommContext, "release_all_gather_state_for_comm_reuse")


@dataclass
class _Backward:
    """What is there at a place of backward: weights that are whole, buffers of gathers ahead, the input of the last reduce-scatter,
    what replicas have summed, gradients."""

    of: Mapping[int, Piece]
    earlier: Earlier
    replicas: int
    release: bool
    whole: int = 0
    ahead: dict[int, int] = field(default_factory=dict)
    kept: int = 0
    summed: int = 0
    gradients: int = 0

    def walk(self, stretches: list[Stretch]) -> Iterator[Moment]:
        root = self.of.get(ROOT, Piece(0, 0, 0, 0, 0, 1))
        order = [stretch.unit for stretch in stretches if stretch.begins == "enter" and stretch.unit != ROOT]
        following = dict(zip([ROOT, *order], order, strict=False))
        self.whole = root.whole
        if self.earlier != "none":
            self.gradients = sum(p.reduced if self.earlier == "reduced" else p.gradients for p in self.of.values())
        for stretch in stretches:
            piece = self.of.get(stretch.unit, root)
            if stretch.begins == "enter":
                if stretch.unit != ROOT:
                    self.ahead.setdefault(stretch.unit, piece.buffer)
                    self.whole += piece.whole
                    yield self._with(stretch.start)
                    self.ahead.pop(stretch.unit)
                if stretch.unit in following:
                    self.ahead[following[stretch.unit]] = self.of[following[stretch.unit]].buffer
            elif stretch.begins == "end" or (stretch.begins == "leave" and stretch.unit != ROOT):
                # What lies around the units comes last: its gradients are all that have not left.
                yield from self._reduce(stretch.start, piece)
                if stretch.begins == "end":
                    break
            yield self._with(stretch.highest)

    def _reduce(self, start: Moment, piece: Piece) -> Iterator[Moment]:
        """A reduce-scatter: whole gradients beside its input, then its input beside its output."""
        self.whole, self.kept = self.whole - piece.whole, piece.unreduced
        now = self._with(start)
        yield now
        gone = piece.gradients if self.earlier != "whole" else 0
        turned = piece.sent if piece.sent != piece.reduced else 0  # to the dtype of the weights
        yield now.plus(temporaries=-gone, gradients=piece.reduced, gathered=turned)
        self.summed += turned if self.replicas > 1 else 0
        if self.earlier == "whole":
            self.gradients -= piece.gradients
        if not self.release and self.earlier != "reduced":
            self.gradients += piece.reduced

    def _with(self, moment: Moment) -> Moment:
        """A moment of one rank alone as it is here; whole gradients that wait for their unit's end are on their way."""
        waiting = 0 if self.earlier == "whole" else moment.gradients  # they are added where the earlier ones are
        gathered = self.whole + sum(self.ahead.values()) + self.kept + self.summed
        return Moment(moment.activations, self.gradients, moment.temporaries + waiting, moment.gathered + gathered)
