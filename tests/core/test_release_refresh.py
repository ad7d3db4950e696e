"""Where a new basis comes from when micro-batches meet leaves that are stepped inside backward: the first of them, or their sum."""

import math
from typing import Any

import pytest
import torch
from reference import twins
from reference.stepping import SHAPES, numbers
from release_cases import MICRO, PERIOD, RANK, dense, micro_batches, ordinary_step, projected, whole_gradients
from torch import Tensor, nn

import tare
from tare.subspace.refresh import AdaptiveRefresh
from tare.testing import RecordedBasis
from tare.testing.subject import Net, loss_of, near, same, same_state, snapshot

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# -- the first micro-batch ---------------------------------------------------------------------------------------------


def gradient(step: int, part: int, shape: tuple[int, ...]) -> Tensor:
    return numbers(f"{step}/{part}", shape)


def twin_step(w: Tensor, parts: list[Tensor], s: dict[str, Any], t: int, transfer: str) -> Tensor:
    """GaLore with moments that are kept, cleared or turned, its basis from the first of several gradients; float64."""
    side = twins.published_side(w)
    if (t - 1) % PERIOD == 0:
        old, s["P"] = s.get("P"), twins.basis(parts[0], RANK, side)
        if old is not None and transfer == "zero":
            s["M"], s["V"], s["since"] = torch.zeros_like(s["M"]), torch.zeros_like(s["V"]), t - 1
        if old is not None and transfer == "rotate":
            q = s["P"].T @ old
            for name, turn in (("M", q), ("V", q * q)):
                s[name] = turn @ s[name] if side == "left" else s[name] @ turn.T
    p, g = s["P"], sum(parts)
    r = p.T @ g if side == "left" else g @ p
    k = t - s.get("since", 0)
    s["M"] = 0.9 * s.get("M", torch.zeros_like(r)) + 0.1 * r
    s["V"] = 0.999 * s.get("V", torch.zeros_like(r)) + 0.001 * r * r
    n = math.sqrt(1 - 0.999**k) / (1 - 0.9**k) * s["M"] / (s["V"].sqrt() + 1e-6)
    return w - 0.01 * (p @ n if side == "left" else n @ p.T)


@shapes
@pytest.mark.parametrize("transfer", ["keep", "zero", "rotate"])
def test_the_first_gives_the_basis_of_the_step(shape: tuple[int, int], transfer: str) -> None:
    """Moments are turned or cleared once, and every micro-batch, the first included, is projected with the new basis."""
    p = nn.Parameter(numbers("w", shape))
    w, memory = p.detach().clone(), {}
    optimizer = projected([{"params": [("w", p)], "role": "linear"}], transfer=transfer, lr=0.01)
    optimizer.refresh_release("first")
    for t in range(1, 3 * PERIOD + 2):
        parts = [gradient(t, k, shape) for k in range(MICRO)]
        optimizer.backward(*(lambda g=g: (p * g).sum() for g in parts))
        optimizer.step()
        w = twin_step(w, parts, memory, t, transfer)
        # float64; SVDs magnify 1e-16 by at most 1e4 here
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def test_one_micro_batch_is_the_ordinary_step() -> None:
    a, b = Net(), Net()
    one, two = projected(a, release=False), projected(b)
    two.refresh_release("first")
    for step in range(PERIOD + 2):
        ordinary_step(one, micro_batches(a, step, 1))
        two.backward(*micro_batches(b, step, 1))
        two.step()
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), "one micro-batch")


@pytest.mark.parametrize("source", ["first", "sum"])
def test_an_adaptive_calendar_counts_a_refresh_once(source: str) -> None:
    """Its next refresh is not at `period`, and it says of an update that has had its refresh that one is due."""
    a, b = Net(), Net()
    calendar = AdaptiveRefresh(2, queue=2, threshold=0.1)
    one, two = projected(a, release=False, refresh=calendar), projected(b, refresh=calendar)
    two.refresh_release(source, parts=2 if source == "sum" else 1)
    for _ in range(9):
        ordinary_step(one, [lambda: loss_of(a) / 2] * 2)
        two.backward(*[lambda: loss_of(b) / 2] * 2)
        two.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        names = [n for n in one.state[p] if n in ("gap", "similarities_seen", "refreshed", "refreshed_at")]
        assert {n: two.state[q][n] for n in names} == {n: one.state[p][n] for n in names}
        if "gap" in names:
            assert one.state[p]["gap"] > 2
    near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), 1e-5, source)


@pytest.mark.parametrize("source", ["first", "sum"])
def test_a_recorded_basis_is_taken_once(source: str) -> None:
    """Its calendar is the recording; moments that are cleared twice, or late, would show."""
    bases = {t: torch.linalg.qr(numbers(f"P{t}", (12, 2))).Q for t in (0, 2, 3)}
    a, b = (nn.Parameter(numbers("w", (12, 7))) for _ in range(2))
    made = [
        projected([{"params": [("w", p)], "role": "linear"}], release=p is b, side="left", transfer="zero",
                  basis=RecordedBasis(bases)) for p in (a, b)
    ]  # fmt: skip
    made[1].refresh_release(source, parts=2 if source == "sum" else 1)
    for t in range(5):
        parts = [gradient(t, k, (12, 7)) for k in range(MICRO)]
        ordinary_step(made[0], [lambda g=g: (a * g).sum() for g in parts])  # type: ignore[misc]
        made[1].backward(*(lambda g=g: (b * g).sum() for g in parts))
        made[1].step()
        torch.testing.assert_close(b.detach(), a.detach(), rtol=0, atol=1e-12)


def test_a_refresh_at_every_update_keeps_projections() -> None:
    net = Net()
    optimizer = projected(net, refresh=tare.every(1))
    optimizer.refresh_release("first")
    for step in range(3):
        held = whole_gradients(optimizer, net, micro_batches(net, step))
        assert held == dense(net)
        optimizer.step()


def test_what_is_held() -> None:
    """`sum` holds everything at a refresh, k passes about 1/k of the projected leaves, `first` nothing that is projected."""
    held: dict[tuple[str, int], list[int]] = {}
    for source, parts in (("sum", 1), ("sum", 2), ("sum", 3), ("first", 1)):
        net = Net()
        optimizer = projected(net)
        optimizer.refresh_release(source, parts=parts)
        held[source, parts] = []
        for step in range(PERIOD + 1):
            held[source, parts].append(whole_gradients(optimizer, net, micro_batches(net, step)))
            optimizer.step()
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    whole, rest = sum(sizes.values()), dense(net)
    assert held["sum", 1] == [whole, rest, rest, whole]
    # up and down have 160 elements each, square 64: two runs are [up], [down, square], three are one each
    assert held["sum", 2] == [rest + 224, rest, rest, rest + 224]
    assert held["sum", 3] == [rest + 64, rest, rest, rest + 64]
    assert held["first", 1] == [rest] * (PERIOD + 1)


# -- micro-batches that give no basis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["first", "sum"])
def test_a_first_gradient_of_zero_is_passed_over(source: str) -> None:
    """The basis comes from the first that has something; a leaf that has nothing all along counts one failure, as ever."""
    a, b = (nn.ParameterDict({"w": numbers("w", (9, 5)), "v": numbers("v", (6, 8))}) for _ in range(2))
    one, two = ([{"params": list(net.named_parameters()), "role": "linear"}] for net in (a, b))
    normal, released = projected(one, release=False), projected(two)
    released.refresh_release(source, parts=2 if source == "sum" else 1)
    g = numbers("g", (9, 5))
    for _ in range(2):
        losses = {
            net: [lambda net=net, x=x: (net["w"] * (g * x)).sum() + 0.0 * net["v"].sum() for x in (0.0, 2.0, 1.0)]
            for net in (a, b)
        }
        ordinary_step(normal, losses[a])
        released.backward(*losses[b])
        released.step()
    for name in a:
        counts = [
            {k: v for k, v in o.state[net[name]].items() if isinstance(v, int)}
            for o, net in ((normal, a), (released, b))
        ]
        assert counts[0] == counts[1]
        assert counts[1]["refresh_failures"] == (2 if name == "v" else 0)
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-12)


def test_no_expert_is_left_without_a_basis() -> None:
    """Experts without tokens in the first micro-batch: their basis comes from the first sum in which all have some."""
    shape = (3, 6, 4)
    a, b = (nn.Parameter(numbers("w", shape)) for _ in range(2))
    one, two = (projected([{"params": [("w", p)], "role": "expert"}], release=p is b) for p in (a, b))
    two.refresh_release("first")
    seen = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)[:, :, None, None]
    parts = [gradient(0, k, shape) * seen[k] for k in range(MICRO)]
    two.backward(*(lambda g=g: (b * g).sum() for g in parts))
    two.step()
    ordinary_step(one, [lambda: (a * (parts[0] + parts[1])).sum()])
    torch.testing.assert_close(two.state[b]["basis"], one.state[a]["basis"], rtol=0, atol=0)


def test_a_dead_expert_stays_as_it_was() -> None:
    """No token in the whole step: the ordinary step's basis, in passes and from the first."""
    shape = (3, 6, 4)
    for source in ("first", "sum"):
        a, b = (nn.Parameter(numbers("w", shape)) for _ in range(2))
        one, two = (projected([{"params": [("w", p)], "role": "expert"}], release=p is b) for p in (a, b))
        two.refresh_release(source, parts=2 if source == "sum" else 1)
        mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
        parts = [gradient(0, k, shape) * mask for k in range(MICRO)]
        two.backward(*(lambda g=g, b=b: (b * g).sum() for g in parts))
        two.step()
        ordinary_step(one, [lambda g=g, a=a: (a * g).sum() for g in parts])  # type: ignore[misc]
        same_state(two.state[b], one.state[a], source)
        assert torch.equal(b, a)


def test_a_leaf_that_only_some_micro_batches_reach() -> None:
    """In the first only, or not in the first: as in the normal mode, from the sum of what there is."""
    for parts in (2, 3):
        a, b = Net(), Net()
        one, two = projected(a, release=False), projected(b)
        two.refresh_release("sum", parts=parts)
        for step in range(PERIOD + 2):
            losses = {
                net: [
                    lambda net=net, step=step: loss_of(net, step),
                    lambda net=net: net.embed(torch.arange(4)).square().mean(),
                ]
                for net in (a, b)
            }
            for some in losses.values():
                some.reverse() if step % 2 else None
            ordinary_step(one, losses[a])
            two.backward(*losses[b])
            two.step()
            near(snapshot(b.named_parameters()), snapshot(a.named_parameters()), 1e-5, f"step {step}, {parts} passes")


def test_what_only_early_micro_batches_reach_is_not_held() -> None:
    net = Net()
    optimizer = projected(net)
    optimizer.refresh_release("sum", parts=3)
    losses = [lambda: loss_of(net), lambda: net.embed(torch.arange(4)).square().mean()]
    assert whole_gradients(optimizer, net, losses) == dense(net) + 64  # the last share alone
