"""SideBySide: many members of a population in one forward, over one shared product with the weights (EGGROLL, arXiv 2511.16652).

The batch holds the rows of every member, one member after another. A linear module computes x W^T for all of them as it always does, and
what member k has of its own, c_k (x_k B_k) A_k^T / sqrt(r), is added to its rows; embeddings and norms likewise. No perturbed
weight is ever formed. A module of another kind that owns perturbed leaves is run once per member, on its rows, with its weights swapped.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from tare.core.errors import InputError
from tare.zeroth.lowrank import LowRank, beside
from tare.zeroth.members import Members, join, rows_of, split
from tare.zeroth.memory import Moved
from tare.zeroth.probes import Point

Own = dict[str, Moved]


class SideBySide:
    """Context in which one forward of `model` evaluates all `points`.

    Args:
        model: the module that is called; what it is given has the members' rows one after another.
        leaves: the trained leaves. points: where each member stands.
        repeat: whether what the model is called with is one member's batch, and is to be repeated for all of them here.
    """

    def __init__(self, model: nn.Module, leaves: list[Moved], points: list[Point], repeat: bool = False):
        self.model, self.repeat = model, repeat
        self.moved = {leaf.parameter: leaf for leaf in leaves}
        self.points = points
        self.active = range(len(points))  # the members whose rows a module sees just now
        self.called: set[Tensor] = set()  # leaves of modules that have run
        self._total, self._axes = len(points), 0  # rows and axes of the model's input
        self._calls: dict[nn.Module, int] = {}
        self._kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> "SideBySide":
        with ExitStack() as stack:
            entry = self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True, prepend=True)
            stack.callback(entry.remove)
            for name, module in self.model.named_modules():
                own = {n: self.moved[p] for n, p in module._parameters.items() if p is not None and p in self.moved}
                if own:
                    stack.callback(self._attach(name, module, own))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *fault: Any) -> None:
        self._stack.close()
        self._kept.clear()

    def _attach(self, name: str, module: nn.Module, own: Own) -> Callable[[], None]:
        """Make a module add what its members have of their own; returns what undoes that."""
        term = _TERMS.get(type(module)) or (_conv1d if type(module).__name__ == "Conv1D" else None)
        if term is not None and all(_known(leaf) for leaf in own.values()) and _plain(module):
            return module.register_forward_hook(_Hook(self, name, own, term), with_kwargs=True).remove
        if isinstance(module, nn.RNNBase):
            raise InputError(
                f"{name}: {type(module).__name__} cannot run members side by side; evaluate one at a time (together=1)"
            )
        before, forward = module.__dict__.get("forward"), module.forward
        module.forward = _Alone(self, module, own, forward)

        def undo() -> None:
            if before is None:
                del module.forward
            else:
                module.forward = before

        return undo

    def _enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.repeat:
            args, kwargs = Members.of(self.points).repeat((args, kwargs))
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        if leaves:
            self._total, self._axes = leaves[0].shape[0], leaves[0].ndim
            if self._total % len(self.points):
                raise InputError(
                    f"closure: the model was given {self._total} rows for {len(self.points)} members; give it each member's rows, one "
                    "member after another, as members.repeat(batch) makes them"
                )
        return args, kwargs

    # -- what modules ask ------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Members whose rows a module sees just now."""
        return len(self.active)

    @property
    def rows(self) -> int:
        """Rows of the batch that it sees: a multiple of the members."""
        return self._total // len(self.points) * self.count

    @contextmanager
    def only(self, number: int) -> Iterator[Point]:
        """One of them alone."""
        before = self.active
        self.active = before[number : number + 1]
        try:
            yield self.points[self.active[0]]
        finally:
            self.active = before

    def factors(self, leaf: Moved, dtype: torch.dtype, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """(A [M, m, R], B [M, n, R]) with the members' coefficients in A; None where nobody is away from theta.

        Drawn at each call and dropped, but kept from a module's second call on: a recurrent net runs it at every position.
        """
        key = (leaf.parameter, self.active, dtype)
        if key in self._kept:
            return self._kept[key]
        chosen = self._chosen(leaf)
        if chosen is None:
            return None
        members, index, weight = chosen
        law = leaf.directed.law
        assert isinstance(law, LowRank)
        a, b = law.factors(leaf.draw(0), members, leaf.parameter.device)
        scaled = a[index] * (weight.to(a.dtype) / math.sqrt(law.rank))[..., None, None]  # [M, J, m, r]
        found = beside(scaled).to(dtype), beside(b[index]).to(dtype)
        self._calls[module] = self._calls.get(module, 0) + 1
        if self._calls[module] > 1:
            self._kept[key] = found
        return found

    def vectors(self, leaf: Moved, dtype: torch.dtype) -> Tensor | None:
        """What each member adds to a leaf that is no matrix, [M, elements]."""
        chosen = self._chosen(leaf)
        if chosen is None:
            return None
        members, index, weight = chosen
        law = leaf.directed.law
        assert isinstance(law, LowRank)
        noise = law.vectors(leaf.draw(0), members, leaf.parameter.device).flatten(1)
        return (noise[index] * weight.to(noise.dtype)[..., None]).sum(1).to(dtype)

    def _chosen(self, leaf: Moved) -> tuple[list[int], Tensor, Tensor] | None:
        """(directions that somebody stands off along, [M, J] places in them, [M, J] coefficients); J: the most that one has."""
        offsets = [list(self.points[k].members.items()) for k in self.active]
        members = sorted({member for own in offsets for member, _ in own})
        if not members:
            return None
        places = {member: place for place, member in enumerate(members)}
        width = max(map(len, offsets))
        padded = [own + [(members[0], 0.0)] * (width - len(own)) for own in offsets]
        draw, device = leaf.draw(0), leaf.parameter.device
        factor = leaf.directed.law.perturbation(draw.leaf, leaf.state)
        index = torch.tensor([[places[member] for member, _ in own] for own in padded], device=device)
        weight = torch.tensor([[c * factor for _, c in own] for own in padded], dtype=torch.float64, device=device)
        return members, index, weight

    def by_member(self, name: str, x: Tensor, shared: bool = False) -> Tensor:
        """Rows of a module's input or output, [rows, ...]: as they are, or, where all members share one, repeated."""
        if shared:
            x = x.unsqueeze(0)
        elif x.ndim and x.shape[0] and x.shape[0] % self.rows == 0:
            return x
        if x.ndim == 0 or x.shape[0] != 1:
            raise InputError(
                f"{name}: got {tuple(x.shape)} where the batch of {self.count} members has {self.rows} rows; this model cannot run members "
                "side by side, evaluate one at a time (together=1)"
            )
        return x.expand(self.rows, *x.shape[1:]).contiguous()

    def shares(self, x: Tensor) -> bool:
        """Whether numbers without a batch axis, such as positions, were given to a model whose input has one."""
        return x.ndim == 1 and self._axes > 1


class _Hook:
    """After a module's own forward: add to each member's rows what is its own."""

    def __init__(self, together: SideBySide, name: str, own: Own, term: Callable[..., None]):
        self.together, self.name, self.own, self.term = together, name, own, term

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        ctx = self.together
        ctx.called.update(leaf.parameter for leaf in self.own.values())
        x = args[0] if args else next(iter(kwargs.values()))
        shared = type(module) is nn.Embedding and ctx.shares(x)
        x, output = ctx.by_member(self.name, x, shared), ctx.by_member(self.name, output, shared)
        y = output.reshape(ctx.count, -1, output.shape[-1])  # [M, rows of one, m]
        self.term(ctx, module, self.own, x, y)
        return y.view(output.shape)


class _Alone:
    """In place of a module's forward: one member after another, each with its own weights."""

    def __init__(self, together: SideBySide, module: nn.Module, own: Own, forward: Callable[..., Any]):
        self.together, self.module, self.own, self.forward = together, module, own, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ctx = self.together
        ctx.called.update(leaf.parameter for leaf in self.own.values())
        rows, count = ctx.rows, ctx.count
        outputs = []
        for number in range(count):
            with ctx.only(number) as point, self._swapped(point):
                own_args, own_kwargs = split((args, kwargs), rows, count, number)
                output = self.forward(*own_args, **own_kwargs)
            if rows_of((args, kwargs)) == 1 < rows:  # one row that all share
                output = pytree.tree_map_only(Tensor, lambda x: x.expand(rows // count, *x.shape[1:]), output)
            outputs.append(output)
        return join(outputs)

    @contextmanager
    def _swapped(self, point: Point) -> Iterator[None]:
        parameters: dict[str, Any] = self.module._parameters
        try:
            for name, leaf in self.own.items():
                parameters[name] = leaf.perturbed(point) if point.members else leaf.value()
            yield
        finally:
            for name, leaf in self.own.items():
                parameters[name] = leaf.parameter


# -- what kinds of modules add: y [M, R, m] += ..., in place -------------------------------------------------------------


def _linear(ctx: SideBySide, module: nn.Module, own: Own, x: Tensor, y: Tensor) -> None:
    """y += (x B) A^T for W [m, n] = A B^T."""
    if "weight" in own and (found := ctx.factors(own["weight"], y.dtype, module)) is not None:
        a, b = found
        y.baddbmm_(x.reshape(ctx.count, -1, x.shape[-1]).to(y.dtype) @ b, a.mT)
    _bias(ctx, own, y)


def _conv1d(ctx: SideBySide, module: nn.Module, own: Own, x: Tensor, y: Tensor) -> None:
    """y += (x A) B^T: transformers' Conv1D keeps its weight [in, out]."""
    if "weight" in own and (found := ctx.factors(own["weight"], y.dtype, module)) is not None:
        a, b = found
        y.baddbmm_(x.reshape(ctx.count, -1, x.shape[-1]).to(y.dtype) @ a, b.mT)
    _bias(ctx, own, y)


def _embedding(ctx: SideBySide, module: nn.Module, own: Own, x: Tensor, y: Tensor) -> None:
    """y += A[x] B^T."""
    if (found := ctx.factors(own["weight"], y.dtype, module)) is not None:
        a, b = found
        numbers = x.reshape(ctx.count, -1, 1).expand(-1, -1, a.shape[-1])  # [M, R, r]
        y.baddbmm_(a.gather(1, numbers), b.mT)


def _norm(ctx: SideBySide, module: nn.Module, own: Own, x: Tensor, y: Tensor) -> None:
    """y += normalised x times the members' own weights."""
    if "weight" in own and (rows := ctx.vectors(own["weight"], y.dtype)) is not None:
        shape, eps = module.normalized_shape, module.eps
        if isinstance(module, nn.RMSNorm):
            hat = functional.rms_norm(x, shape, eps=eps)  # type: ignore[arg-type]
        else:
            hat = functional.layer_norm(x, shape, eps=eps)  # type: ignore[arg-type]
        y.addcmul_(hat.reshape(y.shape).to(y.dtype), rows.unsqueeze(1))
    _bias(ctx, own, y)


def _bias(ctx: SideBySide, own: Own, y: Tensor) -> None:
    if "bias" in own and (rows := ctx.vectors(own["bias"], y.dtype)) is not None:
        y.add_(rows.unsqueeze(1))


_TERMS: dict[type[nn.Module], Callable[..., None]] = {
    nn.Linear: _linear, nn.Embedding: _embedding, nn.LayerNorm: _norm, nn.RMSNorm: _norm,
}  # fmt: skip


def _known(leaf: Moved) -> bool:
    """Whether a leaf's noise comes as factors, or as a vector."""
    return isinstance(leaf.directed.law, LowRank) and leaf.parameter.ndim in (1, 2)


def _plain(module: nn.Module) -> bool:
    """Whether nothing but the module's own arithmetic is at work: no weight of other shape than it says, no renormalised rows."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) == 1
    return not (isinstance(module, nn.Embedding) and module.max_norm is not None)
