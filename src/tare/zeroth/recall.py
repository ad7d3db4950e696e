"""Recall: a rule without its moments. They are computed anew at every step from the directions of former steps, which are drawn again.

MeZO (arXiv 2305.17333, section 2.2) notes that momentum and Adam need only the history of scalars; its code keeps dense moments.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from tare.core.checks import check_number, check_whole
from tare.core.delta import Delta
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State, allocate
from tare.core.storage import Slot, Storage
from tare.core.transform import StateSpec, Step, Transform
from tare.rules.adam import Adam
from tare.zeroth.record import STEPS

FROM, LAST = (
    "recall_from",
    "recall_last",
)  # in the state: steps of the run, since when the leaf is stepped every time, and when last


@dataclass(frozen=True)
class Recall(Transform):
    """`rule`, run from nothing over the last `last` updates (None: all) at every step: no moment is kept, and `last` directions are drawn.

    With None the numbers are those of `rule` with its moments kept, bit for bit. With a number it is the rule as if it had begun that
    many updates ago: its bias correction counts from there. What the rule reads of learning rates and betas is that of the present step.
    A leaf that was frozen for a while begins anew.

    tail: of updates before the last ones Adam's second moment gets their mean over directions, one number for all elements: entries of
    directions have mean square 1, and a mean over 1 / (1 - beta2) of them is near it (3 % for 0.999). So few updates are enough, as many
    as the first moment needs. # differs from the paper, which sums over all.

    >>> from tare.rules.adam import Adam
    >>> Recall(Adam(), 100).describe()
    'adam by recall of 100'
    """

    rule: Transform
    last: int | None = None
    tail: bool = False

    def __post_init__(self) -> None:
        if self.last is not None:
            check_whole("last", self.last, 1)
        if self.rule.sharding != "elementwise":
            raise InputError(
                f"recall: {self.rule.describe()} is not element-wise; only such rules can do without their moments"
            )
        if self.tail and not isinstance(self.rule, Adam):
            raise InputError(
                f"recall: a tail is of Adam's second moment; {self.rule.describe()} has none; use tail=False"
            )

    @property
    def recalls(self) -> int | None:  # type: ignore[override]
        """Former updates: this one is the last of `last`."""
        return None if self.last is None else self.last - 1

    def forget(self, kept: float, square: float) -> float:
        """The second moment of older updates, with one more whose gradient has that mean square."""
        assert isinstance(self.rule, Adam)
        beta = self.rule.betas[1]
        return beta * kept + (1.0 - beta) * square

    @property
    def rate(self) -> float:  # type: ignore[override]
        return self.rule.rate

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return self.rule.workspace + 4.0  # two moments at most, a former gradient, and what it is added up in

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {FROM: StateSpec((), "count"), LAST: StateSpec((), "count", init=-1)}

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        assert step.past is not None
        window = state.window or slice(0, step.leaf.numel)
        now, moments = int(step.options[STEPS]), self._moments(grad, step)
        if state[LAST] not in (step.past.latest, now):
            state[FROM] = now
        state[LAST] = now
        count = 1
        if self.tail and state[FROM] == 0:
            number, second = step.past.older(self.recalls)
            moments["exp_avg_sq"].fill_(second)
            count += number
        for g in step.past(window.start, window.stop, since=state[FROM], most=self.recalls):
            self.rule.update(g.view_as(grad), moments, step.since(count))
            count += 1
        return self.rule.update(grad, moments, step.since(count))

    def _moments(self, grad: Tensor, step: Step) -> State:
        """State of the rule for the elements of `grad`, from nothing."""
        piece = Leaf(step.leaf.name, tuple(grad.shape), grad.dtype, step.leaf.role)
        slots: dict[str, Slot] = Storage().slots(piece, self.rule.spec(piece))
        return State(allocate(slots, grad.device), slots)

    def describe(self) -> str:
        number = "all" if self.last is None else self.last
        return f"{self.rule.describe()} by recall of {number}{' and a mean' if self.tail and self.last else ''}"


def updates_until(beta: float, tolerance: float) -> int | None:
    """The smallest number of updates after which a weight of beta^number is below the tolerance; None where it never is.

    >>> updates_until(0.9, 1e-3), updates_until(0.9, 0.0)
    (66, None)
    """
    check_number("tolerance", tolerance, 0.0, inclusive=True, below=1.0)
    if tolerance == 0.0 or beta >= 1.0:
        return None
    if beta == 0.0:
        return 1
    number = max(1, math.floor(math.log(tolerance) / math.log(beta)))
    while beta**number >= tolerance:
        number += 1
    return number
