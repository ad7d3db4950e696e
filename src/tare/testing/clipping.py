"""Release with clipping and accumulation: the step is that of the normal mode with the same factor, in every storage form and
wherever its bases come from, or it is refused with the reason.
"""

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor

from tare.core.clipping import NORM
from tare.core.errors import InputError
from tare.core.optimizer import Optimizer
from tare.methods import registry
from tare.testing.resume import through_file
from tare.testing.subject import FORMS, PERIOD, Net, Subject, loss_of, near, refuses, same, same_state, snapshot

LIMIT = 0.05  # the norm of the little model's gradient is 0.3 to 0.6: every step is clipped
STEPS = PERIOD + 2  # past a refresh


def _releasing(subject: Subject, net: Net, mode: str, **own: Any) -> Optimizer:
    optimizer = subject.build(net, release=True, **own)
    optimizer.clip_release(LIMIT, mode)  # type: ignore[arg-type]
    return optimizer


def _refusal(optimizer: Optimizer) -> str:
    try:
        with optimizer.accumulating():
            return ""
    except InputError as error:
        return str(error)


def _plain_step(optimizer: Optimizer, net: Net, losses: Any, factor: float) -> float:
    """An ordinary step with every gradient multiplied by `factor`; the norm before."""
    optimizer.zero_grad()
    for loss in losses:
        loss().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    for grad in gradients:
        grad.mul_(factor)
    optimizer.step()
    return norm


def release_clips_as_the_normal_mode(subject: Subject) -> None:
    """Two-pass: torch's factor for this step. Previous: that of the step before. Else bit for bit the ordinary step."""
    for mode in ("two-pass", "previous"):
        for form, storage in FORMS.items():
            a, b = Net(), Net()
            one, two = subject.build(a, storage=storage), _releasing(subject, b, mode, storage=storage)
            before = None
            for number in range(STEPS):
                what = f"{mode}, {form}, step {number + 1}"
                two.backward(lambda: loss_of(b, number))  # noqa: B023  (called at once)
                assert all(p.grad is None for p in b.parameters()), f"{what}: a gradient is left"
                two.step()
                done = two.clipped
                assert done is not None, f"{what}: nothing is told of the norm"
                norm = _plain_step(one, a, [lambda: loss_of(a, number)], done.factor)  # noqa: B023
                assert done.norm is not None, f"{what}: no norm"
                assert math.isclose(done.norm, norm, rel_tol=1e-5), f"{what}: norm {done.norm}, torch has {norm}"
                used = norm if mode == "two-pass" or before is None else before
                wanted = min(1.0, LIMIT / (used + 1e-6))
                assert math.isclose(done.factor, wanted, rel_tol=1e-5), f"{what}: factor {done.factor}, not {wanted}"
                before = norm
                same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), what)


def release_norm_is_saved(subject: Subject) -> None:
    """Clipping by the step before goes on bit for bit after a save and a load, whichever of load and `clip_release` is first."""
    a = Net()
    one = _releasing(subject, a, "previous")
    for number in range(PERIOD):
        one.backward(lambda: loss_of(a, number))  # noqa: B023
        one.step()
    saved = through_file({"model": a.state_dict(), "optimizer": one.state_dict()})
    for clip_first in (True, False):
        b, c = Net(), copy.deepcopy(a)
        b.load_state_dict(saved["model"])
        two, three = subject.build(b, release=True), subject.build(c, release=True)
        for optimizer in (two, three):
            if clip_first:
                optimizer.clip_release(LIMIT, "previous")
            optimizer.load_state_dict(saved["optimizer"])
            if not clip_first:
                optimizer.clip_release(LIMIT, "previous")
            assert optimizer.param_groups[0][NORM] == one.param_groups[0][NORM], "the norm was not saved"
        for number in range(2):
            for optimizer, net in ((two, b), (three, c)):
                optimizer.backward(lambda: loss_of(net, number))  # noqa: B023
                optimizer.step()
        same(snapshot(b.named_parameters()), snapshot(c.named_parameters()), "two loads of one state")
    for number in range(2):
        one.backward(lambda: loss_of(a, number))  # noqa: B023
        one.step()
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), "resumed with clipping by the step before")


def a_bad_norm_moves_nothing(subject: Subject) -> None:
    """Two-pass: one NaN anywhere and neither weight nor state changes, of no leaf; the next step is an ordinary one."""
    for storage in (FORMS["fp32"], FORMS["int8"]):
        net = Net()
        optimizer = _releasing(subject, net, "two-pass", storage=storage)
        optimizer.backward(lambda: loss_of(net, 0))  # noqa: B023
        optimizer.step()
        before = snapshot(net.named_parameters())
        states = [copy.deepcopy(dict(optimizer.state[p])) for p in net.parameters()]

        def bad() -> Tensor:
            # The embedding's gradient is the last one in backward: all others are fine, and would have been stepped.
            return loss_of(net, 1) + (net.embed.weight * math.inf).sum().nan_to_num(0.0)  # noqa: B023

        optimizer.backward(bad)
        optimizer.step()
        assert optimizer.clipped is not None
        assert not math.isfinite(optimizer.clipped.norm or 0.0), "the bad norm is not told"
        same(snapshot(net.named_parameters()), before, "weights after a gradient that is not finite")
        for p, state in zip(net.parameters(), states, strict=True):
            same_state(optimizer.state[p], state, "state after a gradient that is not finite")
        optimizer.backward(lambda: loss_of(net, 1))  # noqa: B023
        optimizer.step()
        assert math.isfinite(optimizer.clipped.norm or math.nan), "the step after a bad one"


def release_accumulates_and_clips_or_refuses(subject: Subject) -> None:
    """Three micro-batches and clipping: equal to the normal mode, refreshes included, or refused with the reason."""
    for mode in ("two-pass", "previous"):
        for parts in (1, 3) if mode == "two-pass" else (1,):
            a, b = Net(), Net()
            one, two = subject.build(a), subject.build(b, release=True)
            two.clip_release(LIMIT, mode, parts=parts)
            if refusal := _refusal(two):
                assert all(word in refusal for word in ("release", "micro-batch", "whole one")), refusal
                continue
            for number in range(STEPS):
                what = f"three micro-batches, {mode}, step {number + 1}"
                losses = {
                    net: [lambda net=net, part=part: loss_of(net, 3 * number + part) / 3 for part in range(3)]  # noqa: B023
                    for net in (a, b)
                }
                two.backward(*losses[b])
                two.step()
                done = two.clipped
                assert done is not None
                assert done.norm is not None, f"{what}: no norm"
                norm = _plain_step(one, a, losses[a], done.factor)
                assert math.isclose(done.norm, norm, rel_tol=1e-4), f"{what}: norm {done.norm}, torch has {norm}"
                # Sums of projections against projections of sums, at steps of 5e-3.
                near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), 1e-5, what)


def bases_in_passes_are_those_of_the_normal_mode(subject: Subject) -> None:
    """Bases from the sum of micro-batches, a share of the leaves in each pass, clipped or not: the normal mode's steps."""
    for parts, limit in ((2, None), (3, LIMIT)):
        a, b = Net(), Net()
        one, two = subject.build(a), subject.build(b, release=True)
        if _refusal(two):
            continue
        two.refresh_release("sum", parts=parts)
        if limit is not None:
            two.clip_release(limit, "two-pass", parts=2)
        for number in range(STEPS):
            losses = {
                net: [lambda net=net, part=part: loss_of(net, 3 * number + part) / 3 for part in range(3)]  # noqa: B023
                for net in (a, b)
            }
            two.backward(*losses[b])
            two.step()
            _plain_step(one, a, losses[a], two.clipped.factor if two.clipped else 1.0)
            what = f"three micro-batches, bases in {parts} passes, clipped to {limit}, step {number + 1}"
            near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), 1e-5, what)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            counts = [{k: v for k, v in o.state[x].items() if isinstance(v, int)} for o, x in ((one, p), (two, q))]
            assert counts[0] == counts[1], f"counts in {parts} passes: {counts[1]}, not {counts[0]}"


def equal_micro_batches_have_one_basis(subject: Subject) -> None:
    """Bases from the first of two equal micro-batches: half the gradient has the same ones, so it is the normal mode again."""
    a, b = Net(), Net()
    one, two = subject.build(a), subject.build(b, release=True)
    if _refusal(two):
        return
    two.refresh_release("first")
    for number in range(STEPS):
        losses = {net: [lambda net=net: loss_of(net, number) / 2] * 2 for net in (a, b)}  # noqa: B023
        two.backward(*losses[b])
        two.step()
        _plain_step(one, a, losses[a], 1.0)
        near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), 1e-5, f"from the first, step {number + 1}")


def two_passes_are_asked_for(subject: Subject) -> None:
    """A step that was not measured is refused before anything moves; without release there is nothing to set."""
    net = Net()
    optimizer = _releasing(subject, net, "two-pass")
    before = snapshot(net.named_parameters())
    with refuses("measuring", "two-pass"):
        loss_of(net).backward()
    same(snapshot(net.named_parameters()), before, "an unmeasured step")
    optimizer.close()
    with refuses("release=False"):
        subject.build(Net()).clip_release(1.0)


def _where_released(check: Any) -> Any:
    """The check, or for a method whose card says `no` only that release is refused."""

    @functools.wraps(check)
    def run(subject: Subject) -> None:
        if registry.card(subject.key).release != "no":
            check(subject)
            return
        with refuses("release"):
            subject.build(Net(), release=True)

    return run


CHECKS = tuple(_where_released(check) for check in (
    release_clips_as_the_normal_mode, release_norm_is_saved, a_bad_norm_moves_nothing,
    release_accumulates_and_clips_or_refuses, bases_in_passes_are_those_of_the_normal_mode, equal_micro_batches_have_one_basis,
    two_passes_are_asked_for,
))  # fmt: skip
