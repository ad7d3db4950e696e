"""The meter: blocks born in the window, blocks older than it, and blocks of earlier windows."""

import torch
from torch import nn

from tare.plan.measure import StepMeter

KIB = 1024


class Holder(torch.optim.Optimizer):
    """An optimizer that only holds state."""

    def __init__(self, model: nn.Module, size: int):
        super().__init__(model.parameters(), {})
        self.weight = next(model.parameters())
        self.state[self.weight]["basis"] = torch.zeros(size // 4)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        raise NotImplementedError

    def replace(self, size: int) -> None:
        self.state[self.weight].pop("basis")
        self.state[self.weight]["basis"] = torch.zeros(size // 4)


def layer() -> nn.Linear:
    return nn.Linear(64, 64, bias=False)  # 16 KiB


def test_baseline_is_what_is_alive() -> None:
    model = layer()
    model.weight.grad = torch.zeros(64, 64)
    with StepMeter(model, Holder(model, 8 * KIB), extra=[torch.zeros(KIB)]) as meter:
        pass
    assert meter.baseline == meter.peak == (16 + 16 + 8 + 4) * KIB


def test_blocks_older_than_the_window_are_subtracted_when_freed() -> None:
    model = layer()
    model.weight.grad = torch.zeros(64, 64)
    with StepMeter(model) as meter:
        model.weight.grad = None
        made = torch.zeros(64, 64)  # takes the gradient's place
    del made
    assert meter.peak == 32 * KIB


def test_replaced_state_is_not_counted_twice_even_if_an_earlier_window_saw_it() -> None:
    model = layer()
    holder = Holder(model, 8 * KIB)
    for _ in range(3):
        with StepMeter(model, holder) as meter:
            holder.replace(8 * KIB)
        assert meter.peak == 24 * KIB


def test_workspace_inside_operators_is_seen() -> None:
    g = torch.randn(128, 128)
    with StepMeter(nn.Module(), device="cpu", extra=[g]) as meter:
        torch.linalg.svd(g)
    assert meter.peak - meter.baseline > 3 * g.nbytes  # U, V and the copy that LAPACK works in


def test_a_fault_passes_through() -> None:
    try:
        with StepMeter(layer()) as meter:
            raise KeyError("inside")
    except KeyError:
        assert meter.peak == 0
