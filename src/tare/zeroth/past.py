"""Past: which directions former steps took, and how far: what rules without moments compute them from."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tare.zeroth.assembly import Assembly
from tare.zeroth.moved import Moved
from tare.zeroth.probes import Term
from tare.zeroth.record import Record

Forget = Callable[
    [float, float], float
]  # (what is kept of older steps, sum of the squares of one's coefficients) -> with that one
OLDER = -1  # in the column of steps


class Past:
    """Terms of former steps in a tensor [rows, 3] of step, member, coefficient; a step without terms has one row of member -1.

    A first row of step -1 is for the steps before them: their number, and what `forget` keeps of their squares.

    last: steps that are wanted; None: all. forget: None where older ones are just left out.
    """

    def __init__(self, rows: Tensor, last: int | None, forget: Forget | None = None):
        self.last, self.forget = last, forget
        self.older: tuple[int, float] = (0, 0.0)
        self.steps: list[tuple[int, list[Term]]] = []
        for step, member, coefficient in rows.tolist():
            if step == OLDER:
                self.older = (int(member), coefficient)
                continue
            if not self.steps or self.steps[-1][0] != int(step):
                self.steps.append((int(step), []))
            if member >= 0:
                self.steps[-1][1].append(Term(int(member), coefficient))

    @staticmethod
    def nothing() -> Tensor:
        """Rows before the first step."""
        return torch.zeros(0, 3, dtype=torch.float64)

    def of(self, leaf: Moved, sign: float) -> "Former":
        """`Step.past` of a leaf; sign: -1 where the optimizer ascends."""
        return Former(self, leaf, sign)

    def before(self, most: int | None) -> tuple[int, float]:
        """How many steps lie before the last `most`, and what is kept of them."""
        number, kept = self.older
        for _, terms in self.steps[: 0 if most is None else max(0, len(self.steps) - most)]:
            number += 1
            if self.forget is not None:
                kept = self.forget(kept, sum(term.coefficient**2 for term in terms))
        return number, kept

    def after(self, record: Record) -> Tensor:
        """The rows with one more step, and without those that nobody will ask for."""
        self.steps.append((record.step, list(record.terms)))
        self.older = self.before(self.last)
        if self.last is not None:
            self.steps = self.steps[max(0, len(self.steps) - self.last) :]
        rows = [(OLDER, *self.older)] if self.forget is not None and self.older[0] else []
        for step, terms in self.steps:
            rows += [(step, term.member, term.coefficient) for term in terms] or [(step, -1, 0.0)]
        return torch.tensor(rows, dtype=torch.float64).view(-1, 3)


class Former:
    """`core.transform.Former` of one leaf."""

    def __init__(self, past: Past, leaf: Moved, sign: float):
        self._past, self._leaf, self._sign = past, leaf, sign
        self.latest = past.steps[-1][0] if past.steps else -1

    def __call__(self, start: int, stop: int, since: int = 0, most: int | None = None) -> Iterator[Tensor]:
        steps = self._past.steps
        for step, terms in steps if most is None else steps[max(0, len(steps) - most) :]:
            if step >= since:
                signed = [Term(term.member, self._sign * term.coefficient) for term in terms]
                yield Assembly(self._leaf, signed, step=step)(start, stop)

    def older(self, most: int | None) -> tuple[int, float]:
        number, kept = self._past.before(most)
        gain = self._leaf.directed.law.update(self._leaf.draw(0).leaf, self._leaf.state)
        return number, kept * gain**2
