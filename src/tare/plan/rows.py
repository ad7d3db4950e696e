"""One line of a plan: the settings of a run and a method in, the peak by category and event out."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tare.core.storage import Storage
from tare.methods import registry
from tare.plan import rank_rows, released
from tare.plan.activations import Precision, Workload, profile_model
from tare.plan.forward import probe_profile
from tare.plan.kinds import Kind
from tare.plan.links import Link
from tare.plan.models import full
from tare.plan.profile import Moment, StepProfile
from tare.plan.rank_rows import Event, OfRanks, Rank, RankMoments
from tare.plan.ranks import Ranks
from tare.plan.resolve import Choice, applicable, resolve
from tare.plan.shares import Share
from tare.plan.steps import StepCost, accumulation_refused, step_cost

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tare.plan.shapes import ModelShape


@dataclass(frozen=True)
class Settings:
    """Everything but the method that decides about memory."""

    config: "PretrainedConfig | ModelShape"
    name: str  # of the model, for presets and titles
    batch: int
    seq: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    precision: Precision = "fp32"
    checkpointing: bool = False
    release: bool = False
    accumulate: int = 1
    clip_mode: Literal["exact", "previous", "two-pass"] = "exact"  # with release: how the norm is had, if it is clipped
    storage: dict[str, Any] | Storage | None = None
    hyper: dict[str, Any] = field(default_factory=dict)
    clip_parts: int = 1  # measuring passes of two-pass clipping
    bases: released.Bases = field(default_factory=released.Bases)  # with release and micro-batches: what they come from
    alone: bool = True  # whether one method is planned, to which all of `hyper` is meant
    work: Workload | None = None  # what the model is fed, if not packed text
    ranks: Ranks | None = (
        None  # the processes that share the work; `batch` is what one of them is fed. None: one by itself
    )
    links: tuple[Link, Link] | None = None  # within and between machines
    follow: bool = True  # whether torch's engine may be followed where arithmetic gives the same

    def profile(self, quantized: bool = False, trained: tuple[str, ...] | None = None) -> StepProfile:
        """Weights, activations and gradients of a micro-batch. quantized: linear weights are int8. trained: the names of what has
        gradients, if not all."""
        return profile_model(
            self.config,
            self.batch,
            self.seq,
            dtype=self.dtype,
            precision=self.precision,
            checkpointing=self.checkpointing,
            quantized=quantized,
            trained=trained,
            work=self.work,
        )

    @property
    def model_config(self) -> "PretrainedConfig | ModelShape":
        """Of the model that is run: a workload may change its head."""
        return self.config if self.work is None else self.work.adapt(full(self.config))

    @property
    def model_kind(self) -> Kind:
        return "causal" if self.work is None else self.work.kind

    def choice(self, key: str) -> Choice:
        """The method with its arguments under these settings; what it has no use for is left out."""
        release = self.release and registry.card(key).release != "no"
        hyper = applicable(key, self.hyper, self.alone)
        return resolve(key, self.name, dtype=self.dtype, hyper=hyper, storage=self.storage, release=release)


@dataclass(frozen=True)
class PlanRow:
    """Bytes at the highest point of training with one method. The parts add up to `peak`."""

    method: str
    weights: int
    gradients: int
    state: int
    activations: int
    temporaries: int
    peak: int
    event: Event
    fits: bool | None  # None: no budget was given
    options: dict[str, Any]
    events: dict[str, int]  # the peak of each event
    note: str = ""  # why it cannot run at all
    remark: str = ""  # what else it costs
    gathered: int = 0  # on ranks that share weights: those that are whole for a while, and buffers
    ranks: OfRanks | None = None  # of many: this line is that of the rank that needs most


def plan_row(settings: Settings, key: str, budget: int | None = None) -> PlanRow:
    """The line of one method."""
    if registry.card(key).kind == "forward":
        return _forward_row(settings, key, budget)
    choice = settings.choice(key)
    cost = step_cost(choice, settings.model_config, settings.dtype, settings.model_kind, settings.work)
    # Where blocks of leaves take turns in having gradients: the turn that needs most.
    turns = [_turn(settings, choice, cost, trained) for trained in cost.trained or (None,)]
    found = max(turns, key=lambda turn: max(_highest(turn, share)[1].total + share.state for share, _ in turn.of))
    lines = [(share, *_highest(found, share)) for share, _ in found.of]
    ranks = [Rank(s.rank, s.state, found.weights + s.state + m.total, event) for s, event, m in lines]
    at = max(range(len(lines)), key=lambda at: ranks[at].peak)
    share, event, worst = lines[at]
    fixed = found.weights + share.state
    note = _objection(settings, key, choice)
    return PlanRow(
        method=key,
        weights=found.weights,
        gradients=worst.gradients,
        state=share.state,
        activations=worst.activations,
        temporaries=worst.temporaries,
        gathered=worst.gathered,
        peak=fixed + worst.total,
        event=event,
        fits=None if budget is None else fixed + worst.total <= budget and not note,
        options=shown_options(choice),
        events={name: fixed + moment.total for name, moment in found.of[at][1].items()},
        note=note,
        remark="; ".join(_remarks(settings, cost)),
        ranks=rank_rows.tell(settings, ranks[0], ranks[at], found) if settings.ranks is not None else None,
    )


def _turn(settings: Settings, choice: Choice, cost: StepCost, trained: tuple[str, ...] | None) -> RankMoments:
    """The moments of one process, or of those ranks that are looked at."""
    profile = settings.profile(choice.storage.weight == "int8" and not _cut(settings), trained)
    if _cut(settings):
        return rank_rows.cut_moments(settings, choice, cost, profile, trained)
    moments = _moments(profile, cost, settings)
    if settings.ranks is not None:
        return rank_rows.whole_moments(settings, choice, cost, profile, moments)
    return RankMoments(profile.weights, ((Share(0, cost.state), moments),))


def _highest(found: RankMoments, share: Share) -> tuple[Event, Moment]:
    moments = next(moments for each, moments in found.of if each is share)
    event = max(moments, key=lambda name: moments[name].total)
    return event, moments[event]


def _cut(settings: Settings) -> bool:
    return settings.ranks is not None and settings.ranks.sharded


def _forward_row(settings: Settings, key: str, budget: int | None) -> PlanRow:
    """The line of a method that steps without gradients: forward with a module's weights copied, and the step after it."""
    choice = settings.choice(key)
    note = (
        "" if settings.ranks is None else "makes no gradients to send: its processes share losses (--workers); plan one"
    )
    found = probe_profile(
        choice, settings.config, settings.batch, settings.seq, dtype=settings.dtype, precision=settings.precision,
        accumulate=settings.accumulate, work=settings.work,
    )  # fmt: skip
    moments: dict[Event, Moment] = {
        "perturbed forward": found.probe, "optimizer step": found.update, "evaluation": found.evaluation,
    }  # fmt: skip
    if found.first is not None:
        moments["first step"] = found.first
    event = max(moments, key=lambda name: moments[name].total)
    worst = moments[event]
    fixed = found.weights + found.state
    return PlanRow(
        method=key,
        weights=found.weights,
        gradients=0,
        state=found.state,
        activations=worst.activations,
        temporaries=worst.temporaries,
        peak=fixed + worst.total,
        event=event,
        fits=None if budget is None else fixed + worst.total <= budget and not note,
        options=shown_options(choice),
        events={name: fixed + moment.total for name, moment in moments.items()},
        note=note,
        remark=found.remark,
    )


def shown_options(choice: Choice) -> dict[str, Any]:
    """What to print beside a method: its rank, what its storage is, and whatever was not left at the default."""
    default = Storage()
    storage = {
        f"storage.{name}": value
        for name, value in dataclasses.asdict(choice.storage).items()
        if value != getattr(default, name)
    }
    known = registry.options(choice.key)
    rank = {"rank": known["rank"].default} if "rank" in known else {}
    return {"lr": choice.lr, **rank, **choice.options, **storage, **({"release": True} if choice.release else {})}


def _moments(profile: StepProfile, cost: StepCost, settings: Settings) -> dict[Event, Moment]:
    batch = 8 * settings.batch * settings.seq  # the tokens, int64, are still there when the optimizer steps
    ordinary, refresh = max(cost.ordinary.values(), default=0), max(cost.refresh.values(), default=0)
    whole = profile.gradients
    if settings.release and settings.accumulate > 1:
        return _released_moments(profile, cost, settings)
    if settings.release:
        # Each leaf is stepped at its moment in backward, when its gradient is the only finished one.
        def at(leaf_temporaries: dict[str, int]) -> Moment:
            steps = [leaf.others.plus(temporaries=leaf_temporaries.get(leaf.name, 0)) for leaf in profile.leaves]
            return max(steps, key=lambda moment: moment.total, default=Moment())

        forward, backward = profile.forward, profile.released
        step, fresh = at(cost.ordinary), at(cost.refresh)
    else:
        if settings.accumulate == 1:
            forward, backward = profile.forward, profile.backward
        else:  # the sum over earlier micro-batches is there from the start
            forward = dataclasses.replace(profile.forward, gradients=whole)
            backward = dataclasses.replace(profile.released, gradients=whole)
        step, fresh = Moment(batch, whole, ordinary), Moment(batch, whole, refresh)
    moments: dict[Event, Moment] = {"end of forward": forward, "backward": backward, "optimizer step": step}
    if cost.refresh != cost.ordinary:
        moments["refresh"] = fresh
    moments["evaluation"] = profile.evaluation
    return moments


def _released_moments(profile: StepProfile, cost: StepCost, settings: Settings) -> dict[Event, Moment]:
    usual = released.ordinary(profile, cost)
    moments: dict[Event, Moment] = {
        "end of forward": usual.forward, "backward": usual.backward, "optimizer step": usual.step,
    }  # fmt: skip
    if cost.parts:
        begin = released.first(profile, cost, settings.bases)
        refresh = released.later_refresh(profile, cost, settings.bases)
        moments["refresh"] = refresh
        if refresh != begin:
            moments["first step"] = begin
    if settings.clip_mode == "two-pass":
        moments["measuring"] = released.measuring(profile, cost, settings.clip_parts)
    moments["evaluation"] = profile.evaluation
    return moments


def _objection(settings: Settings, key: str, choice: Choice) -> str:
    """Why this method cannot run with these settings at all, or nothing."""
    if settings.release and registry.card(key).release == "no":
        return "cannot step inside backward"
    if _cut(settings) and (why := rank_rows.objection(settings, choice)):
        return why
    if not settings.release or settings.accumulate == 1:
        return ""
    if accumulation_refused(choice, settings.config, settings.dtype, False, settings.work):
        return "needs whole gradients: no --release with --accumulate"
    by_previous = settings.clip_mode == "previous"
    if accumulation_refused(choice, settings.config, settings.dtype, by_previous, settings.work):
        return "sums projected gradients, which have no whole norm: no --clip-mode previous with --accumulate"
    return ""


def _remarks(settings: Settings, cost: StepCost) -> Iterator[str]:
    """What else the settings cost or mean."""
    yield from (f"{count} matrices are stepped without a subspace: {why}" for why, count in cost.dense.items())
    if not settings.release:
        return
    many, bases = settings.accumulate > 1, settings.bases
    if settings.clip_mode == "two-pass":
        share = f"1/{settings.clip_parts} of " if settings.clip_parts > 1 else ""
        held = f", all but the last time with {share}the sum of whole gradients" if many else ""
        yield f"two-pass clipping runs every forward and backward {_times(settings.clip_parts + 1)}{held}"
    if many and set(cost.parts) - set(cost.drawn):
        if bases.source == "first":
            yield "bases come from the first micro-batch, not from the whole gradient as published"
        elif bases.parts > 1:
            yield f"a step that computes bases runs every forward and backward {_times(bases.parts)}"


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"
