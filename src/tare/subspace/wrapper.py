"""Subspace: runs a rule on a projection of the gradient. One step: refresh, project, inner rule, lift, residual, limiter.

Notation: W, G [m, n]; P [s, r] the basis; R the projected gradient, P^T G [r, n] on the left or G P [m, r] on the
right; N the inner direction.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.delta import Delta, Dense, LowRank, Scaled, Sum
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.storage import Storage
from tare.core.tensors import column_norms, healthy, whole_norm
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.kernels import gemm
from tare.subspace.bases import Basis, Side
from tare.subspace.limiter import NormGrowth
from tare.subspace.refresh import Refresh
from tare.subspace.residual import NormRatioResidual, norm_ratio

SideChoice = Literal["shorter", "longer", "left", "right", "both"]
Lift = Literal["back", "channel", "tensor"]
SIDES = ("shorter", "longer", "left", "right", "both")


@dataclass(frozen=True)
class Subspace(Transform):
    """A rule in a subspace.

    Args:
        rule: the inner rule, run on R.
        basis: what computes P, and the rank.
        refresh: when.
        side: which side of G is projected; `shorter` is the published `std`, `longer` is `reverse_std`, `both` is `full`.
        transfer: what happens to the inner moments at a refresh: `keep` the numbers (the papers), `zero` them and
            their step count, or `rotate` them into the new basis.
        lift: `back` projects N back; `channel` and `tensor` only use |N| / |R| to scale the raw gradient (APOLLO).
        scale: alpha; multiplies the lifted direction, or for `channel`/`tensor` its square root multiplies G.
        scale_front: multiply by sqrt(scale) before the limiter instead of after.
        residual: what becomes of the rest of the gradient (back-projection only).
        limiter: limits the growth of the residual's norm, or of the whole update for `channel`/`tensor`.
    """

    rule: Transform
    basis: Basis
    refresh: Refresh = field(default_factory=Refresh)
    side: SideChoice = "shorter"
    transfer: Literal["keep", "zero", "rotate"] = "keep"
    lift: Lift = "back"
    scale: float = 1.0
    scale_front: bool = False
    residual: NormRatioResidual | None = None
    limiter: NormGrowth | None = None

    sharding: ClassVar[Sharding] = "matrix"

    def __post_init__(self) -> None:
        check_choice("side", self.side, SIDES)
        check_choice("transfer", self.transfer, ("keep", "zero", "rotate"))
        check_choice("lift", self.lift, ("back", "channel", "tensor"))
        check_number("scale", self.scale, 0.0, inclusive=True)
        if self.lift != "back" and self.residual is not None:
            raise InputError("residual: 'channel' and 'tensor' scale the whole gradient, nothing is left over; drop it")
        if self.side == "both" and (self.lift != "back" or self.residual is not None):
            raise InputError("side: 'both' projects to r x r and only goes with lift='back' and no residual")

    # -- shape -----------------------------------------------------------------------------------------------------

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        """Sums of R are enough where G itself is not used again."""
        return self.lift == "back" and self.residual is None

    def side_of(self, m: int, n: int) -> Side:
        """Square counts as tall, and tall is projected on the right."""
        if self.side in ("left", "right"):
            return self.side
        tall = m >= n
        return "right" if tall == (self.side == "shorter") else "left"

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        if leaf.matrix is None:
            return self.rule, "no single matrix: dense"
        if self.basis.rank > min(leaf.matrix):
            return self.rule, f"rank {self.basis.rank} > {min(leaf.matrix)}: dense"
        return (
            self,
            "projected on both sides" if self.side == "both" else f"projected on the {self.side_of(*leaf.matrix)}",
        )

    def _inner(self, leaf: Leaf) -> Leaf:
        assert leaf.matrix is not None
        m, n = leaf.matrix
        r = self.basis.rank
        if self.side == "both":
            shape = (r, r)
        else:
            shape = (r, n) if self.side_of(m, n) == "left" else (m, r)
        return Leaf(leaf.name, shape, leaf.dtype, "linear")

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        assert leaf.matrix is not None
        m, n = leaf.matrix
        r = self.basis.rank
        specs = self.rule.spec(self._inner(leaf))
        seed = self.basis.seedable
        if self.side == "both":
            specs["basis_left"] = StateSpec((m, r), "basis", seedable=seed)
            specs["basis_right"] = StateSpec((n, r), "basis", seedable=seed)
        else:
            size = m if self.side_of(m, n) == "left" else n
            specs["basis"] = StateSpec((size, r), "basis", seedable=seed)
        specs["refreshed"] = StateSpec((), "count")  # the period of the last refresh that succeeded, 0 for none
        specs["refreshed_at"] = StateSpec((), "count")  # updates done before it
        specs["refresh_failures"] = StateSpec((), "count")
        if self.limiter is not None:
            specs["limiter_norm"] = StateSpec((), "exact", init=math.inf)
        return specs

    def check(self, leaf: Leaf, storage: Storage) -> None:
        if storage.basis == "seed" and self.transfer == "rotate":
            raise InputError("transfer: 'rotate' needs the old basis, which storage.basis='seed' does not keep")

    # -- the step --------------------------------------------------------------------------------------------------

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        matrix = step.leaf.matrix
        assert matrix is not None
        g = grad.reshape(matrix)  # [m, n]
        side = self.side_of(*matrix)
        if self._due(state, step):
            self._refresh(g, side, state, step)
        if self.side == "both":
            return self._two_sided(g, state, step, compressed)
        p = self._basis(g, side, state, step)
        projected = self._project(g, p, side, state)
        if compressed is not None:
            projected = projected.add_(compressed)
        inner = self._inner_step(step, state)
        if self.lift != "back":
            before = self._sizes(projected, side)
            return self._rescale(g, before, self._spend(projected, state, inner), side, state)
        if self.residual is None:
            return self._lift(p, self._spend(projected, state, inner), side)
        direction = self.rule.update(projected, state, inner)
        assert isinstance(direction, Dense)
        lifted = self._lift(p, direction, side)
        return Sum((lifted, self._outside(g, p, projected, direction, side, state)))

    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor | None:
        """R of one micro-batch; None when a refresh is due, which needs the whole gradient of the step."""
        assert step.leaf.matrix is not None
        if self._due(state, step):
            return None
        g = grad.reshape(step.leaf.matrix)
        if self.side == "both":
            return self._both(g, state, step)[0]
        side = self.side_of(*step.leaf.matrix)
        return self._project(g, self._basis(g, side, state, step), side, state)

    def _spend(self, projected: Tensor, state: State, step: Step) -> Dense:
        """N, which may take the memory of R: nobody reads R after this."""
        direction = self.rule.consume(projected, state, step)
        assert isinstance(direction, Dense)
        return direction

    def _inner_step(self, step: Step, state: State) -> Step:
        return step.since(step.count - state["refreshed_at"]) if self.transfer == "zero" else step

    # -- refresh ---------------------------------------------------------------------------------------------------

    def _due(self, state: State, step: Step) -> bool:
        previous = step.count - 1
        recorded = self.basis.recorded(previous)
        if recorded is not None:
            return recorded
        return self.refresh.due(previous, step.phase, state["refreshed"])

    def _refresh(self, g: Tensor, side: Side, state: State, step: Step) -> None:
        """A new basis, unless the gradient can give none: then the old one stays, it is counted, and tried again."""
        previous = step.count - 1
        number = max(1, self.refresh.epoch(previous, step.phase))
        fit = not self.basis.needs_gradient or healthy(g)
        names: list[tuple[str, Side]] = (
            [("basis_left", "left"), ("basis_right", "right")] if self.side == "both" else [("basis", side)]
        )
        first = state["refreshed"] == 0
        for name, which in names:
            if not state.kept(name):  # a seed: drawn again at every step
                if not first:
                    self._carry(state, None, g, which)
                continue
            old = None if first else state[name]
            key = step.random_key(number, name)
            fresh = self.basis.compute(g, which, old, key, previous) if fit else None
            if fresh is None:
                state["refresh_failures"] += 1
                if not first:
                    return
                # No basis yet: unit vectors serve until a usable gradient comes.
                fresh = torch.eye(*state.slots[name].spec.shape, dtype=step.leaf.compute_dtype, device=g.device)
                state[name] = fresh
                return
            if not first:
                self._carry(state, old, fresh, which)
            state[name] = fresh
        state["refreshed"] = number
        state["refreshed_at"] = previous

    def _carry(self, state: State, old: Tensor | None, fresh: Tensor, side: Side) -> None:
        """Moments at a refresh: kept, zeroed, or rotated (squared rotation for second moments)."""
        moments = [n for n, s in state.slots.items() if s.spec.kind == "moment"]
        if self.transfer == "zero":
            for name in moments:
                state[name] = torch.zeros_like(state[name])
        elif self.transfer == "rotate" and old is not None:
            turn = fresh.mT @ old.to(fresh.dtype)  # [r, r]
            for name in moments:
                q = turn if state.slots[name].spec.signed else turn.square()
                value = state[name].to(q.dtype)
                state[name] = q @ value if side == "left" else value @ q.mT

    def _basis(self, g: Tensor, side: Side, state: State, step: Step, name: str = "basis") -> Tensor:
        if state.kept(name):
            return state[name]
        fresh = self.basis.compute(g, side, None, step.random_key(state["refreshed"], name))
        assert fresh is not None
        return fresh.to(step.leaf.compute_dtype)

    # -- project and lift ------------------------------------------------------------------------------------------

    def _project(self, g: Tensor, p: Tensor, side: Side, state: State) -> Tensor:
        q = p.to(g.dtype)
        with gemm.fast_matmul():
            r = q.mT @ g if side == "left" else g @ q
        return r if r.dtype == p.dtype or p.dtype == torch.bfloat16 else r.to(p.dtype)

    def _lift(self, p: Tensor, direction: Dense, side: Side) -> LowRank:
        u, scale = direction.u, self.scale * direction.scale
        if u.dtype != p.dtype:
            p = p.to(u.dtype)
        left, right = (p, u) if side == "left" else (u, p.mT)
        return LowRank(left, right, scale, direction.lr_inside)

    def _sizes(self, x: Tensor, side: Side) -> Tensor:
        """Norms of R or N: one for each channel of G, or one for all."""
        return column_norms(x, 0 if side == "left" else 1) if self.lift == "channel" else whole_norm(x)

    def _rescale(self, g: Tensor, before: Tensor, direction: Dense, side: Side, state: State) -> Scaled:
        """APOLLO: U = c_t sqrt(scale) G * phi, limited. |U| is had from norms of G, so U is never formed. before: |R|."""
        root = math.sqrt(self.scale)
        dim = 0 if side == "left" else 1
        phi = self._sizes(direction.u, side).mul_(abs(direction.uncorrected)).div_(before.add_(1e-8))
        if self.scale_front:
            phi.mul_(root)
        if self.limiter is not None:
            wide = g if g.dtype == phi.dtype else g.to(phi.dtype)
            if self.lift == "channel":
                norm = whole_norm((column_norms(wide, dim) * phi).view(-1))
            else:
                norm = whole_norm(wide) * phi
            phi.mul_(self.limiter.factor(norm, state["limiter_norm"]))
        return Scaled(g, phi, direction.correction * (1.0 if self.scale_front else root), direction.lr_inside)

    def _outside(self, g: Tensor, p: Tensor, projected: Tensor, direction: Dense, side: Side, state: State) -> Scaled:
        """Fira: S = (G - a lift(R)) * phi, limited; c_t multiplies afterwards in the published code."""
        assert self.residual is not None
        dim = 0 if side == "left" else 1
        paper = self.residual.form == "paper"
        raw = abs(direction.scale if paper else direction.uncorrected)
        phi = norm_ratio(direction.u, projected, dim, raw)
        left, right = (p, projected) if side == "left" else (projected, p.mT)
        outside = self.residual.outside(g, left, right, self.scale)
        if outside.dtype != phi.dtype:
            outside = outside.to(phi.dtype)
        if self.limiter is not None:
            norm = whole_norm((column_norms(outside, dim) * phi).view(-1))
            phi.mul_(self.limiter.factor(norm, state["limiter_norm"]))
        return Scaled(outside, phi, self.scale if paper else direction.correction)

    def _both(self, g: Tensor, state: State, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        left = self._basis(g, "left", state, step, "basis_left")
        right = self._basis(g, "right", state, step, "basis_right")
        with gemm.fast_matmul():
            r = (left.to(g.dtype).mT @ g) @ right.to(g.dtype)  # [r, r]
        return r.to(left.dtype), left, right

    def _two_sided(self, g: Tensor, state: State, step: Step, compressed: Tensor | None) -> Delta:
        r, left, right = self._both(g, state, step)
        if compressed is not None:
            r = r.add_(compressed)
        direction = self.rule.update(r, state, self._inner_step(step, state))
        assert isinstance(direction, Dense)
        with gemm.fast_matmul():
            half = left @ direction.u.to(left.dtype)  # [m, r]
        return LowRank(half, right.mT, self.scale * direction.scale, direction.lr_inside)

    # -- words -----------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        return f"{self.rule.describe()} in {self.basis.describe()}"

    def rank_for(self, leaf: Leaf) -> int | None:
        return self.basis.rank


def subspace(rule: Transform, basis: Basis, refresh: Refresh | None = None, **axes: object) -> Subspace:
    """`Subspace` with the keyword names of the papers' frame; see there."""
    return Subspace(rule, basis, refresh or Refresh(), **axes)  # type: ignore[arg-type]
