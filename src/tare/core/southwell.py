"""Greedy orders: the block from which most is to be gained (Nutini, Laradji, Schmidt 2022, "Let's Make Block Coordinate Descent
Converge Faster", JMLR, arXiv 1712.08859).

The four rules as pure functions of gradients, and `Greedy`, which needs two numbers of each leaf: one for the size of its gradient,
one for its curvature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.errors import InputError
from tare.core.orders import Order, Turn
from tare.core.transform import StateSpec

Rule = Literal["gs", "gsl"]
_BLOCK = 1 << 16  # elements summed at once, so that no product is of the gradient's size
SIZE, CURVE = "block_size", "block_curve"  # names in the state


# -- the rules: the score of a block with gradient g; the block of the largest is chosen ---------------------------------------


def gs(g: Tensor, norm: int = 2) -> float:
    """Gauss-Southwell: |g|^2 (paper, norm 2), or sum |g| (the published code, norm 1)."""
    return float(g.square().sum()) if norm == 2 else float(g.abs().sum())


def gsl(g: Tensor, lipschitz: float, norm: int = 2) -> float:
    """Gauss-Southwell-Lipschitz: |g|^2 / L, twice the decrease that a step of 1/L promises; code: sum |g| / sqrt(L)."""
    return gs(g, norm) / (lipschitz if norm == 2 else lipschitz**0.5)


def gsd(g: Tensor, lipschitz: Tensor, norm: int = 2) -> float:
    """Gauss-Southwell-diagonal: sum g_i^2 / L_i with a constant of each coordinate; code: sum |g_i| / sqrt(L_i)."""
    return float((g.square() / lipschitz).sum()) if norm == 2 else float((g.abs() / lipschitz.sqrt()).sum())


def gsq(g: Tensor, hessian: Tensor) -> float:
    """Gauss-Southwell-quadratic: g^T M^-1 g, twice the exact decrease where M is the block's Hessian."""
    return float(g @ torch.linalg.solve(hessian, g))


# -- the order ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Greedy(Order):
    """The blocks with the largest scores; with probability `epsilon` a random one in the place of each.

    Scores are averages over updates of a block's leaves while they have gradients; a leaf that has none keeps its last score (that
    of its last turn). A block of which nothing is known comes first, in random order, so every block is seen once before scores
    decide. Where `rule` is gsl, L_b is the root of the norm of the second moment, (sum g_i^4)^(1/4), unless given: it has no
    scale of its own, so that blocks are compared by how evenly large their gradients are.

    Args:
        rule: `gsl`, or `gs` without curvature.
        norm: 2 (paper: squared norms over L) or 1 (the published code: sums of |g| over sqrt(L)).
        epsilon: share of random choices, so that no block starves.
        beta: of the averages.
        curvature: L_b by the name of the block, in the place of the estimate. All blocks, then.
    """

    rule: Rule = "gsl"
    norm: Literal[1, 2] = 2
    epsilon: float = 0.1
    beta: float = 0.9
    curvature: Mapping[str, float] = field(default_factory=dict)
    scored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("greedy rule", self.rule, ("gs", "gsl"))
        if self.norm not in (1, 2):
            raise InputError(f"greedy norm: {self.norm!r}; expected 2 (the paper) or 1 (its code)")
        check_number("greedy epsilon", self.epsilon, 0.0, inclusive=True)
        check_number("greedy beta", self.beta, 0.0, inclusive=True, below=1.0)
        for name, value in self.curvature.items():
            check_number(f"curvature of {name}", value)

    @property
    def _estimates(self) -> bool:
        return self.rule == "gsl" and not self.curvature

    def spec(self) -> dict[str, StateSpec]:
        names = (SIZE, CURVE) if self._estimates else (SIZE,)
        return {name: StateSpec((), "exact", init=-1.0) for name in names}  # below zero: nothing known

    def observe(self, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        size, fourth = _sums(grad, self.norm)
        self._average(state[SIZE], size)
        if self._estimates:
            self._average(state[CURVE], fourth.sqrt())

    def _average(self, kept: Tensor, new: Tensor) -> None:
        """kept <- beta kept + (1 - beta) new, or new where nothing was known; a number that is not finite is passed over."""
        new = new.to(kept.dtype)
        new = torch.where(kept < 0.0, new, torch.lerp(new, kept, self.beta))
        kept.copy_(torch.where(new.isfinite(), new, kept))

    def score(self, block: str, states: Sequence[Mapping[str, Tensor]]) -> float | None:
        sizes = [float(state[SIZE]) for state in states]
        known = [size for size in sizes if size >= 0.0]
        if not known:
            return None
        total = sum(known)
        if self.rule == "gs":
            return total
        if self.curvature:
            if block not in self.curvature:
                raise InputError(f"curvature: no L is given for block {block!r}; given: {', '.join(self.curvature)}")
            bound = self.curvature[block]
        else:  # norms over blocks: roots of sums of squares
            bound = sum(float(state[CURVE]) ** 2 for state in states if float(state[CURVE]) >= 0.0) ** 0.25
        return total / (bound if self.norm == 2 else bound**0.5) if bound > 0.0 else 0.0

    def select(self, turn: Turn) -> list[int]:
        left = turn.shuffled(turn.number, "greedy")
        scores = turn.scores or (None,) * len(turn.names)
        best = sorted(left, key=lambda b: float("-inf") if (known := scores[b]) is None else -known)
        chosen: list[int] = []
        for slot in range(turn.count):
            coin = turn.key(f"coin {slot}", turn.number) / 2.0**64
            pick = next(b for b in (left if coin < self.epsilon else best) if b not in chosen)
            chosen.append(pick)
        return chosen

    def describe(self) -> str:
        return f"greedy ({self.rule})"


def _sums(grad: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    """(sum |g|^norm, sum g^4) as 0-d tensors of float64, by pieces."""
    size = torch.zeros((), dtype=torch.float64, device=grad.device)
    fourth = torch.zeros_like(size)
    flat = grad.view(-1) if grad.is_contiguous() else grad.reshape(-1)
    for piece in flat.split(_BLOCK):
        squares = piece.to(torch.float64).square_() if piece.dtype != torch.float64 else piece.square()
        size += squares.sum() if norm == 2 else piece.abs().sum(dtype=torch.float64)
        fourth += torch.dot(squares, squares)
    return size, fourth
