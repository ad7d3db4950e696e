"""T9 and the no-ops: what a step must leave alone: weights without gradient, the gradients themselves, the global generator."""

import torch

from tare.testing.subject import FORMS, Subject, drive, gradient, leaves, same, same_state, snapshot, untouched_rng


def no_gradient_no_change(subject: Subject) -> None:
    """Parameters without gradient, and their state, stay; a step with none at all does nothing."""
    named = leaves()
    optimizer = subject.build(named, weight_decay=0.1)
    start = snapshot(named)
    optimizer.step()
    same(snapshot(named), start, "no gradients at all")
    with_grad, without = named[::2], named[1::2]
    drive(optimizer, with_grad, 0, 3)
    same(snapshot(without), {name: start[name] for name, _ in without}, "no gradient")
    assert all(optimizer.state[p]["step"] == 0 for _, p in without), "leaves without gradient were counted"


def zero_gradient_no_change(subject: Subject) -> None:
    """Zero gradients from the start, without decay: no weight moves, at first, ordinary and refresh steps."""
    for storage in FORMS.values():
        named = leaves()
        optimizer = subject.build(named, storage=storage)
        start = snapshot(named)
        for _ in range(5):
            for _, p in named:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        same(snapshot(named), start, f"zero gradients, {storage.moment}")


def dcp_probe_leaves_no_trace(subject: Subject) -> None:
    """DCP probes an optimizer by a step with zero gradients and lr 0: weights and the global generator stay, and
    learning afterwards is possible."""
    named = leaves()
    optimizer = subject.build(named, weight_decay=0.1)
    start = snapshot(named)
    with untouched_rng():
        for _, p in named:
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
    same(snapshot(named), start, "lr 0")
    optimizer.param_groups[0]["lr"] = 1e-2
    drive(optimizer, named, 0, 3)
    still = [name for name, p in named if p.numel() and torch.equal(p, start[name])]
    assert not still, f"{still} no longer move after a zero gradient"
    assert all(torch.isfinite(p).all() for _, p in named), "not finite after a zero gradient"


def global_generator_is_not_used(subject: Subject) -> None:
    """Neither construction nor steps read or move the global generator; its state changes no result."""
    results = []
    for seed in (0, 99):
        torch.manual_seed(seed)
        with untouched_rng():
            named = leaves(dtype=torch.bfloat16)
            optimizer = subject.build(named, storage={"moment": "bf16", "weight": "stochastic"})
            drive(optimizer, named, 0, 5)
        results.append(snapshot(named))
    same(results[1], results[0], "another global seed")


def gradients_are_read_only(subject: Subject) -> None:
    """A step does not write to p.grad, nor change its shape: other code reads it after the step."""
    for maximize in (False, True):
        named = leaves()
        optimizer = subject.build(named, maximize=maximize)
        drive(optimizer, named, 0, 4)
        got = {name: p.grad for name, p in named if p.grad is not None}
        same(got, {name: gradient(name, 3, tuple(p.shape)) for name, p in named}, "p.grad after a step")


def init_state_is_idempotent(subject: Subject) -> None:
    """State exists from construction on; asking for it again changes nothing."""
    named = leaves()
    optimizer = subject.build(named)
    assert len(optimizer.state) == len(named), "state is allocated at construction"
    drive(optimizer, named, 0, 2)
    before = optimizer.state_dict()["state"]
    copies = {n: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for n, s in before.items()}
    optimizer.init_state()
    for number, state in optimizer.state_dict()["state"].items():
        same_state(state, copies[number], "init_state")


CHECKS = (
    no_gradient_no_change, zero_gradient_no_change, dcp_probe_leaves_no_trace, global_generator_is_not_used,
    gradients_are_read_only, init_state_is_idempotent,
)  # fmt: skip
