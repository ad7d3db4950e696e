"""Release with micro-batches: what is kept between them, and the moments that follow from it.

A leaf keeps its projected gradient where its method sums those, and its whole gradient where it does not or where a refresh of
its basis is due at the end of the step. The first step refreshes every basis.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from tare.plan.activations import Moment, StepProfile
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
        return max((self.forward, self.backward, self.step), key=lambda moment: moment.total)


def ordinary(profile: StepProfile, cost: StepCost) -> Micro:
    """No refresh is due."""
    return micro(profile, cost, ())


def first(profile: StepProfile, cost: StepCost) -> Micro:
    """Every basis is computed."""
    return micro(profile, cost, cost.parts)


def later_refresh(profile: StepProfile, cost: StepCost) -> Micro:
    """The highest of the later refreshes: of all leaves that have their turn at the same update."""
    turns = sorted(set(cost.turns.values()))
    found = [micro(profile, cost, [name for name in cost.parts if cost.turns[name] == turn]) for turn in turns]
    return max(found, key=lambda step: step.highest.total)


def measuring(profile: StepProfile) -> Moment:
    """The measuring pass of two-pass clipping: the sum of whole gradients, whatever the method."""
    moments = (profile.forward, profile.released)
    return max((_keeping(moment, profile.gradients) for moment in moments), key=lambda moment: moment.total)


def micro(profile: StepProfile, cost: StepCost, due: Collection[str]) -> Micro:
    """A step in which the leaves `due` compute their basis."""
    due = set(due)
    kept = {leaf.name: leaf.gradient for leaf in profile.leaves}
    kept.update({name: size for name, size in cost.parts.items() if name not in due})
    total = left = sum(kept.values())
    backward, step = [_keeping(profile.released, total)], [Moment()]
    for leaf in profile.leaves:  # in the order of backward: those stepped in the last one have nothing left
        if leaf.name in cost.parts and leaf.name not in due:
            backward.append(_keeping(leaf.others, total, cost.gather[leaf.name]))
        temporaries = (cost.refresh if leaf.name in due else cost.ordinary).get(leaf.name, 0)
        step.append(_keeping(leaf.others, left, temporaries))
        left -= kept[leaf.name]
    return Micro(_keeping(profile.forward, total), _highest(backward), _highest(step))


def _keeping(moment: Moment, gradients: int, temporaries: int = 0) -> Moment:
    return dataclasses.replace(moment, gradients=gradients, temporaries=moment.temporaries + temporaries)


def _highest(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)
