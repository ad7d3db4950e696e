"""T1, the direction: every method learns, in every configuration that a torch optimizer is used in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from tare.testing.subject import FORMS, LR, Net, Subject, drive, leaves, loss_of, measure, near, same, snapshot, train

STEPS = 25


def loss_falls(subject: Subject) -> None:
    net = Net()
    before = measure(net)
    after = train(subject.build(net), net, STEPS)
    assert after < 0.99 * before, f"{STEPS} steps took the loss from {before:.4f} to {after:.4f}"


def loss_falls_with_weight_decay(subject: Subject) -> None:
    """With decay on one group only; the other group's weights do not shrink."""
    net = Net()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    rest = [p for p in net.parameters() if p.ndim != 2]
    optimizer = subject.build([{"params": matrices, "weight_decay": 0.1}, {"params": rest}])
    before = measure(net)
    assert train(optimizer, net, STEPS) < before
    named = leaves(("tall.weight", "norm.weight"))
    start = snapshot(named)
    optimizer = subject.build([{"params": [named[0]], "weight_decay": 0.5}, {"params": [named[1]]}], lr=0.1)
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if optimizer.recipe.decay == "l2":  # the rule turns wd W into a step of its own size
        assert named[0][1].norm() < start["tall.weight"].norm(), "coupled decay does not shrink"
    else:
        shrink = 1 / 1.05 if optimizer.recipe.decay == "prox" else 0.95
        near(
            snapshot(named[:1]),
            {"tall.weight": start["tall.weight"] * shrink},
            1e-6,
            f"decay {shrink:.4f}, lr wd = 0.05",
        )
    same(snapshot(named[1:]), {"norm.weight": start["norm.weight"]}, "no decay in the other group")


def loss_falls_non_contiguous(subject: Subject) -> None:
    """Transposed weights learn, and as contiguous ones do."""
    results = []
    for transposed in (False, True):
        net = Net()
        if transposed:
            for layer in (net.up, net.down, net.square, net.head, net.embed):
                layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
                assert not layer.weight.is_contiguous()
        before = measure(net)
        results.append((before, train(subject.build(net), net, STEPS)))
    (before, plain), (_, strided) = results
    assert strided < 0.99 * before, f"from {before:.4f} to {strided:.4f}"
    assert abs(strided - plain) < 1e-3 * before, f"strided {strided:.5f}, contiguous {plain:.5f}"


def loss_rises_with_maximize(subject: Subject) -> None:
    """`maximize` is the step of the negated gradient, bit for bit."""
    net = Net()
    before = measure(net)
    after = train(subject.build(net, maximize=True), net, STEPS)
    assert after > before, f"maximize took the loss from {before:.4f} to {after:.4f}"
    for storage in FORMS.values():
        up, down = leaves(), leaves()
        opt_up = subject.build(up, maximize=True, storage=storage)
        opt_down = subject.build(down, storage=storage)
        for _ in range(2):
            for (_, p), (_, q) in zip(up, down, strict=True):
                p.grad = torch.ones_like(p)
                q.grad = -torch.ones_like(q)
            opt_up.step()
            opt_down.step()
        near(snapshot(up), snapshot(down), 1e-6, f"maximize, {storage.moment}")


def group_learning_rates(subject: Subject) -> None:
    """A group with lr 1e-28 does not move; the other moves as if it were alone."""
    named = leaves()
    still, moving = named[::2], named[1::2]
    start = snapshot(still)
    drive(subject.build([{"params": still, "lr": 1e-28}, {"params": moving}]), named, 0, 4)
    same(snapshot(still), start, "lr 1e-28")
    if not subject.coupled:
        alone = [item for item in leaves() if item[0] in dict(moving)]
        drive(subject.build(alone), alone, 0, 4)
        same(snapshot(moving), snapshot(alone), "the other group")
    moved = [name for name, p in moving if p.numel() > 4 and torch.equal(p, dict(leaves())[name])]
    assert not moved, f"{moved} did not move"


def tensor_learning_rate(subject: Subject) -> None:
    """A 0-d or 1-element tensor lr gives the trajectory of the float, and is read anew at every step."""
    for lr in (torch.tensor(LR, dtype=torch.float64), torch.tensor([LR], dtype=torch.float64)):
        a, b = leaves(), leaves()
        one, two = subject.build(a), subject.build(b, lr=lr)
        drive(one, a, 0, 3)
        drive(two, b, 0, 3)
        one.param_groups[0]["lr"] = 2 * LR
        lr.fill_(2 * LR)
        drive(one, a, 3, 5)
        drive(two, b, 3, 5)
        same(snapshot(b), snapshot(a), "tensor lr")


def closure_has_gradients(subject: Subject) -> None:
    """`step(closure)` runs the closure with gradients on, also inside no_grad, and returns its loss."""
    a, b = Net(), Net()
    one, two = subject.build(a), subject.build(b)

    def closure() -> torch.Tensor:
        two.zero_grad()
        loss = loss_of(b)
        loss.backward()
        return loss

    for _ in range(4):
        one.zero_grad()
        wanted = loss_of(a)
        wanted.backward()
        one.step()
        with torch.no_grad():
            got = two.step(closure)
        assert torch.equal(got.detach(), wanted.detach()), "the closure's loss is returned"
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), "closure")


def schedulers_drive_the_step(subject: Subject) -> None:
    """LambdaLR equals setting lr by hand; the others run, with momentum cycling where the method has betas."""
    a, b = leaves(), leaves()
    one, two = subject.build(a), subject.build(b)
    schedule = lr_scheduler.LambdaLR(two, lambda t: 0.5**t)
    for t in range(4):
        one.param_groups[0]["lr"] = LR * 0.5**t
        drive(one, a, t, t + 1)
        drive(two, b, t, t + 1)
        schedule.step()
    same(snapshot(b), snapshot(a), "LambdaLR")
    cycle = "betas" in subject.options
    makers: tuple[Callable[[Any], Any], ...] = (
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=LR, total_steps=STEPS + 1, cycle_momentum=cycle),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    )
    for make in makers:
        net = Net()
        optimizer = subject.build(net)
        running = make(optimizer)
        plateau = isinstance(running, lr_scheduler.ReduceLROnPlateau)
        before = measure(net)
        after = train(optimizer, net, STEPS, lambda s=running, p=plateau: s.step(1.0) if p else s.step())  # type: ignore[misc]
        assert after < before, f"{type(running).__name__}: {before:.4f} to {after:.4f}"


def cycled_betas_are_used(subject: Subject) -> None:
    """Betas that a scheduler writes into the group take effect at the next step."""
    if "betas" not in subject.options:
        return
    a, b = leaves(), leaves()
    one, two = subject.build(a), subject.build(b)
    drive(one, a, 0, 2)
    drive(two, b, 0, 2)
    two.param_groups[0]["betas"] = (0.5, 0.6, *two.param_groups[0]["betas"][2:])
    drive(one, a, 2, 5)
    drive(two, b, 2, 5)
    unmoved = [n for (n, p), (_, q) in zip(a, b, strict=True) if p.numel() > 4 and torch.equal(p, q)]
    assert not unmoved, f"changed betas changed nothing for {unmoved}"


def grad_scaler(subject: Subject) -> None:
    """torch.amp.GradScaler: scaled gradients give the unscaled step; an overflow skips it and touches nothing."""
    a, b = Net(), Net()
    one, two = subject.build(a), subject.build(b)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        one.zero_grad()
        loss_of(a).backward()
        one.step()
        two.zero_grad()
        scaler.scale(loss_of(b)).backward()
        scaler.step(two)
        scaler.update()
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), "scaled by a power of two")
    two.zero_grad()
    scaler.scale(loss_of(b) * float("inf")).backward()
    before = snapshot(b.named_parameters())
    counts = [state["step"] for state in two.state.values()]
    scaler.step(two)
    scaler.update()
    same(snapshot(b.named_parameters()), before, "overflow")
    assert [state["step"] for state in two.state.values()] == counts, "a skipped step was counted"
    assert scaler.get_scale() == 512.0


CHECKS = (
    loss_falls, loss_falls_with_weight_decay, loss_falls_non_contiguous, loss_rises_with_maximize, group_learning_rates,
    tensor_learning_rate, closure_has_gradients, schedulers_drive_the_step, cycled_betas_are_used, grad_scaler,
)  # fmt: skip
