"""What forward-only methods are asked by mistake: one line that says what to do, or a step that goes on, and no weight that is lost."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.errors import InputError


def problem() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    return net, lambda: net(torch.ones(3, 4)).square().mean()


def bits(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("method", [tare.MeZO, tare.SparseMeZO, tare.Eggroll, tare.ZORank, tare.Consensus])
def test_a_frozen_model_is_no_training(method: Any) -> None:
    net, closure = problem()
    optimizer = method(net.requires_grad_(False), lr=1.0)
    with pytest.raises(InputError, match=r"requires_grad=False; call requires_grad_"):
        optimizer.step(closure)
    net.weight.requires_grad_(True)
    optimizer.step(closure)


def test_a_rate_that_is_no_number_moves_nothing() -> None:
    net, closure = problem()
    optimizer = tare.MeZO(net, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.nan if step else 1.0)
    optimizer.step(closure)
    schedule.step()
    before = bits(net)
    with pytest.raises(InputError, match=r"lr: nan .* in group 0; expected finite numbers"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, bits(net)))


def test_a_loss_in_the_place_of_a_function() -> None:
    net, closure = problem()
    with pytest.raises(InputError, match=r"expected a function that returns the loss, got a Tensor"):
        tare.MeZO(net, lr=0.1).step(closure())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda net: tare.MeZO(net, rule=5), r"Invalid rule: 5; expected one of sgd, momentum, adam"),
        (lambda net: tare.MeZO(net, probe=3.0), r"Invalid probe: 3\.0; expected one of two-sided"),
        (lambda net: tare.MeZO(net, directions=None), r"Invalid directions: None; expected one of"),
        (lambda net: tare.Eggroll(net, clip="x"), r"clip"),
        (lambda net: tare.SparseMeZO(net, thresholds={"wieght": 0.1}), r"no leaf is called 'wieght' \(did you mean 'weight'"),
    ],
)  # fmt: skip
def test_values_of_another_kind(build: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(problem()[0])


@pytest.mark.parametrize("answer", [["a", "b", "c"], [0.7, 1.2, 2.9], [True, False, True]])
def test_scores_are_not_taken_for_an_order(answer: list[Any]) -> None:
    net, _ = problem()
    optimizer = tare.ZORank(net, m=3, k=3)
    optimizer.ask()
    before = bits(net)
    with pytest.raises(InputError, match=r"tell: expected numbers of candidates, whole ones"):
        optimizer.tell(answer)
    assert all(map(torch.equal, before, bits(net)))
    optimizer.tell([2, 0, 1])


@pytest.mark.parametrize("form", ["particles", "hopping"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_members_outside_of_the_domain_weigh_nothing(form: str, bad: float) -> None:
    """exp(-alpha f) of an infinite loss is 0: the mean goes where losses are finite."""
    p = nn.Parameter(torch.tensor([0.5, 0.5]))
    optimizer = tare.Consensus([p], form=form, n=20, sigma=0.5, **({"spread": 1.0} if form == "particles" else {}))
    for _ in range(15):
        optimizer.step(lambda: (p**2).sum() if bool((p > 0).all()) else torch.tensor(bad))
    assert optimizer.skipped < 8
    assert bool(p.isfinite().all())
    assert float((p**2).sum()) < 0.5


@pytest.mark.parametrize("maximize", [False, True])
def test_points_without_a_loss_rank_last(maximize: bool) -> None:
    p = nn.Parameter(torch.full((6,), 1.0))
    optimizer = tare.ZORank([p], lr=0.1, m=8, k=2, mu=0.5, maximize=maximize)
    for _ in range(30):
        optimizer.step(
            lambda: (-p.sum() if maximize else p.sum()) if bool((p > -0.5).all()) else torch.tensor(math.nan)
        )
    assert optimizer.skipped < 15
    assert float(p.sum()) < 6.0


def test_a_step_without_any_finite_loss_is_skipped() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = tare.Consensus([p], n=5, patience=2)
    optimizer.step(lambda: torch.tensor(math.inf))
    assert optimizer.skipped == 1
    assert torch.equal(p.detach(), torch.ones(3))
    with pytest.raises(tare.core.clipping.NotFinite):
        optimizer.step(lambda: torch.tensor(math.inf))
