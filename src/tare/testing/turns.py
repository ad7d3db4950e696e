"""Turns: methods under which blocks of leaves take turns in holding state. Others pass.

The other checks look at single leaves, with every leaf on (`Card.every_leaf`); here the method does as its defaults say.
"""

import copy
import functools
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.errors import CheckpointError
from tare.core.optimizer import Optimizer
from tare.core.turns import ACTIVE, UPDATES
from tare.methods import registry
from tare.testing.costs import allocated
from tare.testing.resume import through_file
from tare.testing.subject import FORMS, PERIOD, Subject, batch, refuses, same, same_state, snapshot

STEPS = 5 * PERIOD + 1  # a round of the four layers, and into the next


class Stack(nn.Module):
    """Embedding, four numbered layers of equal size, norm, head: a regression from tokens."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.embed = nn.Embedding(13, 8)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4))
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 13, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


def build(subject: Subject, params: Any, **own: Any) -> Optimizer:
    """The method with leaves at their turns."""
    usual = {name: subject.options[name] for name in registry.card(subject.key).every_leaf}
    return subject.build(params, **{**usual, **own})


def loss_of(net: nn.Module, number: int = 0) -> Tensor:
    tokens, targets = batch(number)
    return (net(tokens).float() - targets).square().mean()


def train(optimizer: Optimizer, net: nn.Module, first: int, last: int) -> None:
    for number in range(first, last):
        optimizer.zero_grad()
        loss_of(net, number).backward()
        optimizer.step()


def held(optimizer: Optimizer) -> set[str]:
    """Names of the leaves that take turns and have tensors in their state."""
    assert optimizer._turns is not None
    order = {name for wheel in optimizer._turns.wheels for name in wheel.rotation.order.spec()}
    return {
        optimizer._entries[p].leaf.name
        for wheel in optimizer._turns.wheels
        for p in wheel.block
        if any(isinstance(v, Tensor) for name, v in optimizer.state.get(p, {}).items() if name not in order)
    }


def on(optimizer: Optimizer) -> set[str]:
    """Names of the leaves whose block is on, by their state's own word."""
    return {optimizer._entries[p].leaf.name for p, s in optimizer.state.items() if s.get(ACTIVE)}


def trained(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


def only_what_is_on_holds_state(subject: Subject) -> None:
    """The account is the worst turn's, exactly; what goes off is freed, what comes on starts from nothing."""
    for form, storage in FORMS.items():
        for dtype in (torch.float32, torch.bfloat16):
            net = Stack().to(dtype)
            optimizer = build(subject, net, storage=storage)
            account, most, seen = optimizer.state_bytes().total, 0, set()
            for number in range(STEPS):
                most = max(most, allocated(optimizer))
                assert held(optimizer) <= on(optimizer), (
                    f"{form}: {held(optimizer) - on(optimizer)} hold state but are off"
                )
                seen |= on(optimizer)
                before = on(optimizer)
                train(optimizer, net, number, number + 1)
                if on(optimizer) != before:
                    counts = {optimizer._entries[p].leaf.name: s["step"] for p, s in optimizer.state.items()}
                    fresh = {name for name in on(optimizer) - before if counts[name]}
                    assert not fresh, f"{form}: {fresh} came on with a count of its own"
                assert optimizer.state_bytes().total == account, "the account moves with the turns"
            assert most == account, f"{form}, {dtype}: {most} bytes at most, but {account} in the account"
            assert len(seen) > len(on(optimizer)), "the same leaves at every turn"


def turns_learn(subject: Subject) -> None:
    net = Stack()
    before = float(loss_of(net).detach())
    optimizer = build(subject, net)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    after = float(loss_of(net).detach())
    assert after < 0.97 * before, f"loss from {before:.4f} to {after:.4f}"
    table = optimizer.explain()
    assert "turns: " in table, table
    assert f"{optimizer.state_bytes().total:,}" in table


def turns_resume_bit_for_bit(subject: Subject) -> None:
    """Saved before, at and after a turn, loaded into an optimizer at another: the same bits, and the same leaves with gradients."""
    for form, dtype in (("fp32", torch.float32), ("int8", torch.bfloat16), ("bf16", torch.bfloat16)):
        for stop in (1, PERIOD - 1, PERIOD, PERIOD + 1, 3 * PERIOD):
            what = f"stopped after {stop}, {form}, {dtype}"
            net, other = Stack().to(dtype), Stack().to(dtype)
            optimizer = build(subject, net, storage=FORMS[form])
            train(optimizer, net, 0, stop)
            optimizer.zero_grad()
            saved = through_file({"weights": snapshot(net.named_parameters()), "optimizer": optimizer.state_dict()})
            resumed = build(subject, other, storage=FORMS[form])
            train(resumed, other, 0, 2 * PERIOD)
            resumed.zero_grad()
            with torch.no_grad():
                for name, p in other.named_parameters():
                    p.copy_(saved["weights"][name])
            resumed.load_state_dict(saved["optimizer"])
            assert trained(other) == trained(net), f"{what}: other leaves have gradients"
            train(optimizer, net, stop, stop + 2 * PERIOD)
            train(resumed, other, stop, stop + 2 * PERIOD)
            same(snapshot(other.named_parameters()), snapshot(net.named_parameters()), what)
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                assert (p in optimizer.state) == (q in resumed.state), what
                if p in optimizer.state:
                    same_state(resumed.state[q], optimizer.state[p], what)


def a_state_without_what_is_on_is_refused(subject: Subject) -> None:
    """Tools that save only leaves with gradients, loaded at another turn: refused instead of starting from zero."""
    net = Stack()
    optimizer = build(subject, net)
    if not optimizer._turns or not any(wheel.rotation.gate for wheel in optimizer._turns.wheels):
        return
    train(optimizer, net, 0, PERIOD + 1)
    saved = optimizer.state_dict()
    saved["state"] = {number: state for number, state in saved["state"].items() if not state.get(ACTIVE)}
    fresh = build(subject, Stack())
    with refuses("load_state_dict", "requires_grad", kind=CheckpointError):
        fresh.load_state_dict(saved)


def release_turns_alike(subject: Subject) -> None:
    """Release mode takes the same turns as the normal one, bit for bit, and leaves no gradient."""
    for form in ("fp32", "int8"):
        a, b = Stack(), Stack()
        one, two = build(subject, a, storage=FORMS[form]), build(subject, b, storage=FORMS[form], release=True)
        for number in range(STEPS):
            train(one, a, number, number + 1)
            loss_of(b, number).backward()
            assert all(p.grad is None for p in b.parameters()), f"{form}: release left a gradient"
            two.step()
            same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), f"release, {form}, step {number}")
            assert on(two) == on(one)


def frozen_and_later_leaves_take_turns(subject: Subject) -> None:
    """What the user has frozen stays, and is given to nobody; a group that comes later takes its turns; in the end all have gradients."""
    net = Stack()
    net.layers[1].requires_grad_(False)
    start = snapshot(net.named_parameters())
    last = list(net.layers[3].named_parameters(prefix="layers.3"))
    optimizer = build(subject, [(n, p) for n, p in net.named_parameters() if not n.startswith("layers.3")])
    train(optimizer, net, 0, 4)
    optimizer.add_param_group({"params": last})
    train(optimizer, net, 4, STEPS)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}
    assert not any(name.startswith("layers.1.") for name in moved), "a frozen layer moved"
    assert "layers.3.0.weight" in moved, "the layer that came later did not move"
    assert {group[UPDATES] for group in optimizer.param_groups} == {STEPS}
    optimizer.close()
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert all(name.startswith("layers.1.") for name in frozen), f"{frozen} are left without gradients"


def the_next_optimizer_finds_all_leaves(subject: Subject) -> None:
    """An optimizer that was simply dropped leaves nothing frozen for the next one on the same model."""
    net = Stack()
    train(build(subject, net), net, 0, 2)
    second = registry.build("adamw", net, 1e-3)
    assert len(second.state) == len(list(net.parameters()))
    assert trained(net) == {name for name, _ in net.named_parameters()}


def missing_gradients_do_no_harm(subject: Subject) -> None:
    """A leaf without gradient at a turn, or a step with none at all: no exception, and no turn without an update."""
    net = Stack()
    optimizer = build(subject, net)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, number).backward()
        if number % PERIOD == 0:
            for p in list(net.parameters())[number % 3 :: 3]:
                p.grad = None
        optimizer.step()
    now, updates = on(optimizer), optimizer.param_groups[0][UPDATES]
    optimizer.zero_grad()
    for _ in range(2 * PERIOD):
        optimizer.step()
    assert on(optimizer) == now
    assert optimizer.param_groups[0][UPDATES] == updates, "steps without gradients were counted"


def copies_take_the_same_turns(subject: Subject) -> None:
    net = Stack()
    optimizer = build(subject, net)
    train(optimizer, net, 0, PERIOD + 1)
    buffer = io.BytesIO()
    pickle.dump((net, optimizer), buffer)
    buffer.seek(0)
    twins = [copy.deepcopy((net, optimizer)), pickle.load(buffer)]
    train(optimizer, net, PERIOD + 1, STEPS)
    for twin, own in twins:
        train(own, twin, PERIOD + 1, STEPS)
        same(snapshot(twin.named_parameters()), snapshot(net.named_parameters()), "a copy")
        assert trained(twin) == trained(net)


def the_seed_decides_the_turns(subject: Subject) -> None:
    """The same seed gives the same turns whatever the global generator says."""
    runs = []
    for state in (0, 1):
        torch.manual_seed(state)
        net = Stack()
        optimizer = build(subject, net, seed=3)
        seen = []
        for number in range(STEPS):
            train(optimizer, net, number, number + 1)
            seen.append(on(optimizer))
        runs.append(seen)
    assert runs[0] == runs[1]


def _where_leaves_take_turns(check: Any) -> Any:
    @functools.wraps(check)
    def run(subject: Subject) -> None:
        if build(subject, Stack())._turns is not None:
            check(subject)

    return run


CHECKS = tuple(_where_leaves_take_turns(check) for check in (
    only_what_is_on_holds_state, turns_learn, turns_resume_bit_for_bit, a_state_without_what_is_on_is_refused,
    release_turns_alike, frozen_and_later_leaves_take_turns, the_next_optimizer_finds_all_leaves,
    missing_gradients_do_no_harm, copies_take_the_same_turns, the_seed_decides_the_turns,
))  # fmt: skip
