"""Forward-only methods, when things go wrong: losses that are not finite, closures that raise or return no loss, models that change as
they run, gradients asked for. Nothing is lost, and one line says what to do.
"""

import copy
import math
import random
from typing import Any

import numpy
import torch
from torch import nn

from tare.core.clipping import NotFinite
from tare.testing.forward import ForwardSubject, Problem, drive
from tare.testing.subject import Net, loss_of, refuses, same, same_state
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.record import SKIPPED, SKIPS, STEPS


def _state(opt: ForwardOptimizer) -> list[dict[str, Any]]:
    return [copy.deepcopy(dict(opt.state[p])) for p in opt._entries if p in opt.state]


def _groups(opt: ForwardOptimizer, counted: bool = True) -> list[dict[str, Any]]:
    hidden = ("params",) if counted else ("params", STEPS, SKIPPED, SKIPS)
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name not in hidden}
        for group in opt.param_groups
    ]


def _unchanged(opt: ForwardOptimizer, problem: Problem, before: tuple[Any, Any, Any], what: str, counted: bool) -> None:
    weights, states, groups = before
    same(problem.snapshot(), weights, f"weights, {what}")
    for got, wanted in zip(_state(opt), states, strict=True):
        same_state(got, wanted, f"state, {what}")
    for got, wanted in zip(_groups(opt, counted), groups, strict=True):
        assert got.keys() == wanted.keys(), what
        for name, value in wanted.items():
            equal = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
            assert equal, f"{name} of a group is {got[name]}, was {value}: {what}"


def not_finite_losses_are_skipped(subject: ForwardSubject) -> None:
    """NaN or an infinity at any evaluation: no bit of weights or state changes, and the run goes on; too many in a row raise.

    A probe that bears some (`Probe`) skips the step when all are so, and with one of them takes it.
    """
    count = evaluations(subject)
    for value in (math.nan, math.inf, -math.inf):
        for bad in sorted({0, count - 1}):
            problem, opt = subject.start()
            drive(opt, problem, 0, 2)
            before = problem.snapshot(), _state(opt), _groups(opt, counted=False)
            calls = iter(range(10**6))
            bears = hasattr(opt.probe, "bearable")
            found = opt.step(lambda: problem.loss(2) + (value if next(calls) == bad or bears else 0.0))  # noqa: B023
            assert math.isnan(found), "the loss of a skipped step is NaN"
            _unchanged(opt, problem, before, f"after {value} at evaluation {bad}", counted=False)
            assert (opt.steps, opt.param_groups[0][SKIPPED], opt.skipped) == (3, 1, 1)
            if bears:
                calls = iter(range(10**6))
                opt.step(lambda: problem.loss(2) + (value if next(calls) == bad else 0.0))  # noqa: B023
                assert all(bool(p.isfinite().all()) for p in problem.tensors().values())
            drive(opt, problem, 3 + bears, 5 + bears)
            assert (opt.param_groups[0][SKIPPED], opt.skipped) == (0, 1)
            assert any(not torch.equal(p, before[0][name]) for name, p in problem.tensors().items()), (
                "it never moves again"
            )
    problem, opt = subject.start(patience=3)
    start = problem.snapshot()
    for _ in range(2):
        opt.step(lambda: problem.loss(0) * math.nan)
    with refuses("3 steps in a row", kind=NotFinite):
        opt.step(lambda: problem.loss(0) * math.nan)
    same(problem.snapshot(), start, "after NotFinite")


class Stop(Exception):
    """Raised by a closure."""


def a_closure_that_raises_loses_nothing(subject: ForwardSubject) -> None:
    """At any evaluation, under every memory plan, with random numbers drawn: all is as before, and the step can be taken again."""
    count = evaluations(subject)
    plans = ("auto", "in-place-exact") if "memory" in subject.options else ("",)
    for plan in plans:
        own: dict[str, Any] = {"memory": plan} if plan not in ("", "auto") else {}
        straight, alone = subject.start(**own)
        drive(alone, straight, 0, 4)
        for bad in sorted({0, 1, count // 2, count - 1}):
            problem, opt = subject.start(**own)
            drive(opt, problem, 0, 2)
            before = problem.snapshot(), _state(opt), _groups(opt)
            generator = torch.get_rng_state()
            calls = iter(range(10**6))

            def closure() -> Any:
                torch.rand(3)
                if next(calls) == bad:  # noqa: B023
                    raise Stop
                return problem.loss(2)  # noqa: B023

            try:
                opt.step(closure)
            except Stop:
                _unchanged(opt, problem, before, f"after an error at evaluation {bad}, {plan} plan", counted=True)
                assert torch.equal(torch.get_rng_state(), generator), "the global generator moved"
                drive(opt, problem, 2, 4)
                same(problem.snapshot(), straight.snapshot(), f"the step taken again, {plan} plan")


def evaluations(subject: ForwardSubject) -> int:
    """Of an ordinary step."""
    problem, opt = subject.start()
    drive(opt, problem, 0, 2)
    before = opt.evaluated
    drive(opt, problem, 2, 3)
    return max(1, opt.evaluated - before)


def random_numbers_fall_alike(subject: ForwardSubject) -> None:
    """What a closure draws (dropout, NumPy, Python) is the same at every evaluation of a step and other numbers at the next; the global
    generators end as if the closure had run once, and are not moved where it draws nothing."""
    problem, opt = subject.start()
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    drive(opt, problem, 0, 2)
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0]), "torch's global generator was used"
    assert before[1:] == after[1:], "Python's or NumPy's generator was used"
    drop = nn.Dropout(0.5)
    seen: list[tuple[Any, ...]] = []

    def draw() -> tuple[Any, ...]:
        return tuple(drop(torch.ones(64)).tolist()), random.random(), float(numpy.random.random())

    steps = []
    for number in range(3):
        seen.clear()
        opt.step(lambda number=number: (seen.append(draw()), problem.loss(number))[1])  # type: ignore[misc, func-returns-value]
        assert len(set(seen)) == 1, f"evaluations of one step drew {len(set(seen))} different numbers"
        steps.append(seen[0])
    assert len(set(steps)) == 3, "steps share their random numbers"
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    once = [draw()[:2] for _ in range(3)]
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    again = []
    for number in range(3):
        seen.clear()
        opt.step(lambda number=number: (seen.append(draw()), problem.loss(number))[1])  # type: ignore[misc, func-returns-value]
        again.append(seen[0][:2])
    assert again == once, "the generators do not stand where one call of the closure leaves them"


def what_is_no_loss_is_refused(subject: ForwardSubject) -> None:
    """One line each, and the weights as before."""
    problem, opt = subject.start()
    start = problem.snapshot()
    with refuses("closure"):
        opt.step()
    for value, word in (
        (None, "NoneType"), (torch.ones(3), "(3,)"), (torch.ones(()) * 1j, "complex"), ("low", "str"), (1j, "complex"), ((1.0,), "tuple"),
    ):  # fmt: skip
        with refuses("closure", word):
            opt.step(lambda value=value: value)  # type: ignore[misc]
    same(problem.snapshot(), start, "after refused losses")
    one = torch.ones(1, 1)
    fine: tuple[Any, ...] = (1, one, numpy.float32(2.5), numpy.array(2.5), one.half().sum())
    for number in fine:
        subject.start()[1].step(lambda number=number: number)  # type: ignore[misc]


def batch_statistics_are_refused(subject: ForwardSubject) -> None:
    """Batch normalisation that would move at every evaluation; in eval mode it runs."""
    if subject.problem().module is None or not isinstance(subject.problem().module, Net):
        return
    net = Net()
    net.norm = nn.BatchNorm1d(8)  # type: ignore[assignment]
    opt = subject.build(net)
    mean = net.norm.running_mean.clone()  # type: ignore[operator]
    with refuses("norm", "batch normalisation", "eval"):
        opt.step(lambda: loss_of(net))
    assert torch.equal(net.norm.running_mean, mean), "the statistics moved"  # type: ignore[arg-type]
    net.eval()
    opt.step(lambda: loss_of(net))


def gradients_are_not_for_it(subject: ForwardSubject) -> None:
    """Accumulation, backward and release have no meaning here, and say so; a closure that calls backward is told."""
    problem, opt = subject.start()
    start = problem.snapshot()
    with refuses("accumulating", "mean"), opt.accumulating():
        pass
    with refuses("backward", "step(closure)"):
        opt.backward(lambda: torch.ones(()))
    with refuses("release"):
        opt.clip_release(1.0)
    if problem.module is not None:
        with refuses("backward", "closure"):
            opt.step(lambda: problem.loss(0).backward())
    same(problem.snapshot(), start, "after refusals")
    opt.zero_grad()


def bad_values_are_refused(subject: ForwardSubject) -> None:
    """At construction, naming the option."""
    problem = subject.problem()
    for value in (-1.0, math.nan, math.inf, "fast"):
        with refuses("learning rate"):
            subject.build(problem.params, lr=value)
    bad: dict[str, tuple[Any, ...]] = {
        "weight_decay": (-0.1, math.nan), "seed": (-1, 0.5), "memory": ("somewhere",), "eps": (0.0, -1.0, math.nan), "n": (0, 1.5),
        "targets": ("no.such.layer",), "directions": ("gausian",), "rule": ("sdg",), "betas": ((1.0, 0.9), (0.9,)), "patience": (0, 1.5),
    }  # fmt: skip
    for name, values in bad.items():
        for value in values if name in subject.options else ():
            with refuses():
                subject.build(problem.params, **{name: value})


CHECKS = (
    not_finite_losses_are_skipped, a_closure_that_raises_loses_nothing, random_numbers_fall_alike, what_is_no_loss_is_refused,
    batch_statistics_are_refused, gradients_are_not_for_it, bad_values_are_refused,
)  # fmt: skip
