"""A rule's plain update under `torch.compile`: optional, but it must not compile again whenever a rate or the step changes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tare.core.leaf import Leaf
from tare.core.state import State, allocate
from tare.core.storage import Storage
from tare.core.transform import Step, Transform
from tare.rules.adafactor import Adafactor
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.momentum import Momentum

LEAF = Leaf("w", (8, 6), torch.float32, "linear")


def path(rule: Transform, wrap) -> list[torch.Tensor]:
    slots = Storage().slots(LEAF, rule.spec(LEAF))
    raw, weight = allocate(slots, torch.device("cpu")), torch.ones(LEAF.shape)

    def update(grad: torch.Tensor, lr: float, count: int) -> torch.Tensor:
        return rule.update(grad, State(raw, slots), Step(lr, count, LEAF, weight)).rows(0, LEAF.shape[0])

    update, found = wrap(update), []
    for count in range(1, 6):
        generator = torch.Generator().manual_seed(count)
        found.append(update(torch.randn(LEAF.shape, generator=generator), 0.1 / count, count).clone())
    return found


@pytest.mark.parametrize("rule", [Adam(), Adam(eps_placement="before"), Lion(), Momentum(nesterov=True), Adafactor()])
def test_five_steps_with_changing_rates_compile_at_most_twice(rule):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = path(rule, lambda f: torch.compile(f, backend=counter, fullgraph=True))
    assert 1 <= counter.frame_count <= 2  # once for the first numbers, once for numbers that change
    for ours, theirs in zip(compiled, path(rule, lambda f: f), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
