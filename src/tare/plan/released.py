"""Release with micro-batches: what is kept between them, and the moments that follow from it.

A leaf keeps its projected gradient where its method sums those, and its whole gradient where it does not, or where the basis of the
step is computed from the sum of them. The first step refreshes every basis.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from tare.core.clipping import runs
from tare.core.gathering import Source, passes
from tare.plan.profile import Moment, StepProfile
from tare.plan.steps import StepCost


@dataclass(frozen=True)
class Micro:
    """The highest moments of one step on several micro-batches."""

    forward: Moment
    backward: Moment
    step: Moment

    @property
    def highest(self) -> Moment:
        """The highest of the three."""
        return _highest([self.forward, self.backward, self.step])


@dataclass(frozen=True)
class Bases:
    """What bases are computed from: see `Optimizer.refresh_release`."""

    source: Source = "sum"
    parts: int = 1


def ordinary(profile: StepProfile, cost: StepCost) -> Micro:
    """No refresh is due."""
    return micro(profile, cost)


def first(profile: StepProfile, cost: StepCost, bases: Bases) -> Moment:
    """Every basis is computed."""
    return refreshing(profile, cost, bases, cost.parts)


def later_refresh(profile: StepProfile, cost: StepCost, bases: Bases) -> Moment:
    """The highest of the later refreshes: of all leaves that have their turn at the same update."""
    turns = sorted(set(cost.turns.values()))
    return _highest(
        [refreshing(profile, cost, bases, [n for n in cost.parts if cost.turns[n] == turn]) for turn in turns]
    )


def refreshing(profile: StepProfile, cost: StepCost, bases: Bases, due: Collection[str]) -> Moment:
    """The highest moment of a step in which the leaves `due` compute their basis, in all its passes."""
    whole = {leaf.name: leaf.gradient for leaf in profile.leaves}
    early = {name for name in due if bases.source == "first" or name in cost.drawn}
    summed = [name for name in due if name in whole and name not in early]
    if not summed:
        return micro(profile, cost, early=early).highest
    projected = sum(size for name, size in whole.items() if name in cost.parts and name not in cost.drawn)
    shares = [[summed[i] for i in run] for run in passes([whole[name] for name in summed], projected, bases.parts)]
    before = [_pass(profile, cost, share) for share in shares[:-1]]
    return _highest([*before, micro(profile, cost, shares[-1], early).highest])


def measuring(profile: StepProfile, cost: StepCost, parts: int) -> Moment:
    """A measuring pass of two-pass clipping: a share of the sum of whole gradients, whatever the method."""
    sizes = {leaf.name: leaf.gradient for leaf in profile.leaves}
    order = [sizes[name] for name in cost.ordinary if name in sizes]
    held = max(sum(order[i] for i in run) for run in runs(order, parts))
    return _highest([_keeping(moment, held) for moment in (profile.forward, profile.released)])


def micro(profile: StepProfile, cost: StepCost, due: Collection[str] = (), early: Collection[str] = ()) -> Micro:
    """The pass that steps. due: leaves that compute their basis at the step, from the sum of whole gradients; early: those
    that compute it at the first micro-batch."""
    due, early = set(due), set(early)
    kept = {leaf.name: leaf.gradient for leaf in profile.leaves}
    kept.update({name: size for name, size in cost.parts.items() if name in kept and name not in due})
    total = left = sum(kept.values())
    begun = 0  # what is kept of the first micro-batch so far
    backward, step = [_keeping(profile.released, total)], [Moment()]
    for leaf in profile.leaves:  # in the order of backward: those stepped in the last one have nothing left
        if leaf.name in early:
            backward.append(_keeping(leaf.others, begun, cost.prepare[leaf.name]))
        if leaf.name in cost.parts and leaf.name not in due:
            backward.append(_keeping(leaf.others, total, cost.gather[leaf.name]))
        temporaries = (cost.refresh if leaf.name in due else cost.ordinary).get(leaf.name, 0)
        step.append(_keeping(leaf.others, left, temporaries))
        begun += kept[leaf.name]
        left -= kept[leaf.name]
    return Micro(_keeping(profile.forward, total), _highest(backward), _highest(step))


def _pass(profile: StepProfile, cost: StepCost, share: Collection[str]) -> Moment:
    """A pass that only computes the bases of a share of the leaves, in the last micro-batch, from the sum of their gradients."""
    left = sum(leaf.gradient for leaf in profile.leaves if leaf.name in share)
    moments = [_keeping(profile.forward, left), _keeping(profile.released, left)]
    for leaf in profile.leaves:
        if leaf.name in share:
            moments.append(_keeping(leaf.others, left, cost.prepare[leaf.name]))
            left -= leaf.gradient
    return _highest(moments)


def _keeping(moment: Moment, gradients: int, temporaries: int = 0) -> Moment:
    return dataclasses.replace(moment, gradients=gradients, temporaries=moment.temporaries + temporaries)


def _highest(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)
