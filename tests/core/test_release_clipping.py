"""Clipping in release mode: the norm, the two passes, the step before, and what becomes of bad numbers."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.clipping import NORM, NotFinite, norm_of, squared_norm
from tare.core.errors import InputError
from tare.testing.subject import Net, loss_of, same, snapshot


def releasing(net: nn.Module, max_norm: float | None, mode: str = "previous", **own: object) -> tare.AdamW:
    optimizer = tare.AdamW(net, lr=1e-2, release=True)
    optimizer.clip_release(max_norm, mode, **own)  # type: ignore[arg-type]
    return optimizer


# -- the norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (1200, 700), (3, 5, 7, 2), (600, 900, 1)], ids=str)
def test_squared_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (x, x.mT if x.ndim > 1 else x, x.transpose(0, -1) if x.ndim > 2 else x):
        # fp32 sums of 2^18 squares, 1e-5 each; the sum of these is fp64
        assert float(squared_norm(tensor)) == pytest.approx(float(x.double().square().sum()), rel=3e-5)


def test_the_order_of_leaves_changes_no_bit() -> None:
    squares = list(torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp())
    assert norm_of(squares) == norm_of(reversed(squares))
    assert math.isnan(norm_of([torch.tensor(math.inf), torch.tensor(math.nan)]))
    assert norm_of([torch.tensor(math.inf), torch.tensor(1.0)]) == math.inf
    assert norm_of([]) == 0.0


# -- two passes --------------------------------------------------------------------------------------------------------


class Dropping(Net):
    """Draws from torch's generator in forward."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(tokens), 0.5)


def test_both_passes_see_the_same_dropout() -> None:
    a, b = Dropping(), Dropping()
    one, two = tare.AdamW(a, lr=1e-2), releasing(b, 0.1, "two-pass")
    torch.manual_seed(5)
    for number in range(3):
        one.zero_grad()
        loss_of(a, number).backward()
        nn.utils.clip_grad_norm_(a.parameters(), 0.1)
        one.step()
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    for number in range(3):
        told: list[float] = []

        def loss(number: int = number, told: list[float] = told) -> Tensor:
            value = loss_of(b, number)
            told.append(float(value.detach()))
            return value

        (got,) = two.backward(loss)
        two.step()
        assert told == [float(got)] * 2
    assert torch.equal(torch.get_rng_state(), drawn)  # as if there had been one pass
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-6)  # torch's factor is computed in fp32


def test_one_graph_can_serve_both_passes() -> None:
    a, b = Net(), Net()
    one, two = releasing(a, 0.1, "two-pass"), releasing(b, 0.1, "two-pass")
    for number in range(3):
        one.backward(lambda number=number: loss_of(a, number))
        one.step()
        loss = loss_of(b, number)
        with two.measuring():
            loss.backward(retain_graph=True)
        loss.backward()
        two.step()
        assert one.clipped == two.clipped
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), "a kept graph")


def test_measuring_passes_share_the_gradients() -> None:
    """What is held between micro-batches while measuring: a share of the gradients, and together the same norm."""
    norms, held = [], []
    for parts in (1, 3):
        net = Net()
        optimizer = releasing(net, 0.1, "two-pass", parts=parts)
        most = 0

        def loss(part: int, net: Net = net) -> Tensor:
            nonlocal most
            most = max(most, sum(p.grad.numel() for p in net.parameters() if p.grad is not None))
            return loss_of(net, part) / 3

        for part in range(parts):
            with optimizer.measuring(part):
                for number in range(3):
                    if number < 2:
                        with optimizer.accumulating():
                            loss(number).backward()
                    else:
                        loss(number).backward()
        norms.append(optimizer._release.clipping.measured)  # type: ignore[union-attr]
        held.append(most)
    assert norms[0] == norms[1]
    whole = sum(p.numel() for p in net.parameters())
    assert held[0] == whole
    assert held[1] < 0.55 * whole


def test_leaves_missing_in_some_micro_batches() -> None:
    """A leaf with a gradient in the first micro-batch only is measured and stepped like the others; tied weights count once."""
    for tied in (False, True):
        a, b = Net(tied), Net(tied)
        one, two = (tare.create("galore", net, 1e-2, rank=2, period=3, release=net is b) for net in (a, b))
        two.clip_release(0.1, "two-pass")
        for number in range(4):
            losses = {
                net: [lambda net=net: loss_of(net, number), lambda net=net: net.embed(torch.arange(4)).square().mean()]  # noqa: B023
                for net in (a, b)
            }
            one.zero_grad()
            for loss in losses[a]:
                loss().backward()
            norm = nn.utils.clip_grad_norm_(a.parameters(), 0.1)
            one.step()
            two.backward(*losses[b])
            two.step()
            two.zero_grad()
            assert two.clipped is not None
            assert two.clipped.norm == pytest.approx(float(norm), rel=1e-5)
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(q, p, rtol=0, atol=1e-5)


# -- the step before ---------------------------------------------------------------------------------------------------


def test_a_hand_written_loop_clips_from_the_second_step_on() -> None:
    net = Net()
    optimizer = releasing(net, 0.1)
    factors = []
    for number in range(3):
        loss_of(net, number).backward()  # and no step(): a leaf that comes again begins a new step
        if number == 2:
            optimizer.step()
        if optimizer.clipped:
            factors.append(optimizer.clipped.factor)
    assert factors[0] == 1.0
    assert all(factor < 0.5 for factor in factors[1:])


def test_a_bad_gradient_is_not_the_norm_of_the_step_before() -> None:
    for strict in (False, True):
        net = Net()
        optimizer = releasing(net, 0.1, strict=strict)
        optimizer.backward(lambda: loss_of(net))  # noqa: B023
        optimizer.step()
        norm, before = optimizer.param_groups[0][NORM], snapshot(net.named_parameters())

        def bad() -> Tensor:
            return loss_of(net) + (net.up.weight * math.inf).sum().nan_to_num(0.0)  # noqa: B023

        if strict:
            with pytest.raises(NotFinite, match=r"gradient of up\.weight"):
                optimizer.backward(bad)
            optimizer.zero_grad()
        else:
            optimizer.backward(bad)
        optimizer.step()
        after = snapshot(net.named_parameters())
        assert after["up.weight"].isnan().any() == (not strict)
        assert not torch.equal(after["head.weight"], before["head.weight"])  # it came before the bad one
        # What comes after the bad one in backward: stays where it is refused, goes on where it is not.
        assert torch.equal(after["embed.weight"], before["embed.weight"]) == strict
        assert all(t.isfinite().all() for name, t in after.items() if name != "up.weight")
        assert optimizer.param_groups[0][NORM] == norm


def test_gathering_alone_clips_nothing() -> None:
    a, b = Net(), Net()
    one, two = tare.AdamW(a, lr=1e-2, release=True), releasing(b, None)
    assert one.clipped is None
    for number in range(3):
        one.backward(lambda number=number: loss_of(a, number))
        one.step()
        two.backward(lambda number=number: loss_of(b, number))
        two.step()
        assert two.clipped is not None
        assert two.clipped.factor == 1.0
        assert two.clipped.norm is not None
        assert two.clipped.norm > 0
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), "norm gathered")


def test_copies_and_new_groups() -> None:
    net, extra = Net(), nn.Linear(3, 3)
    optimizer = releasing(net, 0.1)
    optimizer.add_param_group({"params": list(extra.named_parameters())})
    optimizer.backward(lambda: loss_of(net) + extra(torch.ones(1, 3)).square().sum())
    optimizer.step()
    assert optimizer.clipped is not None
    assert {group[NORM] for group in optimizer.param_groups} == {optimizer.clipped.norm}
    copy.deepcopy(optimizer).step()


# -- words -------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    net = Net()
    with pytest.raises(InputError, match=r"clip_release: .* release=False.*clip_grad_norm_"):
        tare.AdamW(net, lr=1e-2).clip_release(1.0)
    optimizer = tare.AdamW(net, lr=1e-2, release=True)
    with pytest.raises(InputError, match="call clip_release first"), optimizer.measuring():
        pass
    for wrong in (
        {"max_norm": 0.0},
        {"max_norm": math.nan},
        {"max_norm": 1.0, "mode": "twopass"},
        {"max_norm": 1.0, "parts": 0},
    ):
        with pytest.raises(InputError) as caught:
            optimizer.clip_release(**wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    optimizer.clip_release(1.0, "two-pass", parts=2)
    with pytest.raises(InputError, match="part 2 is out of range"), optimizer.measuring(2):
        pass
    with pytest.raises(InputError, match="no loss given"):
        optimizer.backward()
    assert "clipped to norm 1, two-pass" in optimizer.explain()
    galore = tare.create("galore", Net(), 1e-2, rank=2, release=True)
    galore.clip_release(1.0, "previous")
    with pytest.raises(InputError, match=r"has not the norm of the whole one.*clip by two-pass"), galore.accumulating():
        pass


def test_an_interrupted_measurement_is_forgotten() -> None:
    net = Net()
    optimizer = releasing(net, 1.0, "two-pass")

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(lambda: loss_of(net), interrupted)
    with pytest.raises(InputError, match="was not measured"):
        loss_of(net).backward()
    optimizer.zero_grad()
    optimizer.backward(lambda: loss_of(net))
    optimizer.step()
