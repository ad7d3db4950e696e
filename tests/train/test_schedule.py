"""Learning rates as a function of the step."""

import itertools
import math

import pytest
import torch

from tare.core.errors import InputError
from tare.train.config import TrainConfig
from tare.train.schedule import Schedule, set_lr


def test_warm_up_climbs_to_the_peak_without_a_step_at_zero() -> None:
    schedule = Schedule("constant", steps=10, warmup=4)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_peak_to_the_final_share_at_the_last_step() -> None:
    schedule = Schedule("cosine", steps=100, warmup=10, final=0.1)
    shares = [schedule(step) for step in range(100)]
    assert shares[9] == 1.0
    assert shares[99] == pytest.approx(0.1, abs=1e-15)
    assert shares[54] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way between steps 9 and 99
    assert all(a > b for a, b in itertools.pairwise(shares[9:]))
    assert schedule(1000) == pytest.approx(0.1)  # a run that is over stays there


def test_cosine_equals_torch_without_warm_up() -> None:
    # torch's schedule starts at the peak and reaches the end after T_max; ours has taken one part of it in its first step
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.5)
    schedule = Schedule("cosine", steps=7, final=0.25)
    for step in range(7):
        optimizer.step()
        theirs.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * schedule(step), rel=1e-12)


@pytest.mark.parametrize(("warmup", "expected"), [(0.1, 20), (0.0, 0), (1.0, 1), (30.0, 30), (0.004, 1), (0.999, 200)])
def test_a_warm_up_below_one_is_a_share(warmup: float, expected: int) -> None:
    assert Schedule.of(TrainConfig(steps=200, warmup=warmup)).warmup == expected


def test_every_step_of_every_length_has_a_positive_share() -> None:
    for kind in ("cosine", "constant"):
        for steps in (1, 2, 5):
            for warmup in range(steps + 1):
                schedule = Schedule(kind, steps, warmup, final=0.0)
                shares = [schedule(step) for step in range(steps)]
                assert all(0.0 <= share <= 1.0 and math.isfinite(share) for share in shares)
                assert all(share > 0 for share in shares[:-1])


def test_a_warm_up_longer_than_the_run_is_an_error() -> None:
    with pytest.raises(InputError, match=r"train\.warmup: expected at most train\.steps = 10, got 11"):
        Schedule("cosine", steps=10, warmup=11)


def test_every_group_keeps_its_own_peak() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 4.0}], lr=2.0)
    assert set_lr(optimizer, [2.0, 4.0], 0.5) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]
