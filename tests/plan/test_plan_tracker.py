"""The tracker counts storages: once, until they die, and alike for fake and real tensors."""

import pytest
import torch

from tare.plan.activations import fake_tensors, track_step
from tare.plan.models import build_model, build_skeleton, config_for
from tare.plan.tracker import MemoryTracker


def test_views_count_once_and_death_is_noticed() -> None:
    with MemoryTracker() as tracker, tracker.phase("work"):
        x = torch.zeros(1024)
        y = x.view(32, 32).t()[3:]
        assert tracker.total == 4096
        del x
        assert tracker.total == 4096  # the view keeps the storage alive
        del y
        assert tracker.total == 0
    assert tracker.peak("work").total == 4096


def test_marks_move_bytes_between_categories() -> None:
    tracker = MemoryTracker()
    weight = torch.zeros(256)
    tracker.mark([weight], "parameter")
    with tracker, tracker.phase("work", born="activation"):
        made = weight + 1
        tracker.mark([made], "gradient")
        other = weight + 2
    assert tracker.current["parameter"] == tracker.current["gradient"] == tracker.current["activation"] == 1024
    assert tracker.peak("work").total == 3072
    assert tracker.peak("work", without_gradients=True).total == 2048
    del made, other


@pytest.mark.parametrize(
    ("work", "elements"),
    [
        (lambda g: torch.linalg.svd(g, full_matrices=False), 256 * 512 * 2 + 256 * 256),
        (lambda g: torch.linalg.qr(g.mT), 256 * 512 * 2 + 256 * 256),
        (lambda g: torch.linalg.eigh(g[:, :256]), 256 * 256 * 3 + 256 * 512),
    ],
)
def test_workspace_of_factorizations_is_added(work: object, elements: int) -> None:
    from tare.plan.measure import StepMeter

    g = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    with StepMeter(torch.nn.Module(), device="cpu", extra=[g]) as meter:
        work(g)  # type: ignore[operator]
    tracker = MemoryTracker()
    tracker.mark([g], "input")
    with tracker, tracker.phase("work"):
        work(g)  # type: ignore[operator]
    # LAPACK asks for more where there are more threads: QR 5 % with two.
    assert tracker.peak("work").total == pytest.approx(meter.peak, rel=0.07)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fake_equals_real(dtype: str) -> None:
    tokens = torch.zeros(2, 32, dtype=torch.long)
    real = track_step(build_model("tiny", dtype=dtype).train(), tokens)
    with fake_tensors():
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        fake = track_step(build_skeleton(config_for("tiny"), kind).train(), torch.zeros(2, 32, dtype=torch.long))
    assert fake.weights == real.weights
    assert fake.gradients == real.gradients
    for moment in ("forward", "backward", "released", "evaluation"):
        # The real run looks into position ids for packed sequences: some int64 per token.
        assert getattr(fake, moment).total == pytest.approx(getattr(real, moment).total, abs=8 * 2 * 32 * 4)
