"""The lines of a plan for many ranks: what one rank needs, by event and category, and what ranks send each other."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import distributed as dist

from tare.plan import traffic
from tare.plan.cache import cached
from tare.plan.models import DTYPES, full, identity
from tare.plan.onegroup import can_follow, track_shards
from tare.plan.profile import Moment, StepProfile
from tare.plan.resolve import Choice
from tare.plan.sharded import Earlier, Sharded, pieces, sharded
from tare.plan.shares import Share, refused, shares
from tare.plan.steps import StepCost, model_on_paper, on_paper

if TYPE_CHECKING:
    from tare.plan.rows import Settings

FOLLOWED = 8  # ranks up to which torch's own engine is followed; more are computed, to the same numbers


Event = Literal[
    "end of forward", "backward", "optimizer step", "refresh", "first step", "measuring", "evaluation", "perturbed forward"
]  # fmt: skip
How = Literal["followed", "computed"]


@dataclass(frozen=True)
class Rank:
    """The highest point of one rank."""

    rank: int
    state: int
    peak: int
    event: Event


@dataclass(frozen=True)
class OfRanks:
    """What a line says of ranks beside the one that needs most.

    how: `followed`: torch's engine was run on fake tensors, as rank 0 of a pretended group; `computed`: by arithmetic.
    traffic: of a step; seconds: of each of these messages, where links are given.
    """

    how: How
    first: Rank
    worst: Rank
    traffic: tuple[traffic.Message, ...]
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class RankMoments:
    """Bytes of weights; of some ranks their state and the moments of their events: the first, and the one that needs most."""

    weights: int
    of: tuple[tuple[Share, dict[Event, Moment]], ...]
    how: How = "computed"
    messages: tuple[traffic.Message, ...] = ()


def cut_moments(
    settings: "Settings", choice: Choice, cost: StepCost, profile: StepProfile, trained: tuple[str, ...] | None
) -> RankMoments:
    """Of ranks among which weights are cut; first the first, then the one that needs most."""
    ranks = settings.ranks
    assert ranks is not None
    alter = _alter(settings)
    model = model_on_paper(settings.model_config, settings.dtype, False, settings.model_kind, alter)
    of = pieces(model, ranks.cut, trained)
    earlier: Earlier = "none" if settings.accumulate == 1 else "reduced" if ranks.often else "whole"
    step = sharded(profile.stretches, of, earlier=earlier, replicas=ranks.replicas, release=settings.release)
    weights = profile.weights + sum(piece.shard - piece.weights for piece in of.values())
    how: How = "computed"
    if (
        settings.follow
        and ranks.gpus <= FOLLOWED
        and earlier == "none"
        and not settings.release
        and not dist.is_initialized()
        and can_follow()
    ):
        (weights, step), how = _followed(settings, trained), "followed"
    found = shares(on_paper(choice, settings.model_config, settings.dtype, settings.model_kind, alter), cost, ranks.cut)
    norms = sum(1 for p in model.parameters() if p.requires_grad)
    messages = traffic.fsdp_traffic(of, found, ranks, settings.accumulate, ranks.often, norms)
    both = (found.first, found.worst)
    batch = 8 * settings.batch * settings.seq
    return RankMoments(weights, tuple((each, _events(step, each, batch, cost)) for each in both), how, tuple(messages))


def _events(step: Sharded, share: Share, batch: int, cost: StepCost) -> dict[Event, Moment]:
    """Between steps a rank holds bases beside its state; where all are computed anew they have gone, and gradients come together."""
    usual: dict[Event, Moment] = {
        "end of forward": step.forward,
        "backward": step.backward,
        "evaluation": step.evaluation,
    }
    usual["optimizer step"] = Moment(batch, step.gradients, share.ordinary.temporaries, share.ordinary.gathered)
    moments = {event: moment.plus(gathered=share.held) for event, moment in usual.items()}
    if cost.refresh != cost.ordinary or share.held:
        moments["refresh"] = Moment(batch, step.gradients, share.refresh.temporaries, share.refresh.gathered)
    return moments


def _followed(settings: "Settings", trained: tuple[str, ...] | None) -> tuple[int, Sharded]:
    ranks, work = settings.ranks, settings.work
    assert ranks is not None
    what = {
        "kind": "rank", "config": identity(settings.config), "batch": settings.batch, "seq": settings.seq, "dtype": settings.dtype,
        "precision": settings.precision, "checkpointing": settings.checkpointing, "cut": ranks.cut, "replicas": ranks.replicas,
        "trained": None if trained is None else sorted(trained), "work": None if work is None else work.key(),
    }  # fmt: skip

    def follow() -> tuple[int, Sharded]:
        return track_shards(
            full(settings.config), settings.batch, settings.seq, DTYPES[settings.dtype], settings.precision, shards=ranks.cut,
            replicas=ranks.replicas, checkpointing=settings.checkpointing, trained=trained, work=work,
        )  # fmt: skip

    return cached(what, follow, lambda found: [found[0], dataclasses.asdict(found[1])], _decode)


def _decode(data: Any) -> tuple[int, Sharded]:
    weights, step = data
    moments = {name: Moment(**step[name]) for name in ("forward", "backward", "evaluation")}
    return int(weights), Sharded(**moments, gradients=int(step["gradients"]))


def whole_moments(
    settings: "Settings", choice: Choice, cost: StepCost, profile: StepProfile, moments: dict[Event, Moment]
) -> RankMoments:
    """Of ranks that hold whole models (DDP), from the moments of one process.

    Gradients are views of the buckets that are sent, which are there from the first step to the last; those of micro-batches that are not
    sent lie beside them. Where leaves step inside backward, take turns or are int8, each gradient is sent by itself, and nothing is added.
    """
    ranks = settings.ranks
    assert ranks is not None
    alone = settings.release or bool(cost.trained) or choice.storage.weight == "int8"
    found, sizes = dict(moments), [leaf.gradient for leaf in profile.leaves]
    if not alone:
        kept: dict[Event, Moment] = {
            "end of forward": profile.forward, "backward": profile.released, "evaluation": profile.evaluation
        }  # fmt: skip
        beside = 0 if settings.accumulate == 1 or ranks.often else profile.gradients
        for event, moment in kept.items():
            more = beside if event != "evaluation" else 0
            found[event] = dataclasses.replace(moment, gradients=profile.gradients + more)
    sent = traffic.ddp_traffic(sizes, ranks, alone, settings.accumulate if alone or ranks.often else 1)
    return RankMoments(profile.weights, ((Share(0, cost.state), found),), "computed", tuple(sent))


def objection(settings: "Settings", choice: Choice) -> str:
    """Why a method cannot step leaves that are cut among ranks, or nothing."""
    ranks = settings.ranks
    assert ranks is not None
    if settings.release and settings.accumulate > 1:
        return "steps in the last backward what earlier ones have reduced: no --release with --accumulate where weights are cut"
    optimizer = on_paper(choice, settings.model_config, settings.dtype, settings.model_kind, _alter(settings))
    return refused(optimizer, settings.release, ranks.cut)


def _alter(settings: "Settings") -> Any:
    return None if settings.work is None or settings.work.layers() is None else settings.work.alter


def tell(settings: "Settings", first: Rank, worst: Rank, found: RankMoments) -> OfRanks:
    """With times, where links are given."""
    ranks, links = settings.ranks, settings.links
    assert ranks is not None
    times = () if links is None else tuple(traffic.seconds(each, ranks, links) for each in found.messages)
    return OfRanks(found.how, first, worst, found.messages, times)
