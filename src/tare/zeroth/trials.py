"""Probes of the ZO-LLM benchmark (Zhang, Li et al. 2024, arXiv 2402.11592): try the step before it is made; differentiate forwards."""

from collections.abc import Mapping
from dataclasses import dataclass

from tare.core.checks import check_number, check_whole
from tare.core.errors import InputError
from tare.zeroth.coefficients import Coefficients
from tare.zeroth.probes import PLAIN, THETA, Asking, Estimate, Point, Term, away, mean_of


@dataclass(frozen=True)
class Conservative:
    """Best of three: the loss decides between the step of plain SGD, the opposite one, and staying. Five evaluations.

    With f0 at theta, f- after the step and f+ after the opposite one: stay if f0 is the lowest; else the lower of the other two, the
    opposite one where they are equal. Weight decay is not part of what is tried. A step that stays changes nothing.
    """

    eps: float = 1e-3
    coefficients: Coefficients = PLAIN

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0)

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        if "lr" not in kept:
            raise InputError("conservative: the trial step needs one learning rate for all groups; use one group")
        here, plus, minus = yield [THETA, away(0, self.eps), away(0, -self.eps)]
        delta = (plus - minus) / (2.0 * self.eps)
        (kappa,) = self.coefficients([delta])
        forth, back = yield [away(0, -kept["lr"] * kappa), away(0, kept["lr"] * kappa)]
        if forth > here:
            branch = 0.0 if here < back else -1.0
        else:
            branch = 1.0 if forth < back else -1.0
        return Estimate([Term(0, branch * kappa)] if branch else [], [delta], moves=branch != 0.0)

    @property
    def evaluations(self) -> float:
        return 5.0

    def describe(self) -> str:
        return f"conservative (best of three), eps {self.eps:g}"


@dataclass(frozen=True)
class ForwardGradient:
    """delta_j = z_j . grad f, exactly: a derivative by forward-mode differentiation instead of a difference; one pass for each member.

    Needs the model as `params`, a differentiable loss and operations with forward-mode derivatives, and holds z while it runs.
    """

    n: int = 1
    mean: bool = True
    coefficients: Coefficients = PLAIN

    def __post_init__(self) -> None:
        check_whole("n", self.n, 1)

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        deltas = yield [Point(along=((j, 1.0),)) for j in range(self.n)]
        return Estimate(mean_of(self.coefficients(deltas), self.n if self.mean else 1), deltas)

    @property
    def evaluations(self) -> float:
        return float(self.n)

    def describe(self) -> str:
        return f"forward gradient (exact derivative, z held), n {self.n}"
