"""The cut: a box that can only be queried, as a module that gradients pass. What is in front of it is trained by ordinary backpropagation.

Its backward estimates vector-Jacobian products from queries, for each sample on its own, along random directions (RGE) or coordinates
(CGE). Directions are drawn from (seed, name, step, member, element) and never kept (ZO-AE-DS, arXiv 2203.14195).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.zeroth.dice import Dice
from tare.zeroth.directions import Draw, Gaussian, Law

TINY = 1e-30


class Estimator(Protocol):
    """Along which directions a box is queried, and how the answers are weighed."""

    @property
    def mu(self) -> float:
        """How far."""
        ...

    @property
    def two_sided(self) -> bool: ...

    def count(self, d: int) -> int:
        """Directions for a cut of d numbers a sample."""
        ...

    def direction(self, draw: Draw, z: Tensor) -> Tensor:
        """Number `draw.member` of them, [B, d]. z: [B, d], in the dtype of the arithmetic."""
        ...

    def scale(self, d: int) -> float:
        """The estimate is this times the sum of (derivative along u) u."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class RGE:
    """(d / q) sum_j l'_j u_j, u_j uniform on the unit sphere; unbiased up to mu, of variance about d / q.

    Args:
        q: directions. mu: how far.
        two_sided: 2 q queries instead of q + 1, biased by mu^2 only.
        sphere: False leaves directions as long as they are drawn, and the factor is 1 / q.
        law: what is drawn; each sample's part is scaled to length 1.
    """

    q: int = 20
    mu: float = 5e-3
    two_sided: bool = False
    sphere: bool = True
    law: Law = field(default_factory=Gaussian)

    def __post_init__(self) -> None:
        check_whole("q", self.q, 1)
        check_number("mu", self.mu, 0.0)
        probe = Leaf("cut", (2, 2), torch.float32, "linear")
        if self.law.reads_weight or self.law.spec(probe):
            raise InputError(f"directions: {self.law.describe()} keep something for each leaf, and a cut has none")

    def count(self, d: int) -> int:
        return self.q

    def direction(self, draw: Draw, z: Tensor) -> Tensor:
        u = self.law.draw(draw, State({}, {}), z).to(z.dtype).view_as(z)
        return u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min(TINY) if self.sphere else u

    def scale(self, d: int) -> float:
        return (d if self.sphere else 1.0) / self.q

    def describe(self) -> str:
        return f"{'two' if self.two_sided else 'one'}-sided along {self.q} {'unit ' if self.sphere else ''}directions, mu {self.mu:g}"


@dataclass(frozen=True)
class CGE:
    """Coordinate by coordinate: all d of them, 2 d queries (d + 1 where one-sided). Biased by mu^2 (mu), of no variance."""

    mu: float = 5e-3
    two_sided: bool = True

    def __post_init__(self) -> None:
        check_number("mu", self.mu, 0.0)

    def count(self, d: int) -> int:
        return d

    def direction(self, draw: Draw, z: Tensor) -> Tensor:
        u = torch.zeros_like(z)
        u[:, draw.member] = 1.0
        return u

    def scale(self, d: int) -> float:
        return 1.0

    def describe(self) -> str:
        return f"{'two' if self.two_sided else 'one'}-sided along every coordinate, mu {self.mu:g}"


@dataclass
class Frame:
    """The step of an optimizer that boxes are asked in: directions go by its seed and number, not by how often a box was called."""

    seed: int
    step: int
    calls: dict[str, int] = field(default_factory=dict)

    def name(self, of: str) -> str:
        """A call's name: calls of one name in a step are numbered."""
        number = self.calls[of] = self.calls.get(of, 0) + 1
        return of if number == 1 else f"{of}#{number}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        token = _FRAME.set(self)
        try:
            yield
        finally:
            _FRAME.reset(token)


_FRAME: ContextVar[Frame | None] = ContextVar("tare_cut_frame", default=None)


class BlackBox(nn.Module):
    """`box(z, *rest)` is `function(z, *rest)`, and z gets a gradient, although nothing but answers is known of the function.

    The function is queried once in forward, and for an estimate in backward: q more times (RGE), or 2 d (CGE), each time with the batch,
    without gradients and with the same random numbers. What it returns has a row (or a number: a loss) for each sample, which depends on
    that sample alone, so that each has directions of its own; or it is one number for the whole batch. Anything differentiable may come
    before and after, and any optimizer step what is in front.

    Args:
        function: callable, or module; it does not become part of the model: its parameters are not listed, moved or trained.
        estimator: `rge`, `cge`, or an `Estimator`.
        q: random directions (of rge).
        mu: how far (the paper's 0.005).
        two_sided: default: cge is (as the published code), rge is not (both).
        together: perturbed batches that are put into one query; tensors of `rest` with the same number of rows are repeated.
        seed, name: of the directions; boxes of one model need names of their own.

    `queries`: samples sent so far. `unanswered`: samples to which an answer was not finite; these get no gradient.

    Raises:
        InputError: values out of range; answers that are no tensor of numbers with a row for each sample; a gradient for `rest`.

    >>> _ = torch.manual_seed(0)
    >>> front = nn.Linear(3, 2)
    >>> box = BlackBox(lambda z: z.square().sum(1), "cge", mu=1e-3)
    >>> box(front(torch.ones(4, 3))).mean().backward()
    >>> front.weight.grad.shape, box.queries
    (torch.Size([2, 3]), 20)
    """

    def __init__(
        self, function: Callable[..., Tensor], estimator: Literal["rge", "cge"] | Estimator = "rge", *, q: int = 20, mu: float = 5e-3,
        two_sided: bool | None = None, together: int = 1, seed: int = 0, name: str = "cut",
    ):  # fmt: skip
        super().__init__()
        if isinstance(estimator, str):
            check_choice("estimator", estimator, ("rge", "cge"))
            sides = estimator == "cge" if two_sided is None else two_sided
            self.estimator: Estimator = CGE(mu, sides) if estimator == "cge" else RGE(q, mu, sides)
        else:
            self.estimator = estimator
        self._function = (function,)  # in a tuple, where torch does not look for modules
        self.together = check_whole("together", together, 1)
        self.seed = check_whole("seed", seed, 0)
        self.name = name
        self.calls, self.queries, self.unanswered = 0, 0, 0

    @property
    def function(self) -> Callable[..., Tensor]:
        """What is queried."""
        return self._function[0]

    def forward(self, z: Tensor, *rest: Any) -> Tensor:
        wanted = torch.is_grad_enabled() and z.requires_grad
        for number, other in enumerate(rest, 2):
            if isinstance(other, Tensor) and other.requires_grad and torch.is_grad_enabled():
                raise InputError(
                    f"{self.name}: only the first argument of a black box gets a gradient, and number {number} wants one; detach it, or "
                    "put both into one tensor"
                )
        if not wanted:
            with torch.no_grad():
                return self._ask(z, rest)
        frame = _FRAME.get()
        if frame is None:
            turn = (self.seed, self.name, self.calls)
            self.calls += 1
        else:
            turn = (frame.seed, frame.name(self.name), frame.step)
        answer: Tensor = _Through.apply(z, self, rest, turn)
        return answer

    def _ask(self, z: Tensor, rest: tuple[Any, ...]) -> Tensor:
        """An answer to one query, checked."""
        answer = self.function(z, *rest)
        rows = z.shape[0] if z.ndim else 1
        self.queries += rows
        if not isinstance(answer, Tensor) or not answer.is_floating_point():
            what = f"a tensor of {answer.dtype}" if isinstance(answer, Tensor) else type(answer).__name__
            raise InputError(f"{self.name}: expected the black box to return a tensor of real numbers, got {what}")
        if answer.ndim and (not z.ndim or answer.shape[0] != rows):
            raise InputError(
                f"{self.name}: the black box got {rows} samples and returned {tuple(answer.shape)}; expected a row for each, or one number"
            )
        return answer.detach()

    # -- the estimate --------------------------------------------------------------------------------------------------

    def pullback(
        self, z: Tensor, rest: tuple[Any, ...], answer: Tensor, grad: Tensor, turn: tuple[int, str, int], dice: Dice
    ) -> Tensor:  # fmt: skip
        """The estimate of grad^T d answer / d z, in the shape and dtype of z.

        turn: seed, name and step of the directions. dice: the random numbers that the answer was found with.
        """
        estimator, rows = self.estimator, z.shape[0] if answer.ndim else 1
        leaf = Leaf(turn[1], tuple(z.shape), z.dtype, "linear")
        place = z.detach().to(leaf.compute_dtype).reshape(rows, -1)
        d = place.shape[1]
        total = torch.zeros_like(place)
        weight, here = grad.double().reshape(rows, -1), answer.double().reshape(rows, -1)
        at_once = self.together if answer.ndim else 1
        number, mu = estimator.count(d) if z.numel() else 0, estimator.mu
        for first in range(0, number, at_once):
            members = range(first, min(first + at_once, number))
            draws = [Draw(leaf, turn[1], turn[0], turn[2], member) for member in members]
            us = [estimator.direction(draw, place) for draw in draws]
            ahead = self._answers([(place + mu * u).to(z.dtype).view_as(z) for u in us], rest, dice)
            if estimator.two_sided:
                behind = self._answers([(place - mu * u).to(z.dtype).view_as(z) for u in us], rest, dice)
            for at, u in enumerate(us):
                other = behind[at].reshape(rows, -1) if estimator.two_sided else here
                width = 2.0 * mu if estimator.two_sided else mu
                slope = (weight * ((ahead[at].reshape(rows, -1) - other) / width)).sum(1)  # [B]
                total += slope.to(total.dtype)[:, None] * u
        known = total.isfinite().all(1)
        if not bool(known.all()):
            self._not_finite(int((~known).sum()))
            total = torch.where(known[:, None], total, torch.zeros_like(total))
        return (total * estimator.scale(d)).to(z.dtype).view_as(z)

    def _answers(self, places: list[Tensor], rest: tuple[Any, ...], dice: Dice) -> list[Tensor]:
        """An answer for each batch, fp64."""
        if len(places) == 1:
            with dice.throw():
                return [self._ask(places[0], rest).double()]
        rows = places[0].shape[0]
        repeated = tuple(
            torch.cat([other] * len(places))
            if isinstance(other, Tensor) and other.ndim and len(other) == rows
            else other
            for other in rest
        )
        with dice.throw():
            return list(self._ask(torch.cat(places), repeated).double().split(rows))

    def _not_finite(self, samples: int) -> None:
        if not self.unanswered:
            warnings.warn(
                f"{self.name}: an answer was not finite near {samples} samples; they get no gradient, and are counted in .unanswered",
                stacklevel=2,
            )
        self.unanswered += samples

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """How often it was called, so that a resumed run draws the directions of one that never stopped."""
        return torch.tensor([self.calls, self.queries, self.unanswered])

    def set_extra_state(self, state: Tensor) -> None:
        self.calls, self.queries, self.unanswered = state.tolist()

    def extra_repr(self) -> str:
        return f"{self.name}: {self.estimator.describe()}"


class _Through(torch.autograd.Function):
    """One call of a box."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, box: BlackBox, rest: tuple[Any, ...], turn: tuple[int, str, int]) -> Tensor:
        ctx.dice = Dice({z.device})
        kind = z.device.type
        ctx.cast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with ctx.dice.throw():
            answer = box._ask(z.detach(), rest)
        ctx.box, ctx.rest, ctx.turn = box, rest, turn
        ctx.save_for_backward(z, answer)
        return answer.clone() if answer.data_ptr() == z.data_ptr() else answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        z, answer = ctx.saved_tensors
        kind, enabled, dtype = ctx.cast
        now = ctx.dice.look()
        try:
            with torch.no_grad(), torch.autocast(kind, dtype, enabled):
                return ctx.box.pullback(z, ctx.rest, answer, grad, ctx.turn, ctx.dice), None, None, None
        finally:
            ctx.dice.put(now)
