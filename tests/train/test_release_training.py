"""`tare train --release` with micro-batches and clipping: the ordinary run's numbers, its log, its bad steps, its resume."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_runs import config, fingerprint, finish

from tare.core.errors import InputError
from tare.plan.activations import causal_loss
from tare.train import checkpoint, metrics, session
from tare.train.loop import Result, train

CLIP = 0.25  # the norms are 0.5 and more: every step is clipped


def weights(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.out / "model" / "model.safetensors")


def column(result: Result, name: str) -> list[Any]:
    return [line[name] for line in result.history if line["event"] == "step"]


@pytest.mark.parametrize("method", ["adamw", "galore", "apollo-mini"])
def test_two_passes_are_the_ordinary_run(method: str, tmp_path: Path) -> None:
    job = {"steps": 4, "clip": CLIP, "options": {} if method == "adamw" else {"period": 3}}
    job |= {"rank": 8} if method == "galore" else {}
    ordinary = train(config(tmp_path / "a", method, **job))
    released = train(config(tmp_path / "b", method, release=True, clip_mode="two-pass", **job))
    for name, tensor in weights(ordinary).items():
        assert torch.equal(weights(released)[name], tensor), name
    for name in ("loss", "grad_norm", "clip_factor"):
        assert column(released, name) == column(ordinary, name)
    assert all(factor < 1 for factor in column(released, "clip_factor"))
    assert released.measured["peak"] <= 1.01 * ordinary.measured["peak"]  # the state of a random generator is kept


@pytest.mark.parametrize("method", ["adamw", "galore"])
def test_with_micro_batches(method: str, tmp_path: Path) -> None:
    job = {"steps": 5, "accumulate": 3, "clip": CLIP}
    job |= {"rank": 8, "options": {"period": 3}} if method == "galore" else {}
    ordinary = train(config(tmp_path / "a", method, **job))
    released = train(config(tmp_path / "b", method, release=True, clip_mode="two-pass", **job))
    # Sums of projections against the projection of the sum; Adam enlarges what is near zero.
    lr = ordinary.config.method.lr
    assert lr is not None
    for name, tensor in weights(ordinary).items():
        assert float((weights(released)[name] - tensor).abs().max()) < 3e-2 * lr, name
    for name in ("loss", "grad_norm", "clip_factor"):
        assert column(released, name) == pytest.approx(column(ordinary, name), rel=1e-4)


@pytest.mark.parametrize("clip", [None, CLIP])
def test_bases_in_passes(clip: float | None, tmp_path: Path) -> None:
    """The ordinary run's numbers; the loss of a step is told once, whatever passes it took."""
    job = {"steps": 5, "accumulate": 3, "clip": clip, "rank": 8, "options": {"period": 3}}
    ordinary = train(config(tmp_path / "a", "galore", **job))
    job |= {"clip_mode": "two-pass", "clip_parts": 2} if clip else {}
    released = train(config(tmp_path / "b", "galore", release=True, refresh_parts=2, **job))
    lr = ordinary.config.method.lr
    assert lr is not None
    for name, tensor in weights(ordinary).items():
        assert float((weights(released)[name] - tensor).abs().max()) < 3e-2 * lr, name
    assert column(released, "loss") == pytest.approx(column(ordinary, "loss"), rel=1e-4)
    if clip:
        assert column(released, "grad_norm") == pytest.approx(column(ordinary, "grad_norm"), rel=1e-4)


def test_bases_from_the_first_micro_batch(tmp_path: Path) -> None:
    """Another basis, the same algorithm: it learns as well, and the measured peak falls as far as the plan says."""
    job = {"steps": 12, "accumulate": 4, "clip": None, "rank": 8, "options": {"period": 5}, "release": True}
    summed, first = (
        train(config(tmp_path / source, "galore", refresh_from=source, **job)) for source in ("sum", "first")
    )
    assert column(first, "loss")[0] == column(summed, "loss")[0]
    assert column(first, "loss")[1] != column(summed, "loss")[1]
    assert column(first, "loss")[-1] == pytest.approx(column(summed, "loss")[-1], rel=0.02)
    assert column(first, "loss")[-1] < 0.9 * column(first, "loss")[0]
    assert first.measured["peak"] < summed.measured["peak"]
    for result in (summed, first):
        assert result.measured["peak"] == pytest.approx(result.predicted["peak"], rel=0.05)


def test_the_step_before(tmp_path: Path) -> None:
    result = train(config(tmp_path, "galore", rank=8, steps=5, clip=CLIP, release=True, clip_mode="previous"))
    norms, factors = column(result, "grad_norm"), column(result, "clip_factor")
    assert factors[0] == CLIP / (norms[0] + 1e-6)  # the first step is measured
    assert factors[1:] == [CLIP / (norm + 1e-6) for norm in norms[:-1]]


def test_the_norm_is_told_without_clipping(tmp_path: Path) -> None:
    ordinary = train(config(tmp_path / "a", "galore", rank=8, steps=3, clip=None))
    released = train(config(tmp_path / "b", "galore", rank=8, steps=3, clip=None, release=True))
    assert column(released, "grad_norm") == column(ordinary, "grad_norm")
    assert column(released, "clip_factor") == column(ordinary, "clip_factor") == [None] * 3
    parts = train(config(tmp_path / "c", "galore", rank=8, steps=3, clip=None, release=True, accumulate=2))
    assert column(parts, "grad_norm")[1:] == [None] * 2  # projected micro-batches: no whole gradient ever exists


def break_gradient(monkeypatch: pytest.MonkeyPatch, calls_at: set[int]) -> None:
    """Leave the loss finite, and make the gradient of the first layer infinite in these forwards (from 0)."""
    calls = iter(range(10**6))

    def broken(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        loss = causal_loss(model, tokens)
        if next(calls) in calls_at:
            weight = model.model.layers[0].mlp.up_proj.weight
            loss = loss + ((weight - weight.detach()).sum() * 1e38 * 1e38).nan_to_num(0.0)
        return loss

    monkeypatch.setattr(session, "causal_loss", broken)


def test_a_bad_gradient_drops_the_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as the ordinary mode: the leaves before the bad one in backward have not moved either."""
    job = {"steps": 4, "clip": CLIP}
    break_gradient(monkeypatch, {1})
    ordinary = train(config(tmp_path / "a", **job))
    break_gradient(monkeypatch, {2})  # the measuring pass of the second step; no second pass follows it
    released = train(config(tmp_path / "b", release=True, clip_mode="two-pass", **job))
    assert ordinary.skipped == released.skipped == 1
    reasons = [[x["reason"] for x in run.history if x["event"] == "skip"] for run in (ordinary, released)]
    assert reasons == [["the gradient norm is inf"], ["the gradient norm is inf"]]
    for name, tensor in weights(ordinary).items():
        assert torch.equal(weights(released)[name], tensor), name


def test_two_passes_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is clipped, and a bad gradient drops the whole step: the ordinary run, bit for bit."""
    job = {"steps": 4, "clip": None}
    break_gradient(monkeypatch, {1})
    ordinary = train(config(tmp_path / "a", **job))
    break_gradient(monkeypatch, {2})
    released = train(config(tmp_path / "b", release=True, clip_mode="two-pass", **job))
    assert ordinary.skipped == released.skipped == 1
    assert column(released, "grad_norm") == column(ordinary, "grad_norm")
    assert column(released, "clip_factor") == [None] * 3
    for name, tensor in weights(ordinary).items():
        assert torch.equal(weights(released)[name], tensor), name


@pytest.mark.parametrize("micro", [1, 3])
def test_a_bad_gradient_seen_at_the_end_of_the_step(
    micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host does not look at each leaf: the step is reported, and no bad number is written."""
    build = session.build_optimizer

    def built(job: Any, model: Any) -> Any:
        optimizer = build(job, model)
        optimizer.clip_release(None, strict="step")
        return optimizer

    monkeypatch.setattr(session, "build_optimizer", built)
    break_gradient(monkeypatch, {micro})  # in the second step
    job = {"steps": 4, "clip": None, "accumulate": micro, "rank": 8, "release": True}
    result = train(config(tmp_path, "galore", **job))
    assert result.skipped == 1
    (reason,) = [line["reason"] for line in result.history if line["event"] == "skip"]
    assert "layers.0.mlp.up_proj.weight is not finite" in reason
    assert all(bool(tensor.isfinite().all()) for tensor in weights(result).values())


def test_a_bad_gradient_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_gradient(monkeypatch, {2})  # the second step; the first one was measured
    result = train(config(tmp_path, release=True, clip_mode="previous", clip=CLIP, steps=4))
    norms, factors = column(result, "grad_norm"), column(result, "clip_factor")
    assert result.skipped == 1
    assert len(norms) == 3
    assert factors[1] == CLIP / (norms[0] + 1e-6)  # of the step before the skipped one
    assert all(bool(tensor.isfinite().all()) for tensor in weights(result).values())


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("galore", {"clip_mode": "previous", "rank": 8, "options": {"period": 4}}),
        ("adamw", {"clip_mode": "previous", "accumulate": 2}),
        ("galore", {"clip_mode": "two-pass", "accumulate": 2, "rank": 8, "options": {"period": 4}}),
        (
            "galore",
            {
                "clip_mode": "two-pass",
                "clip_parts": 2,
                "accumulate": 2,
                "refresh_parts": 3,
                "rank": 8,
                "options": {"period": 2},
            },
        ),
        (
            "galore-8bit",
            {"clip_mode": "two-pass", "accumulate": 2, "refresh_from": "first", "rank": 8, "options": {"period": 2}},
        ),
    ],
    ids=["previous", "previous-accumulate", "two-pass-accumulate", "bases in passes", "bases from the first"],
)
def test_killed_and_resumed_bit_for_bit(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    job = {"steps": 7, "clip": CLIP, "release": True, "checkpoint_every": 3, **changes}
    train(config(tmp_path / "whole", method, **job))
    out = tmp_path / "run"
    assert finish(config(out, method, **job), fail_at="after_rename@2") == -signal.SIGKILL
    snapshot = checkpoint.load_latest(out / "checkpoints")
    assert snapshot is not None
    assert snapshot.optimizer["param_groups"][0]["released_norm"] > 0
    train(config(out, method, resume=True, **job))
    assert fingerprint(out) == fingerprint(tmp_path / "whole")
    ends = [metrics.read(run / "metrics.jsonl") for run in (out, tmp_path / "whole")]
    told = [[(x["grad_norm"], x["clip_factor"]) for x in lines if x["event"] == "step"] for lines in ends]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 1.0}, r"train\.clip: method\.release .* train\.clip_mode to two-pass .* or previous"),
        ({"key": "galore", "rank": 8, "clip_mode": "previous", "accumulate": 2}, r"norm of the whole one.*two-pass"),
        (
            {"clip": None, "refresh_from": "first", "refresh_parts": 2},
            r"train\.refresh_parts: 2 passes .* leave one of them out",
        ),
        ({"key": "apollo-mini", "clip_mode": "two-pass", "accumulate": 2}, r"one micro-batch per step"),
    ],
    ids=["how", "projected", "two sources", "raw gradient"],
)
def test_refused_before_the_first_step(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(config(tmp_path / "run", release=True, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
