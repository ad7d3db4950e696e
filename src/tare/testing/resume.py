"""T2, T3, T4: a run that was saved and loaded continues bit for bit, through every door that torch offers."""

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tare.core.errors import CheckpointError
from tare.core.storage import Storage
from tare.testing.subject import (
    FEW,
    FORMS,
    LR,
    PERIOD,
    Net,
    Subject,
    drive,
    leaves,
    loss_of,
    refuses,
    same,
    same_state,
    snapshot,
    train,
    untouched_rng,
)  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def through_file(state: Any) -> Any:
    """A round trip through `torch.save` and the safe `torch.load`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resume_is_bit_exact(subject: Subject) -> None:
    """Saved before, at and after a refresh: the next steps are those of the run that never stopped."""
    cases: list[tuple[torch.dtype, Storage]] = [(torch.float32, storage) for storage in FORMS.values()]
    cases.append((torch.bfloat16, Storage("bf16", "bf16", "stochastic")))
    for number, (dtype, storage) in enumerate(cases):
        for stop in (PERIOD - 1, PERIOD, PERIOD + 1):
            named = leaves(FEW if number else None, dtype)
            optimizer = subject.build(named, weight_decay=0.1, storage=storage)
            drive(optimizer, named, 0, stop)
            saved = through_file({"weights": snapshot(named), "optimizer": optimizer.state_dict()})
            drive(optimizer, named, stop, stop + PERIOD + 1)
            fresh = [(name, nn.Parameter(weight)) for name, weight in saved["weights"].items()]
            # Another lr and decay on purpose: the saved ones count.
            resumed = subject.build(fresh, lr=1.0, weight_decay=0.7, storage=storage)
            resumed.load_state_dict(saved["optimizer"])
            drive(resumed, fresh, stop, stop + PERIOD + 1)
            what = f"resumed after update {stop}, {storage.moment} moments, {dtype}"
            same(snapshot(fresh), snapshot(named), what)
            for (_, p), (_, q) in zip(named, fresh, strict=True):
                same_state(resumed.state[q], optimizer.state[p], what)


def load_converts_nothing(subject: Subject) -> None:
    """dtype, shape and bytes of all state survive, for 32- and 16-bit parameters; the source is not shared."""
    for dtype in DTYPES:
        for storage in FORMS.values():
            named, other = leaves(FEW, dtype), leaves(FEW, dtype)
            first, second = subject.build(named, storage=storage), subject.build(other, storage=storage)
            drive(first, named, 0, 2)
            second.load_state_dict(first.state_dict())
            copies = [copy.deepcopy(dict(first.state[p])) for _, p in named]
            for (_, p), (_, q) in zip(named, other, strict=True):
                same_state(second.state[q], first.state[p], f"{dtype}, {storage.moment}")
            drive(second, other, 2, 4)
            for (_, p), kept in zip(named, copies, strict=True):
                same_state(first.state[p], kept, "the source of a load was changed by the other's steps")


def state_is_plain(subject: Subject) -> None:
    """`state[p]` holds tensors and ints and nothing else, contiguous, without grad; names do not depend on steps."""
    for storage in FORMS.values():
        named = leaves()
        optimizer = subject.build(named, storage=storage)
        before = {name: sorted(optimizer.state[p]) for name, p in named}
        drive(optimizer, named, 0, 2)
        for name, p in named:
            state = optimizer.state[p]
            assert sorted(state) == before[name], f"{name}: names changed with the first step"
            for key, value in state.items():
                assert type(key) is str, f"{name}: key {key!r}"
                assert type(value) in (int, Tensor), f"{name}.{key} is {type(value).__name__}"
                assert not (isinstance(value, Tensor) and (value.requires_grad or not value.is_contiguous()))
        only_plain(optimizer.state_dict()["param_groups"])


def only_plain(value: Any) -> None:
    """A state dict's groups hold tensors, numbers, words and None, in dicts and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert isinstance(key, str | int), f"key {key!r}"
            only_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            only_plain(item)
    else:
        assert value is None or isinstance(value, Tensor | int | float | str | bool), f"{value!r} in a state dict"


def loaded_groups_are_copies(subject: Subject) -> None:
    """A tensor lr is not shared between an optimizer and the one that was loaded from it."""
    named, other = leaves(), leaves()
    first, second = subject.build(named, lr=torch.tensor(LR)), subject.build(other, lr=torch.tensor(1.0))
    second.load_state_dict(first.state_dict())
    assert float(second.param_groups[0]["lr"]) == float(torch.tensor(LR))
    first.param_groups[0]["lr"].fill_(0.5)
    assert float(second.param_groups[0]["lr"]) != 0.5, "the two optimizers share one lr tensor"


def load_refuses_what_does_not_fit(subject: Subject) -> None:
    """Other groups, other parameters, other shapes, other storage: CheckpointError, and the optimizer is as before."""
    named = leaves()
    optimizer = subject.build(named)
    drive(optimizer, named, 0, 2)
    kept = {name: copy.deepcopy(dict(optimizer.state[p])) for name, p in named}
    half = len(named) // 2
    wrong = [
        subject.build([{"params": named[:half]}, {"params": named[half:]}]).state_dict(),
        subject.build(named[:half]).state_dict(),
        subject.build([(n, nn.Parameter(torch.zeros(*p.shape, 1))) for n, p in named]).state_dict(),
        subject.build(named, storage=FORMS["bf16_legacy"]).state_dict(),
        subject.build(named, storage=FORMS["int8"]).state_dict(),
    ]
    for state in wrong[:3]:
        with refuses("load_state_dict", kind=CheckpointError):
            optimizer.load_state_dict(state)
    if any(slot.spec.kind == "moment" for entry in optimizer._entries.values() for slot in entry.slots.values()):
        for state in wrong[3:]:
            with refuses("load_state_dict", kind=CheckpointError):
                optimizer.load_state_dict(state)
    for name, p in named:
        same_state(optimizer.state[p], kept[name], "after a refused load")


def names_match_before_positions(subject: Subject) -> None:
    """Named parameters find their state in any order; named and unnamed load from each other by position."""
    named = leaves()
    first = subject.build(named)
    drive(first, named, 0, 2)
    turned = list(reversed(leaves()))
    second = subject.build(turned)
    second.load_state_dict(first.state_dict())
    for name, p in turned:
        same_state(second.state[p], first.state[dict(named)[name]], f"{name} in reversed order")
    assert second.param_groups[0]["param_names"] == [name for name, _ in turned]
    for source, target in ((named, [p for _, p in leaves()]), ([p for _, p in leaves()], leaves())):
        roles = [{"params": source, "role": "norm"}], [{"params": target, "role": "norm"}]
        a, b = subject.build(roles[0]), subject.build(roles[1])
        b.load_state_dict(a.state_dict())


def distributed_checkpoint(subject: Subject) -> None:
    """Through torch.distributed.checkpoint's state dicts, nested and flat: nothing is disturbed, nothing converted."""
    for dtype, form in zip(DTYPES, ("int8", "fp32", "bf16"), strict=True):
        for storage in (FORMS[form],):
            for flat in (False, True):
                net, other = Net().to(dtype), Net().to(dtype)
                optimizer, fresh = subject.build(net, storage=storage), subject.build(other, storage=storage)
                train(optimizer, net, 2)
                optimizer.zero_grad()
                kept = [copy.deepcopy(dict(optimizer.state[p])) for p in net.parameters()]
                options = StateDictOptions(flatten_optimizer_state_dict=flat)
                before = snapshot(net.named_parameters())
                with untouched_rng():
                    saved = through_file(get_optimizer_state_dict(net, optimizer, options=options))
                    set_optimizer_state_dict(other, fresh, saved, options=options)
                what = f"{dtype}, {storage.moment}, {'flat' if flat else 'nested'}"
                same(snapshot(net.named_parameters()), before, f"weights after saving, {what}")
                for p, q, state in zip(net.parameters(), other.parameters(), kept, strict=True):
                    same_state(optimizer.state[p], state, f"saving disturbed the state, {what}")
                    same_state(fresh.state[q], state, f"loaded, {what}")
                other.load_state_dict(net.state_dict())
                train(optimizer, net, 3)
                train(fresh, other, 3)
                same(snapshot(other.named_parameters()), snapshot(net.named_parameters()), f"continued, {what}")


def older_state_lacks_new_flags(subject: Subject) -> None:
    """A state saved before a group option existed still loads; the option keeps its present value."""
    net = Net()
    optimizer = subject.build(net)
    loss_of(net).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["maximize"], group["seed"]
    fresh = subject.build(net, seed=4)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["seed"] == 4
    assert fresh.param_groups[0]["maximize"] is False


CHECKS = (
    resume_is_bit_exact, load_converts_nothing, state_is_plain, loaded_groups_are_copies, load_refuses_what_does_not_fit,
    names_match_before_positions, distributed_checkpoint, older_state_lacks_new_flags,
)  # fmt: skip
