"""Subspace: runs a rule on a projection of the gradient. One step: intake, refresh, project, inner rule, lift, residual, post-map.

Notation: W, G [m, n]; P [s, r] the basis; R the projected gradient, P^T G [r, n] on the left or G P [m, r] on the
right; N the inner direction. Experts [E, m, n] are E such matrices at once.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number
from tare.core.delta import Delta, Dense, LowRank, Scaled
from tare.core.errors import InputError
from tare.core.lazy import Mapped
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.storage import Slot, Storage
from tare.core.tensors import column_norms, healthy, matrix_norms
from tare.core.transform import Sharding, StateSpec, Step, Transform
from tare.kernels import gemm
from tare.rules.maps import PostMap
from tare.subspace.apart import RowSteps, taken_apart
from tare.subspace.bases import Basis
from tare.subspace.limiter import NormGrowth
from tare.subspace.projection import Projection, Side
from tare.subspace.refresh import Refresh
from tare.subspace.renewal import Early, renew
from tare.subspace.residual import Parts, Residual

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
        residual: what becomes of the rest of the gradient (back-projection only); None drops it.
        limiter: limits the growth of a norm: of the residual's where there is one, else of the whole update's.
        post: a map of the whole direction, such as the sign of Online Subspace Descent's Lion.
    """

    rule: Transform
    basis: Basis
    refresh: Refresh = field(default_factory=Refresh)
    side: SideChoice = "shorter"
    transfer: Literal["keep", "zero", "rotate"] = "keep"
    lift: Lift = "back"
    scale: float = 1.0
    scale_front: bool = False
    residual: Residual | None = None
    limiter: NormGrowth | None = None
    post: PostMap | None = None

    sharding: ClassVar[Sharding] = "matrix"

    def __post_init__(self) -> None:
        check_choice("side", self.side, SIDES)
        check_choice("transfer", self.transfer, ("keep", "zero", "rotate"))
        check_choice("lift", self.lift, ("back", "channel", "tensor"))
        check_number("scale", self.scale, 0.0, inclusive=True)
        if self.lift != "back" and self.residual is not None:
            raise InputError("residual: 'channel' and 'tensor' scale the whole gradient, nothing is left over; drop it")
        if self.side == "both" and (self.lift != "back" or self.residual is not None or self.limiter is not None):
            raise InputError(
                "side: 'both' projects to r x r and only goes with lift='back', no residual and no limiter"
            )
        if self.refresh.compares and not self.basis.comparable:
            raise InputError(
                f"refresh: an adaptive calendar compares bases as matrices, and {self.basis.describe()} keeps numbers of "
                "columns; use a periodic one"
            )
        if self.side == "both" and not self.basis.two_sided:
            raise InputError(f"side: 'both' needs a basis matrix, which {self.basis.describe()} has not; use 'shorter'")

    # -- shape -----------------------------------------------------------------------------------------------------

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        """Sums of R are enough where G itself is not used again."""
        return self.lift == "back" and self.residual is None and not self.basis.moves

    @property
    def drawn(self) -> bool:  # type: ignore[override]
        """The basis comes from its key, not from G."""
        return self.basis.seedable

    def side_of(self, m: int, n: int) -> Side:
        """Square counts as tall, and tall is projected on the right."""
        if self.side in ("left", "right"):
            return self.basis.side_for(self.side)
        tall = m >= n
        return self.basis.side_for("right" if tall == (self.side == "shorter") else "left")

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        if leaf.matrix is None:
            return self.rule, "no single matrix: dense"
        m, n = leaf.matrix
        side = self.side_of(m, n)
        rank = max(self.basis.rank_of(m), self.basis.rank_of(n)) if self.side == "both" else 0
        rank = rank or self.basis.rank_of(m if side == "left" else n)
        room = min(m, n) if self.basis.within_shorter or self.side == "both" else (m if side == "left" else n)
        if rank > room and isinstance(self.basis.rank, float) and self.side != "both":
            # a share of the longer side: as many directions as there are
            return replace(self, basis=replace(self.basis, rank=room)), f"projected on the {side}"
        if rank > room:
            return self.rule, f"rank {rank} > {room}: dense"
        return self, "projected on both sides" if self.side == "both" else f"projected on the {side}"

    def _inner(self, leaf: Leaf) -> Leaf:
        assert leaf.matrix is not None
        m, n = leaf.matrix
        if self.side == "both":
            shape: tuple[int, ...] = (self.basis.rank_of(m), self.basis.rank_of(n))
        else:
            shape = self.basis.inner_shape(m, n, self.side_of(m, n))
        return Leaf(leaf.name, (*leaf.stack, *shape), leaf.dtype, "expert" if leaf.stack else "linear")

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        assert leaf.matrix is not None
        m, n = leaf.matrix
        specs = self.rule.spec(self._inner(leaf))
        if self.side == "both":
            specs["basis_left"] = self.basis.kept(m, leaf.stack, n)
            specs["basis_right"] = _along_columns(self.basis.kept(n, leaf.stack, m))
            specs.update(self.refresh.spec(n, leaf.stack))
        else:
            side = self.side_of(m, n)
            size, other = (m, n) if side == "left" else (n, m)
            kept = self.basis.kept(size, leaf.stack, other)
            specs["basis"] = kept if side == "left" else _along_columns(kept)
            specs.update(self.basis.extra(size, leaf.stack))
            specs.update(self.refresh.spec(size, leaf.stack))
        if self.residual is not None:
            specs.update(self.residual.spec(leaf))
        specs["refreshed"] = StateSpec((), "count")  # the number of the last refresh that succeeded, 0 for none
        specs["refreshed_at"] = StateSpec((), "count")  # updates done before it
        specs["refresh_failures"] = StateSpec((), "count")
        specs["refresh_owed"] = StateSpec((), "count")  # 1 after a refresh that failed, until one succeeds
        if self.limiter is not None:
            specs["limiter_norm"] = StateSpec(leaf.stack, "exact", init=math.inf)
        return specs

    def check(self, leaf: Leaf, storage: Storage) -> None:
        if storage.basis == "seed" and self.transfer == "rotate":
            raise InputError("transfer: 'rotate' needs the old basis, which storage.basis='seed' does not keep")
        if storage.basis == "seed" and self.refresh.compares:
            raise InputError("refresh: an adaptive calendar compares bases, which storage.basis='seed' does not keep")
        self.basis.check(leaf, storage)
        assert leaf.matrix is not None
        side = self.side_of(*leaf.matrix)
        if self.refresh.spec(1, ()) and self.basis.kept(leaf.matrix[0], other=leaf.matrix[1]).dtype is torch.int32:
            raise InputError(
                f"refresh: an adaptive calendar compares basis matrices, which {self.basis.describe()} has not; use a "
                "period"
            )
        channels = len(self.basis.inner_shape(*leaf.matrix, side)) == 2
        if self.lift == "channel" and not channels:
            raise InputError("lift: single entries have no channels; use lift='tensor' or 'back'")
        if self.residual is not None:
            self.residual.check(leaf, channels)

    def shared(self, leaf: Leaf) -> dict[str, int]:
        if leaf.matrix is None:
            return {}
        m, n = leaf.matrix
        sizes = (m, n) if self.side == "both" else (m,) if self.side_of(m, n) == "left" else (n,)
        return {name: size for length in sizes for name, size in self.basis.shared(length).items()}

    def apart(self, leaf: Leaf, slots: dict[str, Slot]) -> RowSteps | None:
        return taken_apart(self, leaf, slots)

    # -- the step --------------------------------------------------------------------------------------------------

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        leaf = step.leaf
        assert leaf.matrix is not None
        g = grad.reshape(leaf.view)  # [.., m, n]
        if self.residual is not None:
            g = self.residual.intake(g, state)
        side = self.side_of(*leaf.matrix)
        seen = self._refresh(g, side, state, step) if self.due(state, step) else None
        if self.side == "both":
            delta = self._two_sided(g, state, step, compressed)
        else:
            delta = self._one_sided(g, side, state, step, compressed, seen)
        if self.post is None:
            return delta
        by_rows = self.post.sharding == "elementwise"
        return Mapped(delta, self.post, leaf.view, step.lr if delta.scaled else 1.0, by_rows, delta.scaled)

    def _one_sided(
        self, g: Tensor, side: Side, state: State, step: Step, compressed: Tensor | None, seen: Tensor | None
    ) -> Delta:
        """seen: R, if the refresh met it."""
        at = self._at(g, side, state, step)
        lengths = None  # of the channels of G
        if seen is not None:
            projected = seen
        elif self.lift != "back" and self.limiter is not None:
            projected, lengths = at.measured(g)
        else:
            projected = at.project(g)
        if compressed is not None:
            projected = projected.add_(compressed)
        inner = self._inner_step(step, state)
        if self.basis.moves:
            self.basis.follow(g, projected, at, state, step)
        if self.lift != "back":
            before = self._sizes(projected, at)
            return self._rescale(g, before, self._spend(projected, state, inner), at, state, lengths)
        if self.residual is not None and self.residual.keeps_projected:
            direction = self.rule.update(projected, state, inner)
        else:
            direction = self._spend(projected, state, inner)
        assert isinstance(direction, Dense)
        if self.residual is not None:
            inside = direction
            parts = Parts(g, at, projected, inside, self.scale, state, self.limiter, len(step.leaf.stack), step.lr)
            return self.residual.update(parts, lambda: at.lift(inside, self.scale))
        if self.limiter is not None:
            direction = self._limited(direction, at, state, step)
        return at.lift(direction, self.scale)

    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor | None:
        """R of one micro-batch; None when a refresh is due, which needs the whole gradient of the step."""
        assert step.leaf.matrix is not None
        if self.due(state, step):
            return None
        g = grad.reshape(step.leaf.view)
        if self.side == "both":
            return self._both(g, state, step)[0]
        return self._at(g, self.side_of(*step.leaf.matrix), state, step).project(g)

    def _spend(self, projected: Tensor, state: State, step: Step) -> Dense:
        """N, which may take the memory of R: nobody reads R after this."""
        direction = self.rule.consume(projected, state, step)
        assert isinstance(direction, Dense)
        return direction

    def _inner_step(self, step: Step, state: State) -> Step:
        """The step as the inner rule sees it: on the leaf of R, counted from a reset where the transfer resets."""
        step = replace(step, leaf=self._inner(step.leaf))
        return step.since(step.count - state["refreshed_at"]) if self.transfer == "zero" else step

    # -- refresh ---------------------------------------------------------------------------------------------------

    def due(self, state: State, step: Step) -> bool:
        """Whether a basis is computed in this step, and has not been yet (`prepare`)."""
        previous = step.count - 1
        if state["refreshed"] > 0 and state["refreshed_at"] == previous:
            return False
        recorded = self.basis.recorded(previous)
        if recorded is not None:
            return recorded
        return self.refresh.is_due(state, previous, step.phase)

    def prepare(self, grad: Tensor, state: State, step: Step, whole: bool) -> None:
        """The refresh of a due step, ahead of it. One that `grad` gives no basis for is left to the step."""
        assert step.leaf.matrix is not None
        if self.due(state, step):
            side = self.side_of(*step.leaf.matrix)
            self._refresh(grad.reshape(step.leaf.view), side, state, step, "sum" if whole else "part")

    def _refresh(self, g: Tensor, side: Side, state: State, step: Step, early: Early | None = None) -> Tensor | None:
        """A new basis, unless the gradient can give none: then the old one stays, it is counted, and tried again.

        Returns R of `g` in it, where that comes along.
        """
        names: list[tuple[str, Side]] = (
            [("basis_left", "left"), ("basis_right", "right")] if self.side == "both" else [("basis", side)]
        )
        moments = [n for n, spec in self.rule.spec(self._inner(step.leaf)).items() if spec.kind == "moment"]
        basis = self.basis.watching() if g.ndim == 2 and self.side != "both" and early is None else self.basis
        renew(basis, self.refresh, self.transfer, names, moments, g, state, step, healthy, early)
        return basis.seen

    def _at(self, g: Tensor, side: Side, state: State, step: Step, name: str = "basis") -> Projection:
        dtype = step.leaf.compute_dtype
        if state.kept(name):
            exact = state.slots[name].form == "plain" and state.slots[name].dtype != torch.bfloat16
            return self.basis.at(state[name], g, side, dtype, exact)
        fresh = self.basis.compute(g, side, None, step.random_key(state["refreshed"], name))
        assert fresh is not None
        return self.basis.at(fresh.to(dtype) if fresh.is_floating_point() else fresh, g, side, dtype)

    # -- lift ------------------------------------------------------------------------------------------------------

    def _sizes(self, x: Tensor, at: Projection) -> Tensor:
        """Norms of R or N: one for each channel of G, or one for each matrix."""
        if self.lift == "channel":
            assert at.channel is not None
            return column_norms(x, at.channel)
        return matrix_norms(x)

    def _rescale(
        self, g: Tensor, before: Tensor, direction: Dense, at: Projection, state: State, lengths: Tensor | None
    ) -> Scaled:
        """APOLLO: U = c_t sqrt(scale) G * phi, limited. |U| is had from norms of G, so U is never formed.

        before: |R|. lengths: of the channels of G, where they are known already.
        """
        root = math.sqrt(self.scale)
        phi = self._sizes(direction.u, at).mul_(abs(direction.uncorrected)).div_(before.add_(1e-8))
        if self.scale_front:
            phi.mul_(root)
        if self.limiter is not None:
            if self.lift == "channel":
                assert at.channel is not None
                lengths = column_norms(g, at.channel, phi.dtype) if lengths is None else lengths
                norm = matrix_norms(lengths * phi)
            elif lengths is None and g.dtype == phi.dtype:
                norm = matrix_norms(g) * phi
            else:  # narrower gradients are not widened as a whole
                norm = matrix_norms(column_norms(g, -1, phi.dtype) if lengths is None else lengths) * phi
            factor = self.limiter.factor(norm.reshape(state["limiter_norm"].shape), state["limiter_norm"])
            phi.mul_(factor.view(-1, 1, 1) if factor.ndim else factor)
        return Scaled(g, phi, direction.correction * (1.0 if self.scale_front else root), direction.lr_inside)

    def _limited(self, direction: Dense, at: Projection, state: State, step: Step) -> Dense:
        """The direction with the growth of the lifted update's norm limited (the factor is alike on every lift of it)."""
        assert self.limiter is not None
        stack = len(step.leaf.stack)
        size = (
            at.squared_lengths(direction.u).flatten(stack).sum(-1) if stack else at.squared_lengths(direction.u).sum()
        )
        norm = size.sqrt() * abs(direction.uncorrected * self.scale)
        factor = self.limiter.factor(norm.reshape(state["limiter_norm"].shape), state["limiter_norm"])
        return replace(direction, u=direction.u * (factor.view(-1, 1, 1) if factor.ndim else factor))

    def _both(self, g: Tensor, state: State, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        left = self._matrix_of(g, "left", state, step)
        right = self._matrix_of(g, "right", state, step)
        with gemm.fast_matmul():
            r = (left.to(g.dtype).mT @ g) @ right.to(g.dtype)  # [r, r]
        return r.to(left.dtype), left, right

    def _matrix_of(self, g: Tensor, side: Side, state: State, step: Step) -> Tensor:
        p: Tensor = self._at(g, side, state, step, f"basis_{side}").p  # type: ignore[attr-defined]
        return p

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
        if isinstance(self.basis.rank, int) or leaf.matrix is None:
            return self.basis.rank if isinstance(self.basis.rank, int) else None
        m, n = leaf.matrix
        return self.basis.rank_of(m if self.side_of(m, n) == "left" else n)


def _along_columns(kept: StateSpec) -> StateSpec:
    """Quantised groups of a right basis run along its columns, as in Q-GaLore's code, which keeps it as [r, s]."""
    matrix = kept.dtype is None and len(kept.shape) >= 2
    return replace(kept, transposed=True) if matrix else kept


def subspace(rule: Transform, basis: Basis, refresh: Refresh | None = None, **axes: object) -> Subspace:
    """`Subspace` with the keyword names of the papers' frame; see there."""
    return Subspace(rule, basis, refresh or Refresh(), **axes)  # type: ignore[arg-type]
