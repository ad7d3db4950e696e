"""Bases from the sum of micro-batches in several passes, drawn ones, and steps that are dropped after a basis was computed."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from release_cases import PERIOD, RANK, dense, micro_batches, ordinary_step, projected, whole_gradients
from torch import Tensor, nn

import tare
from tare.core.clipping import NotFinite
from tare.core.errors import InputError
from tare.core.gathering import passes
from tare.subspace.bases import Basis, GaussianBasis, OrthonormalBasis
from tare.subspace.coordinates import CoordinateBasis
from tare.testing.resume import through_file
from tare.testing.subject import Net, loss_of, near, same, same_state, snapshot

# -- in passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [False, True])
def test_passes_find_the_same_bits(clipped: bool) -> None:
    """The basis of the first step is that of the normal mode bit for bit: the same sum, clipped by the same factor."""
    a, b = Net(), Net()
    one, two = projected(a, release=False), projected(b)
    two.refresh_release("sum", parts=3)
    if clipped:
        two.clip_release(0.05, "two-pass")
    two.backward(*micro_batches(b, 0))
    two.step()
    ordinary_step(one, micro_batches(a, 0), two.clipped.factor if two.clipped else 1.0)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        if "basis" in one.state[p]:
            assert torch.equal(two.state[q]["basis"], one.state[p]["basis"])


AXES: dict[str, dict[str, Any]] = {
    "maximize": {"maximize": True},
    "coupled decay": {"decay": "l2", "weight_decay": 0.3},
    "both sides": {"side": "both", "transfer": "rotate"},
    "rotated, 8 bits": {"transfer": "rotate", "storage": tare.Storage("int8", "int8", block=64, min_quantized=1, group=64)},
    "rotated, 4 bits": {"transfer": "rotate", "storage": tare.Storage("int4", "int4", block=64, min_quantized=1, group=64)},
    "cleared, bf16": {"transfer": "zero", "storage": tare.Storage("bf16", "bf16")},
    "columns": {"basis": CoordinateBasis(RANK, "columns", order="greedy"), "transfer": "rotate"},
}  # fmt: skip


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_passes_on_every_axis(axes: dict[str, Any]) -> None:
    a, b = Net(), Net()
    one, two = projected(a, release=False, **axes), projected(b, **axes)
    two.refresh_release("sum", parts=2)
    for step in range(PERIOD + 1):
        ordinary_step(one, micro_batches(a, step))
        two.backward(*micro_batches(b, step))
        two.step()
        # A sum of projections against the projection of a sum; quantised moments may then round to the next code.
        tolerance = 1e-3 if "storage" in axes else 1e-5
        near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), tolerance, f"step {step}")


class Dropping(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(tokens), 0.5)


def test_every_pass_sees_the_same_dropout() -> None:
    a, b = Dropping(), Dropping()
    one, two = projected(a, release=False), projected(b)
    two.refresh_release("sum", parts=3)
    drawn = []
    for net in (a, b):
        torch.manual_seed(5)
        for step in range(PERIOD + 1):
            if net is a:
                ordinary_step(one, micro_batches(a, step))
            else:
                two.backward(*micro_batches(b, step))
                two.step()
        drawn.append(torch.get_rng_state())
    assert torch.equal(*drawn)
    near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), 1e-5, "with dropout")


def test_a_hand_written_loop() -> None:
    a, b = Net(), Net()
    one, two = projected(a), projected(b)
    for optimizer in (one, two):
        optimizer.refresh_release("sum", parts=3)

    def all_of(losses: list[Callable[[], Tensor]]) -> None:
        for number, loss in enumerate(losses, 1):
            if number < len(losses):
                with two.accumulating():
                    loss().backward()
            else:
                loss().backward()

    for step in range(PERIOD + 1):
        one.backward(*micro_batches(a, step))
        one.step()
        assert two.refresh_passes == (2 if step % PERIOD == 0 else 0)
        for part in range(two.refresh_passes):
            with two.refreshing(part):
                all_of(micro_batches(b, step))
        all_of(micro_batches(b, step))
        two.step()
        same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), f"step {step}")


def test_passes_are_as_few_as_will_do() -> None:
    net = Net()
    optimizer = projected(net, refresh=tare.every(PERIOD, stagger=True))
    optimizer.refresh_release("sum", parts=2)
    counts = []
    for step in range(2 * PERIOD):
        counts.append(optimizer.refresh_passes)
        optimizer.backward(*micro_batches(net, step))
        optimizer.step()
    assert counts == [1, 0, 0, 0, 0, 0]  # one leaf alone is less than a share
    assert passes([1] * 10, 10, 4) == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    assert passes([1] * 3, 10, 4) == [[0, 1], [2]]
    assert passes([6], 10, 4) == [[0]]
    assert passes([0], 0, 4) == [[0]]


# -- drawn from a key --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "seed"])
@pytest.mark.parametrize(
    "basis", [GaussianBasis(RANK), OrthonormalBasis(RANK), CoordinateBasis(RANK, "rows")], ids=lambda b: b.describe()
)
def test_a_drawn_basis_needs_no_gradient(basis: Basis, storage: Any) -> None:
    """Nothing that is projected is held, in no step, and the steps are those of the normal mode, without any setting."""
    a, b = Net(), Net()
    axes: dict[str, Any] = {"basis": basis, "transfer": "zero", "storage": tare.Storage(basis=storage)}
    one, two = projected(a, release=False, **axes), projected(b, **axes)
    for step in range(PERIOD + 2):
        ordinary_step(one, micro_batches(a, step))
        assert whole_gradients(two, b, micro_batches(b, step)) == dense(b)
        two.step()
        near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), 1e-5, f"step {step}")


# -- steps that are dropped --------------------------------------------------------------------------------------------


def broken(net: Net) -> Tensor:
    return loss_of(net) + (net.embed.weight * math.inf).sum().nan_to_num(0.0)


@pytest.mark.parametrize("source", ["first", "sum"])
def test_two_passes_drop_a_step_before_any_basis(source: str) -> None:
    net = Net()
    optimizer = projected(net)
    optimizer.clip_release(None, "two-pass")
    optimizer.refresh_release(source, parts=2 if source == "sum" else 1)
    for step in range(PERIOD):
        optimizer.backward(*micro_batches(net, step))
        optimizer.step()
    before, state = snapshot(net.named_parameters()), copy.deepcopy(dict(optimizer.state))
    optimizer.backward(*micro_batches(net, PERIOD, 2), lambda: broken(net))
    optimizer.step()
    same(snapshot(net.named_parameters()), before, "weights")
    for p, q in zip(optimizer.state, state, strict=True):
        same_state(optimizer.state[p], state[q], "state")
    assert optimizer.clipped is not None
    assert optimizer.clipped.factor == 0.0


def test_a_refresh_before_a_dropped_step_is_not_repeated() -> None:
    """Without a first pass the bases have moved when a later micro-batch turns out bad. They stay, moments are not turned
    again, and a save and a load in between change nothing."""
    net = Net()
    optimizer = projected(net, transfer="rotate")
    optimizer.refresh_release("first")
    optimizer.clip_release(None, strict=True)
    for step in range(PERIOD):
        optimizer.backward(*micro_batches(net, step))
        optimizer.step()
    with pytest.raises(NotFinite):
        optimizer.backward(*micro_batches(net, PERIOD, 2), lambda: broken(net), lambda: loss_of(net))
    optimizer.zero_grad()
    p = net.up.weight
    assert (optimizer.state[p]["refreshed_at"], optimizer.state[p]["step"]) == (PERIOD, PERIOD)
    basis = optimizer.state[p]["basis"].clone()
    saved = through_file({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    other = Net()
    other.load_state_dict(saved["model"])
    again = projected(other, transfer="rotate")
    again.refresh_release("first")
    again.load_state_dict(saved["optimizer"])
    for step in range(PERIOD + 1, PERIOD + 3):
        for one, model in ((optimizer, net), (again, other)):
            one.backward(*micro_batches(model, step))
            one.step()
        assert torch.equal(optimizer.state[p]["basis"], basis)
    same(snapshot(other.named_parameters()), snapshot(net.named_parameters()), "loaded after a dropped step")


def test_an_interrupted_pass_leaves_nothing() -> None:
    net = Net()
    optimizer = projected(net)
    optimizer.refresh_release("sum", parts=3)

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    before = snapshot(net.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(*micro_batches(net, 0, 2), interrupted)
    assert all(p.grad is None for p in net.parameters())
    same(snapshot(net.named_parameters()), before, "weights")
    other = Net()
    fresh = projected(other)
    fresh.refresh_release("sum", parts=3)
    for one, model in ((optimizer, net), (fresh, other)):
        one.backward(*micro_batches(model, 0))
        one.step()
    same(snapshot(net.named_parameters()), snapshot(other.named_parameters()), "after an interruption")


# -- words -------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    net = Net()
    with pytest.raises(InputError, match=r"refresh_release: .* release=False"):
        projected(net, release=False).refresh_release("first")
    optimizer = projected(net)
    wrong: list[tuple[str, int, str]] = [
        ("frist", 1, "did you mean 'first'"), ("sum", 0, "refresh parts: 0"), ("first", 2, "leave parts at 1"),
    ]  # fmt: skip
    for source, parts, words in wrong:
        with pytest.raises(InputError, match=words) as caught:
            optimizer.refresh_release(source, parts=parts)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    optimizer.refresh_release("sum", parts=2)
    assert "bases come from their sum, in 2 passes" in optimizer.explain()
    with optimizer.refreshing():
        loss_of(net).backward()
    with (
        pytest.raises(InputError, match=r"part 1 is out of range; this step has 1 such passes"),
        optimizer.refreshing(1),
    ):
        pass
    optimizer.refresh_release("first")
    assert "a basis comes from the first one" in optimizer.explain()
    assert optimizer.refresh_passes == 0
    with pytest.raises(InputError, match="this step has 0 such passes"), optimizer.refreshing():
        pass
    with pytest.raises(InputError, match=r"refreshing: .* release=False"), projected(net, release=False).refreshing():
        pass
