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
from tare.train import checkpoint, metrics, step
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

    monkeypatch.setattr(step, "causal_loss", broken)


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
    ],
    ids=["previous", "previous-accumulate", "two-pass-accumulate"],
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
        ({"key": "apollo-mini", "clip_mode": "two-pass", "accumulate": 2}, r"one micro-batch per step"),
    ],
    ids=["how", "projected", "raw gradient"],
)
def test_refused_before_the_first_step(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(config(tmp_path / "run", release=True, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
