"""Forms of weights: split in 24 bits, int8, stochastic. Any method steps them in fp32, counts them, resumes, copies and releases them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.core.storage import LOW, Storage
from tare.core.weights import quantize_weights_
from tare.kernels import split24
from tare.testing.resume import through_file
from tare.testing.subject import (
    FEW,
    PERIOD,
    Net,
    Subject,
    bits_equal,
    drive,
    gradient,
    leaves,
    loss_of,
    measure,
    refuses,
    same,
    same_state,
    snapshot,
    train,
)

GROUP = 16  # small, so that leaves have several groups and a short last one
# Every form of a weight that is more than its tensor, with the dtype that it goes with.
WEIGHTS: dict[str, tuple[torch.dtype, Storage]] = {
    "split24": (torch.bfloat16, Storage(weight="split24")),
    "split24, int8 moments": (torch.bfloat16, Storage("int8", weight="split24", block=64, min_quantized=1)),
    "split24, bf16 moments": (torch.bfloat16, Storage("bf16", "bf16", "split24")),
    "int8": (torch.float32, Storage(weight="int8")),
    "int8 of bf16, int8 moments": (torch.bfloat16, Storage("int8", weight="int8", block=64, min_quantized=1)),
}


def kept_leaves(names: tuple[str, ...], dtype: torch.dtype, storage: Storage) -> list[tuple[str, nn.Parameter]]:
    """The leaves in the form that a storage keeps them in."""
    named = leaves(names, dtype)
    if storage.weight != "int8":
        return named
    return [(name, nn.Parameter(Int8Weight.encode(p, GROUP)) if p.ndim >= 2 and p.numel() else p) for name, p in named]


def kept_net(dtype: torch.dtype, storage: Storage) -> Net:
    net = Net().to(dtype)
    if storage.weight == "int8":
        quantize_weights_(net, targets=("linear", "head"), group=GROUP)
    return net


def _plain(named: Any) -> dict[str, Tensor]:
    """Copies as plain tensors, to compare bits: of an int8 weight its numbers."""
    return {name: p.dense() if isinstance(p, Int8Weight) else p.detach().clone() for name, p in named}


def every_weight_form_learns(subject: Subject) -> None:
    """Each form with this method: constructs, is counted, learns as the fp32 run does, and is explained."""
    reference = Net()
    start = measure(reference)
    gain = start - train(subject.build(reference), reference, 8)
    for form, (dtype, storage) in WEIGHTS.items():
        net = kept_net(dtype, storage)
        optimizer = subject.build(net, storage=storage)
        before = measure(net)
        after = train(optimizer, net, 8)
        # int8 weights of 16 to a group are steps of about a hundredth: noise, not bias
        assert before - after > 0.5 * gain, f"{form}: loss from {before:.4f} to {after:.4f}, fp32 gains {gain:.4f}"
        kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        total = sum(v.numel() * v.element_size() for v in kept)
        assert optimizer.state_bytes().total == total, form
        assert storage.weight in optimizer.explain(), f"{form} is not explained"


def split_weights_follow_fp32(subject: Subject) -> None:
    """A weight in 24 bits stays beside the fp32 one that gets the same gradients: no small step is lost."""
    lr, steps = 1e-5, 6
    names = ("tall.weight", "square.weight", "norm.weight")
    named, master = leaves(names, torch.bfloat16), leaves(names, torch.bfloat16)
    master = [(name, nn.Parameter(p.detach().float())) for name, p in master]
    one = subject.build(named, lr=lr, storage=Storage(weight="split24"))
    two = subject.build(master, lr=lr)
    start = snapshot(named)
    for step in range(steps):
        for (name, p), (_, q) in zip(named, master, strict=True):
            p.grad = gradient(name, step, tuple(p.shape), p.dtype)
            q.grad = p.grad.float()
        one.step()
        two.step()
    for (name, p), (_, q) in zip(named, master, strict=True):
        exact = split24.join(p.detach(), one.state[p][LOW])
        assert bits_equal(p.detach(), exact.bfloat16()) or (p - exact.bfloat16()).abs().max() <= p.abs().max() * 2**-8
        # Half a unit of the 16-bit significand at each step. Beside it a tenth of the way: projections and orthogonalisations of
        # 16-bit gradients are done in 16 bits, and a sign may flip. bf16 alone would lose all of the way.
        way = float((q.detach() - start[name].float()).norm())
        gap = float((exact - q.detach()).norm())
        lost = steps * 2.0**-16 * float(q.detach().norm())
        assert way > 0.0, f"{name} has not moved"
        assert gap <= lost + 0.1 * way, f"{name}: {gap:.3g} from the fp32 weight, which moved by {way:.3g}"


def weight_forms_resume(subject: Subject) -> None:
    """Saved before, at and after a refresh: the next steps are those of the run that never stopped, bit for bit."""
    for form, (dtype, storage) in WEIGHTS.items():
        for stop in (PERIOD - 1, PERIOD):
            named = kept_leaves(FEW, dtype, storage)
            optimizer = subject.build(named, weight_decay=0.1, storage=storage)
            drive(optimizer, named, 0, stop)
            saved = through_file({"weights": snapshot(named), "optimizer": optimizer.state_dict()})
            drive(optimizer, named, stop, stop + 3)
            fresh = [(name, nn.Parameter(weight)) for name, weight in saved["weights"].items()]
            resumed = subject.build(fresh, lr=1.0, weight_decay=0.7, storage=storage)
            resumed.load_state_dict(saved["optimizer"])
            drive(resumed, fresh, stop, stop + 3)
            what = f"{form}, resumed after update {stop}"
            same(_plain(fresh), _plain(named), what)
            for (_, p), (_, q) in zip(named, fresh, strict=True):
                assert type(p) is type(q), what
                same_state(resumed.state[q], optimizer.state[p], what)


def weight_forms_are_released_and_copied(subject: Subject) -> None:
    """Stepping inside backward gives the same bits; a copy of model and optimizer goes on as they do."""
    for form, (dtype, storage) in WEIGHTS.items():
        a, b = kept_net(dtype, storage), kept_net(dtype, storage)
        one = subject.build(a, storage=storage)
        try:
            two = subject.build(b, storage=storage, release=True)
        except InputError as refusal:
            if "release" in str(refusal):
                return
            raise
        for number in range(3):
            one.zero_grad()
            loss_of(a, number).backward()
            one.step()
            loss_of(b, number).backward()
            assert all(p.grad is None for p in b.parameters()), "release left a gradient"
            two.step()
        same(_plain(b.named_parameters()), _plain(a.named_parameters()), f"release, {form}")
        twin, opt = copy.deepcopy((a, one))
        train(one, a, 2)
        train(opt, twin, 2)
        same(_plain(twin.named_parameters()), _plain(a.named_parameters()), f"copy, {form}")


def weight_forms_at_odd_leaves(subject: Subject) -> None:
    """Scalars, rows, convolutions, experts, transposed matrices, chunks of large ones, zero and NaN gradients."""
    odd = ("row.weight", "column.weight", "one.weight", "experts.weight", "empty.weight")
    for form, (dtype, storage) in WEIGHTS.items():
        named = kept_leaves((*FEW, *odd), dtype, storage)
        before = _plain(named)
        optimizer = subject.build(named, storage=storage)
        drive(optimizer, named, 0, PERIOD + 1)
        for name, p in _plain(named).items():
            assert p.isfinite().all(), f"{name} is not finite, {form}"
            # few numbers may all be rounded back at random, and so may the small step of a leaf that is noisier than its company
            moved = (
                (subject.coupled and storage.weight == "int8")
                or p.numel() < (30 if storage.weight == "int8" else 4)
                or not torch.equal(p, before[name])
            )
            assert moved, f"{name} did not move, {form}"
        p = dict(named)["tall.weight"]
        p.grad = gradient("tall.weight", 9, tuple(p.shape), p.dtype)
        p.grad[0, 0] = torch.nan
        optimizer.step()
        assert p.isnan().any(), f"a NaN passed unseen, {form}"
    plain, strided = (leaves(("tall.weight", "conv.weight"), torch.bfloat16) for _ in range(2))
    strided[0][1].data = strided[0][1].data.t().contiguous().t()
    strided[1][1].data = strided[1][1].data.contiguous(memory_format=torch.channels_last)
    results = []
    for named in (plain, strided):
        optimizer = subject.build(named, storage=WEIGHTS["split24"][1])
        drive(optimizer, named, 0, PERIOD + 1)
        results.append({n: split24.join(p.detach(), optimizer.state[p][LOW]) for n, p in named})
    for name, value in results[0].items():
        gap = float((results[1][name].double() - value.double()).abs().max())
        assert gap < 1e-3, f"strided {name} differs by {gap:.3g}"  # 16-bit gradients; sums in another order


@contextmanager
def _told(*words: str) -> Iterator[None]:
    with refuses("storage.weight", *words):
        yield


def weight_forms_that_cannot_be_are_refused(subject: Subject) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        with _told("split24", "bf16", "tall.weight"):
            subject.build(leaves(dtype=dtype), storage=Storage(weight="split24"))
    with _told("split24", "int8"):
        named = kept_leaves(FEW, torch.bfloat16, WEIGHTS["int8"][1])
        subject.build(named, storage=Storage(weight="split24"))
    with _told("int8", "quantize_weights_"):
        subject.build(leaves(), storage=Storage(weight="int8"))


CHECKS = (
    every_weight_form_learns, split_weights_follow_fp32, weight_forms_resume, weight_forms_are_released_and_copied,
    weight_forms_at_odd_leaves, weight_forms_that_cannot_be_are_refused,
)  # fmt: skip
