"""Saved state meets its leaves by name; by position only where there are no names in common."""

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.errors import CheckpointError


def trained(*names: str) -> tuple[tare.AdamW, dict[str, nn.Parameter]]:
    leaves = {name: nn.Parameter(torch.zeros(3)) for name in names}
    optimizer = tare.AdamW(list(leaves.items()), lr=0.1)
    for number, p in enumerate(leaves.values(), 1):
        p.grad = torch.full((3,), float(number))
    optimizer.step()
    return optimizer, leaves


def moment(optimizer: tare.AdamW, p: Tensor) -> float:
    return float(optimizer.state[p]["exp_avg"][0])


@pytest.mark.parametrize(
    "names", [("b", "a", "c"), ("_orig_mod.c", "_orig_mod.a", "_orig_mod.b"), ("module.a", "module.b", "module.c")]
)
def test_order_and_wrappers_do_not_matter(names: tuple[str, ...]) -> None:
    saved, before = trained("a", "b", "c")
    other, after = trained(*names)
    other.load_state_dict(saved.state_dict())
    for name, p in after.items():
        assert moment(other, p) == moment(saved, before[name.rpartition(".")[2]])


def test_a_model_that_was_renamed_throughout_loads_by_position() -> None:
    saved, before = trained("a", "b")
    other, after = trained("x", "y")
    other.load_state_dict(saved.state_dict())
    assert [moment(other, p) for p in after.values()] == [moment(saved, p) for p in before.values()]


def test_names_of_which_some_are_lost_are_refused() -> None:
    saved, _ = trained("q", "k", "v")
    other, after = trained("k", "q", "w")
    before = [moment(other, p) for p in after.values()]
    with pytest.raises(CheckpointError, match="no 'w', but others of its names"):
        other.load_state_dict(saved.state_dict())
    assert [moment(other, p) for p in after.values()] == before
