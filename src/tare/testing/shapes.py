"""T8, odd leaves: scalars, vectors, one row, one column, nothing, convolutions, experts, tied, frozen, added later, 16 bits."""

import torch
from torch import nn

from tare.testing.subject import FORMS, PERIOD, Net, Subject, drive, leaves, measure, near, same, snapshot, train

DTYPES = (torch.bfloat16, torch.float16, torch.float64)


def every_shape_moves(subject: Subject) -> None:
    """0-d, 1-D, 1 x n, n x 1, convolution, expert and zero-element leaves step over a refresh and stay finite."""
    for name, storage in FORMS.items():
        named = leaves()
        start = snapshot(named)
        drive(subject.build(named, storage=storage), named, 0, PERIOD + 2)
        for leaf, p in named:
            assert torch.isfinite(p).all(), f"{leaf} is not finite with {name} moments"
            assert p.numel() == 0 or not torch.equal(p, start[leaf]), f"{leaf} did not move with {name} moments"


def a_bad_neighbour_changes_nothing(subject: Subject) -> None:
    """Each leaf steps alone as it does in company."""
    if subject.coupled:
        return
    together = leaves()
    drive(subject.build(together), together, 0, PERIOD + 2)
    for item in leaves():
        drive(subject.build([item]), [item], 0, PERIOD + 2)
        same(snapshot([item]), {item[0]: dict(together)[item[0]].detach()}, "alone against in company")


def strided_leaves(subject: Subject) -> None:
    """Transposed matrices, channels-last convolutions and expanded gradients give the contiguous result."""
    names = ("tall.weight", "wide.weight", "square.weight", "conv.weight", "embed.weight")
    for form, storage in FORMS.items():
        plain, strided = leaves(names), leaves(names)
        for _, p in strided:
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
            else:
                p.data = p.data.t().contiguous().t()
            assert not p.is_contiguous()
        drive(subject.build(plain, storage=storage), plain, 0, PERIOD + 2)
        drive(subject.build(strided, storage=storage), strided, 0, PERIOD + 2)
        # 16-bit legacy arithmetic rounds at 2^-8 after each operation; the others only reorder fp32 sums.
        near(snapshot(strided), snapshot(plain), 1e-5 if form != "bf16_legacy" else 1e-3, f"strided, {form}")
    a, b = leaves(names[:2]), leaves(names[:2])
    one, two = subject.build(a), subject.build(b)
    for (_, p), (_, q) in zip(a, b, strict=True):
        row = torch.linspace(-1.0, 1.0, p.shape[1])
        p.grad = row.expand(p.shape).contiguous()
        q.grad = row.expand(p.shape)
    one.step()
    two.step()
    near(snapshot(b), snapshot(a), 5e-6, "an expanded gradient")  # rounding, enlarged by Adam in residuals


def tied_weights(subject: Subject) -> None:
    """A tied weight is one leaf: listed once, stepped once, and it learns."""
    net = Net(tied=True)
    optimizer = subject.build(net)
    names = [leaf.name for leaf in optimizer.leaves]
    assert names.count("embed.weight") == 1, f"tied weight listed as {names}"
    assert "head.weight" not in names, f"tied weight listed as {names}"
    before = measure(net)
    assert train(optimizer, net, 25) < before
    assert net.head.weight is net.embed.weight
    assert optimizer.state[net.embed.weight]["step"] == 25, "a tied weight was stepped twice"


def frozen_then_unfrozen(subject: Subject) -> None:
    """A frozen layer stays; thawed, it learns, and the others never noticed."""
    net = Net()
    net.up.weight.requires_grad_(False)
    optimizer = subject.build(net)
    start = net.up.weight.detach().clone()
    frozen = train(optimizer, net, 6)
    assert torch.equal(net.up.weight, start), "a frozen weight moved"
    net.up.weight.requires_grad_(True)
    thawed = train(optimizer, net, 20)
    assert not torch.equal(net.up.weight, start), "a thawed weight does not move"
    assert thawed < frozen
    net.up.weight.requires_grad_(False)
    net.up.weight.grad = None
    held = net.up.weight.detach().clone()
    train(optimizer, net, 2)
    assert torch.equal(net.up.weight, held), "a weight frozen again moved"


def added_later(subject: Subject) -> None:
    """A group added between steps steps like one that was there from its own first step, and has its own lr."""
    if subject.coupled:
        return
    named = leaves()
    old, new = named[::2], named[1::2]
    optimizer = subject.build(old)
    drive(optimizer, old, 0, 2)
    optimizer.add_param_group({"params": new, "lr": 1e-2})
    assert optimizer.param_groups[1]["lr"] == 1e-2
    assert len(optimizer.leaves) == len(named)
    drive(optimizer, named, 2, 6)
    whole = [item for item in leaves() if item[0] in dict(old)]
    drive(subject.build(whole), whole, 0, 6)
    same(snapshot(old), snapshot(whole), "the first group")
    fresh = [item for item in leaves() if item[0] in dict(new)]
    drive(subject.build(fresh, lr=1e-2), fresh, 2, 6)
    same(snapshot(new), snapshot(fresh), "the added group")
    total = sum(
        v.numel() * v.element_size()
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    )
    assert optimizer.state_bytes().total == total


def other_dtypes(subject: Subject) -> None:
    """bf16, fp16 and fp64 parameters keep their dtype, move, and stay close to the fp32 run."""
    wanted = leaves()
    drive(subject.build(wanted), wanted, 0, PERIOD + 2)
    for dtype in DTYPES:
        for form in ("fp32", "bf16", "int8"):
            if form != "fp32" and dtype == torch.float64:
                continue
            named = leaves(dtype=dtype)
            start = snapshot(named)
            drive(subject.build(named, storage=FORMS[form]), named, 0, PERIOD + 2)
            for name, p in named:
                assert p.dtype == dtype
                assert torch.isfinite(p).all(), f"{name}: {dtype} with {form} moments is not finite"
                assert p.numel() < 4 or not torch.equal(p, start[name]), f"{name}: {dtype} with {form} did not move"
            if form == "fp32" and dtype != torch.float64:
                # Weights near 1: bf16 keeps 2^-8 of them. Sign-like methods may flip on a rounded gradient: 5 steps of lr.
                near(snapshot(named), snapshot(wanted), 0.15, f"{dtype}")


def stochastic_weights(subject: Subject) -> None:
    """bf16 weights rounded stochastically: repeatable, at every shape, and steps below half an ulp are not lost."""
    storage = {"weight": "stochastic"}
    first, again = leaves(dtype=torch.bfloat16), leaves(dtype=torch.bfloat16)
    drive(subject.build(first, storage=storage), first, 0, PERIOD + 2)
    drive(subject.build(again, storage=storage), again, 0, PERIOD + 2)
    same(snapshot(again), snapshot(first), "stochastic rounding twice")
    weight = nn.Parameter(torch.ones(32, 24, dtype=torch.bfloat16))
    plain = nn.Parameter(weight.detach().clone())
    pair = [("big.weight", weight)], [("big.weight", plain)]
    drive(subject.build(pair[0], lr=1e-4, storage=storage), pair[0], 0, 3)
    drive(subject.build(pair[1], lr=1e-7), pair[1], 0, 3)
    assert torch.equal(plain, torch.ones_like(plain)), "lr 1e-7 is below the half ulp of 1 in bf16"
    assert not torch.equal(weight, torch.ones_like(weight)), "stochastic rounding lost every small step"


CHECKS = (
    every_shape_moves, a_bad_neighbour_changes_nothing, strided_leaves, tied_weights, frozen_then_unfrozen, added_later,
    other_dtypes, stochastic_weights,
)  # fmt: skip
