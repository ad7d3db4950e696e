"""T6: zero, NaN and infinite gradients at first, ordinary and refresh steps. The policy: never an exception; a NaN shows in the weights
of its leaf, as in torch, and in no other; a basis is not computed from such a gradient, the old one stays and the failure is counted.
"""

import math
from typing import Any

import torch

from tare.subspace.residual import FeedbackResidual
from tare.testing.subject import FEW, FORMS, PERIOD, Subject, bits_equal, drive, gradient, leaves, same, snapshot

KINDS = (0, PERIOD - 1, PERIOD)  # steps counted from 0: the first, an ordinary one, a refresh
VICTIMS = ("tall.weight", "wide.weight", "square.weight", "conv.weight", "norm.weight")


def not_a_number_is_visible(subject: Subject) -> None:
    """One NaN: no exception, its leaf is visibly NaN, every other leaf is as if nothing had happened."""
    for storage in FORMS.values():
        for when in KINDS:
            wanted = leaves(FEW)
            drive(subject.build(wanted, storage=storage), wanted, 0, PERIOD + 3)
            for victim in VICTIMS[:2] if storage.moment != "fp32" else VICTIMS:
                named = leaves(FEW)
                _with_fault(subject, named, victim, when, math.nan, storage)
                what = f"NaN in {victim} at step {when}, {storage.moment} moments"
                assert dict(named)[victim].isnan().any(), f"{what}: not visible"
                others = [item for item in named if item[0] != victim]
                if subject.coupled:
                    assert all(torch.isfinite(p).all() for _, p in others), f"{what}: it spread"
                else:
                    same(snapshot(others), {n: p.detach() for n, p in wanted if n != victim}, what)


def infinity_raises_nothing(subject: Subject) -> None:
    for storage in FORMS.values():
        for when in KINDS:
            for value in (math.inf, -math.inf):
                named = leaves(FEW)
                _with_fault(subject, named, "tall.weight", when, value, storage)
                others = [p for name, p in named if name != "tall.weight"]
                assert all(torch.isfinite(p).all() for p in others), f"{value} at step {when} spread"


def zero_gradient_is_harmless(subject: Subject) -> None:
    """All-zero gradients at any step: weights stay finite and move again afterwards by steps of the usual size."""
    for form, storage in FORMS.items():
        for when in KINDS:
            named = leaves(FEW)
            optimizer = subject.build(named, storage=storage)
            drive(optimizer, named, 0, when)
            for _, p in named:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            drive(optimizer, named, when + 1, when + 4)
            before = snapshot(named)
            drive(optimizer, named, when + 4, when + 5)
            for name, p in named:
                what = f"{name}, zero gradient at step {when}, {form} moments"
                assert torch.isfinite(p).all(), f"{what}: not finite"
                if p.numel() > 4:
                    moved = (p.detach() - before[name]).norm().item() / p.numel() ** 0.5
                    assert moved > 1e-6, f"{what}: moves by {moved:.2g} only"


def basis_survives_a_bad_refresh(subject: Subject) -> None:
    """At a refresh the gradient is NaN, infinite or zero: the basis stays, the failure is counted, the next usable
    gradient gives the new basis. Bases that do not look at the gradient are refreshed as ever."""
    for value in (math.nan, math.inf, 0.0):
        for victim in VICTIMS[:4]:
            named = leaves(FEW)
            optimizer = subject.build(named)
            p = dict(named)[victim]
            if "basis" not in optimizer.state[p]:
                continue
            transform: Any = optimizer._entries[p].transform
            transform = getattr(transform, "direction", transform)  # the subspace inside a wrapper
            if transform.refresh.period > PERIOD or isinstance(transform.residual, FeedbackResidual):
                continue  # never refreshed; or what is looked at is not the gradient alone
            when = PERIOD - 1 if transform.refresh.at == "end" else PERIOD
            drive(optimizer, named, 0, when)
            state = optimizer.state[p]
            looks = transform.basis.needs_gradient
            before = state["basis"].clone()
            weight = p.detach().clone()
            p.grad = torch.full_like(p, value) if value == 0.0 else _spoiled(victim, when, tuple(p.shape), value)
            optimizer.step()
            what = f"{victim}, gradient {value} at a refresh"
            assert torch.isfinite(state["basis"]).all(), f"{what}: the basis is not finite"
            numbers = not before.is_floating_point()  # of columns: by chance the same again
            assert numbers or bits_equal(state["basis"], before) == looks, f"{what}: kept should be {looks}"
            assert state["refresh_failures"] == int(looks), f"{what}: {state['refresh_failures']} failures counted"
            p.data.copy_(weight)
            drive(optimizer, [(victim, p)], when + 1, when + 2)
            assert numbers or not bits_equal(state["basis"], before), f"{what}: no new basis from the next gradient"
            assert torch.isfinite(state["basis"]).all(), f"{what}: the basis is not finite"
            assert state["refresh_failures"] == int(looks), f"{what}: a success was counted as a failure"


def _spoiled(name: str, step: int, shape: tuple[int, ...], value: float) -> torch.Tensor:
    grad = gradient(name, step, shape)
    grad.view(-1)[grad.numel() // 2] = value
    return grad


def _with_fault(subject: Subject, named: list, victim: str, when: int, value: float, storage: object) -> None:
    optimizer = subject.build(named, storage=storage)
    for step in range(PERIOD + 3):
        for name, p in named:
            p.grad = gradient(name, step, tuple(p.shape))
            if name == victim and step == when:
                p.grad = _spoiled(name, step, tuple(p.shape), value)
        optimizer.step()


CHECKS = (not_a_number_is_visible, infinity_raises_nothing, zero_gradient_is_harmless, basis_survives_a_bad_refresh)
