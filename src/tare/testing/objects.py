"""T10: hooks, copies, pickles and words: an optimizer is an ordinary Python object and an ordinary torch optimizer."""

import copy
import io
import pickle
from typing import Any

import torch

from tare.testing.subject import FORMS, Net, Subject, drive, leaves, loss_of, same, same_state, snapshot, train


def hooks_run_in_order(subject: Subject) -> None:
    """Hooks on step, state_dict and load_state_dict run, in order, and can be removed."""
    named = leaves()
    optimizer = subject.build(named)
    seen: list[str] = []

    def note(word: str) -> Any:
        return lambda *_: seen.append(word)

    optimizer.register_step_post_hook(note("after"))
    removed = optimizer.register_step_pre_hook(note("removed"))
    optimizer.register_step_pre_hook(note("before"))
    removed.remove()
    drive(optimizer, named, 0, 1)
    assert seen == ["before", "after"], f"step hooks ran as {seen}"
    seen.clear()
    optimizer.register_state_dict_pre_hook(note("save before"))
    optimizer.register_state_dict_post_hook(note("save after"))
    optimizer.register_load_state_dict_pre_hook(note("load second"))
    optimizer.register_load_state_dict_pre_hook(note("load first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(note("load after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save before", "save after", "load first", "load second", "load after"], f"hooks ran as {seen}"


def load_hook_may_replace(subject: Subject) -> None:
    """A load pre-hook may return another state dict, as in torch."""
    named, other = leaves(), leaves()
    first, second = subject.build(named), subject.build(other)
    drive(first, named, 0, 2)
    saved = first.state_dict()
    second.register_load_state_dict_pre_hook(lambda _, __: saved)
    second.load_state_dict(subject.build(leaves()).state_dict())
    for (_, p), (_, q) in zip(named, other, strict=True):
        same_state(second.state[q], first.state[p], "replaced by the hook")


def copies_continue_alike(subject: Subject) -> None:
    """deepcopy and pickle of (model, optimizer) give independent twins that take the same steps."""
    for form, storage in FORMS.items():
        net = Net()
        optimizer = subject.build(net, storage=storage)
        train(optimizer, net, 4)
        buffer = io.BytesIO()
        pickle.dump((net, optimizer), buffer)
        buffer.seek(0)
        twins = [copy.deepcopy((net, optimizer)), pickle.load(buffer)]
        train(optimizer, net, 4)
        for twin, opt in twins:
            assert set(vars(opt)) == set(vars(optimizer)), "attributes were lost"
            assert [leaf.name for leaf in opt.leaves] == [leaf.name for leaf in optimizer.leaves]
            train(opt, twin, 4)
            same(snapshot(twin.named_parameters()), snapshot(net.named_parameters()), f"copy, {form}")


def words(subject: Subject) -> None:
    """repr names the class and its groups; explain has a line for every kind of leaf and the exact total."""
    net = Net()
    optimizer = subject.build(net)
    text = repr(optimizer)
    assert type(optimizer).__name__ in text, text
    assert "lr" in text, text
    table = optimizer.explain(every_leaf=True)
    for leaf in optimizer.leaves:
        assert leaf.name in table, f"{leaf.name} is not explained"
    assert f"{optimizer.state_bytes().total:,}" in table


def is_a_torch_optimizer(subject: Subject) -> None:
    """zero_grad, param_groups and defaults behave as in torch."""
    net = Net()
    optimizer = subject.build(net, lr=1e-2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"] == 1e-2
    loss_of(net).backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


CHECKS = (hooks_run_in_order, load_hook_may_replace, copies_continue_alike, words, is_a_torch_optimizer)
