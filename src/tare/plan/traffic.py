"""What ranks send each other in a step, by kind, and how long that takes over links of a stated speed: computed, never measured.

A collective over N ranks by the ring moves (N - 1) / N of its bytes over the link of every rank, an all-reduce twice that. Ranks
of one machine use the link within it. Where a group spans machines, each of its members there has a link to the outside, and they
share what goes through: the slower of the two, (link within) and (members on a machine) x (link between).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tare.plan.links import Link
from tare.plan.ranks import Ranks
from tare.plan.sharded import Piece
from tare.plan.shares import Shares, Trip
from tare.plan.units import ROOT

Group = Literal["all", "shards", "replicas"]
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # of DDP, torch's defaults


@dataclass(frozen=True)
class Message:
    """All collectives of one kind in a step. bytes: of the whole tensors. sent: over the link of each rank. group: among whom."""

    what: str
    collective: Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
    count: int
    bytes: int
    sent: int
    group: Group


def message(
    what: str, collective: str, count: int, size: int, members: int, group: Group, each: int | None = None
) -> Message:
    """A message of `size` bytes in all. each: bytes that a rank has to send where that is not the whole size: an all-to-all."""
    times = 2 if collective == "all-reduce" else 1
    sent = times * (each if each is not None else size) * (members - 1) // members
    return Message(what, collective, count, size, sent, group)  # type: ignore[arg-type]


def ddp_traffic(gradients: list[int], ranks: Ranks, alone: bool = False, times: int = 1) -> list[Message]:
    """Of whole models: nothing but gradients, which are then whole on all ranks.

    Args:
        gradients: bytes of each, in the order of backward. alone: each is sent by itself. times: how often in a step.
    """
    count = len(gradients) if alone else buckets(gradients)
    return _some([message("gradients", "all-reduce", times * count, times * sum(gradients), ranks.gpus, "all")])


def fsdp_traffic(
    of: Mapping[int, Piece], shares: Shares, ranks: Ranks, accumulate: int, each: bool, norms: int
) -> list[Message]:
    """Of weights that are cut.

    Args:
        of: the units. shares: of the optimizer.
        accumulate: micro-batches of a step; each: whether gradients are reduced after every one.
        norms: gradients whose norms are summed for clipping, by one message.
    """
    cut, replicas, units = ranks.cut, ranks.replicas, len([n for n in of if n != ROOT])
    weights = sum(p.whole for p in of.values()) + sum(p.whole for n, p in of.items() if n != ROOT)
    reductions = accumulate if each else 1
    trained = [p for p in of.values() if p.gradients]
    unreduced, sent = sum(p.unreduced for p in trained), sum(p.sent for p in trained)
    found = [
        message("weights, before forward and backward", "all-gather", accumulate * (units + len(of)), accumulate * weights, cut, "shards"),
        message("gradients", "reduce-scatter", reductions * len(trained), reductions * unreduced, cut, "shards"),
        message("shards of gradients", "all-reduce", reductions * len(trained), reductions * sent, replicas, "replicas"),
    ]  # fmt: skip
    for trip, what in (
        (shares.whole, "gradients and weights to their owners, weights back"),
        (shares.told, "sums to owners, and what they decide"),
        (
            shares.anew if shares.anew != shares.whole else Trip(),
            "gradients and weights of all, in a step that computes bases",
        ),
    ):  # in a round the owner of the largest matrix has most to receive, and then to send
        found.append(message(what, "all-to-all", trip.count, trip.bytes, cut, "shards", trip.busiest))
    found.append(message("norms of gradients", "all-reduce", 1, 8 * norms, cut, "shards"))
    return _some(found)


def _some(found: list[Message]) -> list[Message]:
    return [each for each in found if each.sent]


def buckets(gradients: list[int]) -> int:
    """All-reduces of DDP: gradients go together, in the order of backward, until there are 25 MiB of them; the first time 1 MiB."""
    count, held, limit = 0, 0, FIRST_BUCKET
    for size in gradients:
        held += size
        if held >= limit:
            count, held, limit = count + 1, 0, BUCKET
    return count + bool(held)


def speed(group: Group, ranks: Ranks, links: tuple[Link, Link]) -> float:
    """Bytes a second of each member of a group."""
    inner, outer = (link.speed for link in links)
    size = {"all": ranks.gpus, "shards": ranks.cut, "replicas": ranks.replicas}[group]
    if group == "replicas":  # neighbours in a group of replicas are `cut` ranks apart
        here = min(max(1, ranks.node // ranks.cut), size)
    else:
        here = min(ranks.node, size)
    return inner if here == size else min(inner, here * outer)


def seconds(each: Message, ranks: Ranks, links: tuple[Link, Link]) -> float:
    """How long the messages take if nothing else is on the links and no message waits for another."""
    return each.sent / speed(each.group, ranks, links)
