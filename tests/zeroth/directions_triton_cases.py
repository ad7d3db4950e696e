"""The Triton kernel of directions against its twin.

Not collected by its name: `test_directions_kernels.py` runs it in a process of its own, because the interpreter must be chosen before
Triton is imported.
"""

import os

import pytest
import torch

from tare.kernels import directions, native_directions
from tare.kernels.triton import directions as kernels
from tare.zeroth.drawn import write_sum

FORMS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KEYS, C = (3, 1 << 63, (1 << 64) - 1), (0.7, -1e-3, 2.0)


@pytest.mark.parametrize("law", ["gaussian", "signs"])
@pytest.mark.parametrize(("dtype", "split"), FORMS)
def test_it_is_the_twin(law, dtype, split):
    for n, start in ((700, 31), (4500, (1 << 32) - 77)):
        for key, decay, from_other in ((None, 0.99, False), (7, 0.99, not split), (7, 1.0 if split else 0.0, False)):
            ours = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype)
            low = torch.arange(n, device=DEVICE).remainder(256).sub(128).to(torch.int8) if split else None
            theirs, rest = ours.clone(), None if low is None else low.clone()
            source = ours.flip(0) if from_other else None
            how = {"law": law, "decay": decay, "alpha": 0.3, "scale": 0.5, "start": start, "key": key}
            assert kernels.write_(ours, KEYS, C, **how, source=source, low=low)
            directions.write_(theirs, KEYS, C, **how, source=source, low=rest)
            assert torch.equal(ours, theirs)
            assert low is None or torch.equal(low, rest)


@pytest.mark.parametrize("law", ["gaussian", "signs"])
def test_any_cut_gives_the_same_bits(law):
    whole = torch.zeros(9000, device=DEVICE)
    assert kernels.write_(whole, [5], [1.0], law=law, start=3)
    for first, last in ((0, 1), (4111, 9000)):
        part = torch.zeros(last - first, device=DEVICE)
        assert kernels.write_(part, [5], [1.0], law=law, start=3 + first)
        assert torch.equal(part, whole[first:last])


def test_the_native_entry_point_hands_its_call_over(monkeypatch):
    called = []
    real = kernels.write_
    monkeypatch.setattr(kernels, "write_", lambda *given, **named: called.append(1) or real(*given, **named))
    w = torch.zeros(64, device=DEVICE)
    assert native_directions.write_(w, [1], [1.0])
    assert called
    assert torch.equal(w.cpu(), directions.draw("gaussian", 1, 0, 64))


def test_what_it_cannot_take_goes_to_the_twin():
    w = torch.ones(64, device=DEVICE, dtype=torch.float64)
    assert not kernels.write_(w, [1], [1.0])
    write_sum(w, [1], [1.0], law="gaussian")
    assert torch.equal(w.cpu(), 1.0 + directions.draw("gaussian", 1, 0, 64).double())
