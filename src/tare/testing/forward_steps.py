"""Forward-only methods, stepping: they learn; seeds decide everything; order, ranks and memory plans nothing; what must rest, rests."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tare.core.random import make_key, normal
from tare.testing.forward import ForwardSubject, Problem, drive
from tare.testing.subject import near, same

STEPS = 5


def loss_falls(subject: ForwardSubject) -> None:
    problem, opt = subject.start()
    before = problem.measure()
    drive(opt, problem, 0, subject.trial.steps)
    after = problem.measure()
    assert after < 0.9 * before, f"{subject.trial.steps} steps took the loss from {before:.4f} to {after:.4f}"


def maximize_is_the_negated_loss(subject: ForwardSubject) -> None:
    """To ascend f is to descend -f, bit for bit."""
    if "maximize" not in subject.options:
        return
    up, one = subject.start(maximize=True)
    down, two = subject.start()
    negated = Problem(down.params, lambda number: -down.loss(number), down.tensors, down.measure)
    drive(one, up, 0, STEPS)
    drive(two, negated, 0, STEPS)
    same(up.snapshot(), down.snapshot(), "f ascended, -f descended")


def seeds_decide_everything(subject: ForwardSubject) -> None:
    """The same seed gives the same bits whatever the global generators hold, as on ranks; another seed others."""
    found = []
    for seed, rank in ((3, 0), (3, 99), (4, 0)):
        torch.manual_seed(rank)
        problem, opt = subject.start(seed=seed)
        drive(opt, problem, 0, STEPS)
        found.append(problem.snapshot())
    same(found[1], found[0], "the same seed, another global one")
    assert any(not torch.equal(found[2][name], value) for name, value in found[0].items()), (
        "another seed changed nothing"
    )


def order_does_not_matter(subject: ForwardSubject) -> None:
    """Named leaves from the last to the first, all in a group or each in its own."""
    found = []
    for arrange in (list, _reversed, _alone):
        problem = subject.problem()
        if problem.module is None:
            return
        named = arrange(problem.module.named_parameters())
        opt = subject.build(named)
        drive(opt, problem, 0, STEPS)
        found.append(problem.snapshot())
    same(found[1], found[0], "reversed")
    same(found[2], found[0], "a group for each leaf")


def _reversed(named: object) -> list[tuple[str, Tensor]]:
    return list(reversed(list(named)))  # type: ignore[call-overload]


def _alone(named: object) -> list[dict[str, list[tuple[str, Tensor]]]]:
    return [{"params": [item]} for item in named]  # type: ignore[attr-defined]


def equal_losses_move_nothing_but_decay(subject: ForwardSubject) -> None:
    """A loss that does not depend on the weights: they stay, bit for bit; with decay they shrink, but for names that it passes by."""
    problem, opt = subject.start()
    start = problem.snapshot()
    for _ in range(STEPS):
        opt.step(lambda: 1.25)
    same(problem.snapshot(), start, "a constant loss")
    if "weight_decay" not in subject.options:
        return
    problem, opt = subject.start(lr=0.1, weight_decay=0.5)
    trained, before = {leaf.draw(0).leaf.name: leaf for leaf in opt._moved()}, opt.steps
    for _ in range(STEPS):
        opt.step(lambda: 1.25)
    moved = sum(1 for _ in range(opt.steps - before))
    for name, value in problem.tensors().items():
        if name in trained and trained[name].directed.decays:
            assert value.norm() < start[name].norm() or not start[name].any(), f"{name} does not decay"
            least = start[name].norm() * (1 - 0.05) ** moved * (1 - 1e-5)
            assert value.norm() >= least, f"{name}: decays faster than (1 - lr wd) a step"
        else:
            same({name: value.detach()}, {name: start[name]}, "a name that decay passes by")


def lr_zero_moves_nothing(subject: ForwardSubject) -> None:
    """Evaluating leaves no trace in the weights, under every plan that puts them back exactly; in 16 bits too."""
    for dtype in (torch.float32, torch.bfloat16):
        for plan in ("auto", "in-place-exact") if "memory" in subject.options else ("",):
            problem, opt = subject.start(dtype, lr=0.0, **({"memory": plan} if plan not in ("", "auto") else {}))
            start = problem.snapshot()
            drive(opt, problem, 0, 3)
            same(problem.snapshot(), start, f"lr 0, {plan or 'its own'} plan, {dtype}")


def memory_plans_agree(subject: ForwardSubject) -> None:
    """Perturbed inside forward or in place: the same bits."""
    if "memory" not in subject.options or subject.problem().module is None:
        return
    found = []
    for plan in ("forward", "in-place-exact"):
        problem, opt = subject.start(memory=plan)
        drive(opt, problem, 0, STEPS)
        found.append(problem.snapshot())
    same(found[1], found[0], "in place, and inside forward")


def sixteen_bit_weights_move(subject: ForwardSubject) -> None:
    """By steps far below the gap between two numbers: by default they add up on average, as those of float32 weights do."""
    for dtype in (torch.bfloat16, torch.float16):
        problem, opt = subject.start(dtype)
        if not any(p.dtype == dtype for p in problem.tensors().values()):
            return
        start = problem.snapshot()
        for group in opt.param_groups:
            group["lr"] = 1e-3 * float(group["lr"])
        drive(opt, problem, 0, STEPS)
        moved = sum(int((value != start[name]).sum()) for name, value in problem.tensors().items())
        assert moved > 0, f"no {dtype} weight moved"
        assert all(bool(p.isfinite().all()) for p in problem.tensors().values())


def frozen_leaves_rest(subject: ForwardSubject) -> None:
    """Frozen ones bit for bit, and without state; unfrozen, they move."""
    problem = subject.problem()
    if problem.module is None:
        return
    trained = {leaf.draw(0).leaf.name for leaf in subject.build(problem.params)._moved()}
    named = dict(problem.module.named_parameters())
    victims = sorted(trained)[::2]
    if len(victims) == len(trained):
        return
    for name in victims:
        named[name].requires_grad_(False)
    opt = (
        subject.build(problem.params, weight_decay=0.1)
        if "weight_decay" in subject.options
        else subject.build(problem.params)
    )
    start = problem.snapshot()
    drive(opt, problem, 0, STEPS)
    same({name: named[name].detach() for name in victims}, {name: start[name] for name in victims}, "frozen")
    assert all(named[name] not in opt.state for name in victims), "frozen leaves have state"
    for name in victims:
        named[name].requires_grad_(True)
    drive(opt, problem, STEPS, 2 * STEPS)
    still = [name for name in victims if torch.equal(named[name], start[name])]
    assert not still, f"{still} do not move when they are no longer frozen"


def rates_are_read_anew(subject: ForwardSubject) -> None:
    """A scheduler, a tensor, a group's own rate: the same bits as setting the number by hand."""
    found = []
    for way in range(3):
        rate = subject.trial.lr
        problem, opt = subject.start(lr=torch.tensor(rate, dtype=torch.float64) if way == 1 else rate)
        schedule = LambdaLR(opt, lambda t: 0.5**t) if way == 0 else None
        for number in range(4):
            if way == 1:
                opt.param_groups[0]["lr"].fill_(rate * 0.5**number)
            elif way == 2:
                opt.param_groups[0]["lr"] = rate * 0.5**number
            drive(opt, problem, number, number + 1)
            if schedule is not None:
                schedule.step()
        found.append(problem.snapshot())
    near(found[0], found[2], 1e-7, "LambdaLR")
    same(found[1], found[2], "a tensor")


def shapes_of_all_kinds(subject: ForwardSubject) -> None:
    """0-d, empty, one-row, convolution, experts, tied and strided weights: finite, and every trained one with elements moves."""
    problem = subject.problem()
    if problem.module is None:
        return
    module = Odd()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    opt = subject.build(module)
    trained = {leaf.draw(0).leaf.name for leaf in opt._moved()}
    for number in range(STEPS):
        opt.step(lambda number=number: module(number))  # type: ignore[misc]
    for name, p in module.named_parameters():
        assert bool(p.isfinite().all()), f"{name} is not finite"
        if p.numel():
            assert torch.equal(p, start[name]) == (name not in trained), (
                f"{name} {'rests' if name in trained else 'moves'}"
            )
    assert module.tied is module.matrix, "the tie is gone"


class Odd(nn.Module):
    """A loss of leaves of all kinds, read as they are."""

    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        "matrix": (12, 5), "wide": (5, 12), "row": (1, 9), "column": (9, 1), "one": (1, 1), "experts": (3, 4, 5),
        "kernel": (4, 3, 3, 3), "vector": (7,), "gain": (), "empty": (0, 4),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        for name, shape in self.SHAPES.items():
            self.register_parameter(name, nn.Parameter(normal(make_key(4, name), shape)))
        self.tied = self.matrix
        self.strided = nn.Parameter(normal(make_key(4, "strided"), (6, 8)).t())

    def forward(self, number: int) -> Tensor:
        total = torch.zeros(())
        for name, p in self.named_parameters():
            target = normal(make_key(5, name, number), tuple(p.shape))
            total = total + (p - target).square().sum()
        return total / math.prod(self.SHAPES["matrix"])


CHECKS = (
    loss_falls, maximize_is_the_negated_loss, seeds_decide_everything, order_does_not_matter, equal_losses_move_nothing_but_decay,
    lr_zero_moves_nothing, memory_plans_agree, sixteen_bit_weights_move, frozen_leaves_rest, rates_are_read_anew, shapes_of_all_kinds,
)  # fmt: skip
