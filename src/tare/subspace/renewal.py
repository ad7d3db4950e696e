"""Renewal: one refresh of one leaf: a new basis where the gradient can give one, and the moments carried over into it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tare.core.tensors import is_fake
from tare.core.transform import Step
from tare.subspace.bases import Basis
from tare.subspace.projection import Side
from tare.subspace.refresh import Refresh

Early = Literal["sum", "part"]


def renew(
    basis: Basis,
    refresh: Refresh,
    transfer: str,
    names: list[tuple[str, Side]],
    moments: list[str],
    g: Tensor,
    state: Any,
    step: Step,
    healthy: Callable[[Tensor], bool],
    early: Early | None = None,
) -> None:
    """Compute and keep the bases `names` from g [.., m, n]. On failure the old ones stay, it is counted, and owed.

    early: ahead of the step, where a failure is left to the step itself; from the `sum` of its gradients, or from a `part`
    of them, which must then show something of every expert.
    """
    previous = step.count - 1
    number = refresh.number(state, previous, step.phase)
    fit = not basis.needs_gradient or healthy(g)
    live = g.flatten(1).abs().amax(1) > 0 if g.ndim > 2 and basis.needs_gradient else None  # [E]
    if early == "part" and live is not None and not (is_fake(live) or bool(live.all())):
        return
    first = state["refreshed"] == 0
    found: list[tuple[str, Side, Tensor | None, Tensor]] = []
    for name, side in names:
        if not state.kept(name):  # a seed: drawn again at every step
            continue
        old = None if first else state[name]
        fresh = basis.compute(g, side, old, step.random_key(number, name), previous) if fit else None
        if fresh is None and early is not None:
            return
        if fresh is None:
            state["refresh_failures"] += 1
            state["refresh_owed"] = 1
            if first:  # no basis yet: something must serve
                for other, _ in names:
                    spec = state.slots[other].spec
                    state[other] = basis.fallback(spec, step.leaf.compute_dtype, g.device)
            return
        if live is not None:
            # Experts that saw no token keep the basis they had: their gradient is zero and any basis would be arbitrary.
            spec, dtype = state.slots[name].spec, step.leaf.compute_dtype
            before = basis.fallback(spec, dtype, g.device) if old is None else old
            fresh = torch.where(live.view(-1, *(1,) * (fresh.ndim - 1)), fresh, before.to(fresh.dtype))
        found.append((name, side, old, fresh))
    if not first:
        if transfer == "zero":
            for name in moments:
                state[name] = torch.zeros_like(state[name])
        elif transfer == "rotate":
            for _, side, old, fresh in found:
                assert old is not None
                turn = basis.turn(old, fresh)
                for name in moments:
                    x = state[name]
                    # In its own dtype: bf16 moments of a float64 leaf are decoded to, and encoded from, float32.
                    state[name] = turn(x, side, state.slots[name].spec.signed).to(x.dtype)
        state.settle(*moments)
    for name, _, old, fresh in found:
        refresh.refreshed(state, old, fresh)
        state[name] = fresh
    state["refreshed"] = number
    state["refreshed_at"] = previous
    state["refresh_owed"] = 0
