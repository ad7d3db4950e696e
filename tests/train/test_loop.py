"""The loop itself: micro-batches, clipping, bad numbers, precision, memory, and what it tells."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from train_runs import config, fingerprint

from tare.core.errors import DoesNotFit
from tare.plan.activations import causal_loss
from tare.train import checkpoint, progress, session
from tare.train.loop import Result, train
from tare.train.trainer import Diverged


def weights(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.out / "model" / "model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def break_loss(monkeypatch: pytest.MonkeyPatch, at: set[int], value: float = math.nan) -> None:
    """Make the loss of the micro-batches with these numbers (from 0) `value`, gradient included."""
    calls = iter(range(10**6))

    def broken(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        loss = causal_loss(model, tokens)
        return loss * value if next(calls) in at else loss

    monkeypatch.setattr(session, "causal_loss", broken)


def break_gradient(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Leave the loss finite, and make the gradient of one middle layer infinite in one micro-batch."""
    calls = iter(range(10**6))

    def broken(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        loss = causal_loss(model, tokens)
        if next(calls) == at:
            weight = model.model.layers[0].mlp.up_proj.weight
            # d/dw of (w - w) * 1e38 * 1e38 is infinite, its value is zero
            loss = loss + ((weight - weight.detach()).sum() * 1e38 * 1e38).nan_to_num(0.0)
        return loss

    monkeypatch.setattr(session, "causal_loss", broken)


def test_a_model_learns(tmp_path: Path) -> None:
    result = train(config(tmp_path, "apollo-mini", name="llama-tiny", steps=30, eval_every=30, checkpoint_every=30))
    losses = [line["loss"] for line in result.history if line["event"] == "step"]
    assert losses[0] == pytest.approx(math.log(1024), abs=0.2)  # a fresh model knows nothing
    assert result.loss is not None
    assert result.loss < losses[0] - 0.4
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.tokens == 30 * 2 * 32
    assert result.tokens_per_second > 0
    assert not result.interrupted


@pytest.mark.parametrize("method", ["adamw", "galore"])
def test_accumulation_equals_the_big_batch(method: str, tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole", method, steps=3, batch=6))
    parts = train(config(tmp_path / "parts", method, steps=3, batch=2, accumulate=3))
    assert whole.tokens == parts.tokens
    for a, b in zip(whole.history, parts.history, strict=True):
        if a["event"] == "step":
            # the same fp32 sum in another order
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    # Adam divides by the size of the gradient, so entries near zero may differ by more: a hundredth of a step
    assert distance(weights(whole), weights(parts)) < 3 * 1e-2 * whole.config.method.lr


def test_release_equals_the_ordinary_step(tmp_path: Path) -> None:
    ordinary = train(config(tmp_path / "a", "galore", rank=8, clip=None, steps=4))
    released = train(config(tmp_path / "b", "galore", rank=8, clip=None, steps=4, release=True))
    assert distance(weights(ordinary), weights(released)) == 0
    assert released.measured["peak"] <= ordinary.measured["peak"]
    norms = [[x["grad_norm"] for x in run.history if x["event"] == "step"] for run in (ordinary, released)]
    assert norms[0] == norms[1]


def test_clipping_bounds_the_norm_that_reaches_the_optimizer(tmp_path: Path) -> None:
    norms: list[float] = []

    def spy(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def listen(event: progress.Event) -> None:
        if isinstance(event, progress.Started):  # the planner has stepped fake tensors before
            hooks.append(register_optimizer_step_pre_hook(spy))

    hooks: list[Any] = []
    result = train(config(tmp_path, steps=3, clip=0.25), on_event=listen)
    hooks[0].remove()
    told = [line["grad_norm"] for line in result.history if line["event"] == "step"]
    assert all(norm > 0.25 for norm in told)
    assert norms == pytest.approx([0.25] * 3, rel=1e-4)  # torch divides by norm + 1e-6


@pytest.mark.parametrize("release", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(
    release: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, Any]] = []
    told: list[progress.Event] = []

    def listen(event: progress.Event) -> None:
        told.append(event)
        if isinstance(event, progress.Saved) and event.path.name.startswith("step-"):
            snapshot = checkpoint.load(event.path, event.step)
            kept.append({"weights": snapshot.weights, "state": checkpoint.flatten(snapshot.optimizer["state"])})

    break_loss(monkeypatch, at={2})
    job = {"clip": None, "release": True} if release else {}
    result = train(config(tmp_path, steps=4, checkpoint_every=1, **job), on_event=listen)
    assert all(torch.equal(kept[1]["weights"][name], tensor) for name, tensor in kept[2]["weights"].items())
    (plain, tensors), (plain_after, tensors_after) = kept[1]["state"], kept[2]["state"]
    assert plain == plain_after
    assert all(torch.equal(tensors[name], tensors_after[name]) for name in tensors)
    assert not torch.equal(kept[3]["weights"]["lm_head.weight"], kept[2]["weights"]["lm_head.weight"])
    assert [event for event in told if isinstance(event, progress.Skipped)] == [
        progress.Skipped(3, "the loss is nan", streak=1, limit=10)
    ]
    assert result.skipped == 1
    assert [line["reason"] for line in result.history if line["event"] == "skip"] == ["the loss is nan"]
    assert result.steps == 4


@pytest.mark.parametrize("micro", [0, 1])
def test_a_bad_micro_batch_leaves_no_part_of_itself(
    micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after a skipped one starts from nothing, also where release gathers projected gradients."""
    job = {"clip": None, "accumulate": 2, "steps": 3, "rank": 8, "warmup": 0.0, "schedule": "constant"}
    break_loss(monkeypatch, at={2 + micro})  # in the second step, when there is a basis
    ordinary = train(config(tmp_path / "a", "galore", **job))
    break_loss(monkeypatch, at={2 + micro})  # in the second step, when there is a basis
    released = train(config(tmp_path / "b", "galore", release=True, **job))
    assert ordinary.skipped == released.skipped == 1
    # sums of projections against projection of the sum
    assert distance(weights(ordinary), weights(released)) < 1e-2 * 1e-2


@pytest.mark.parametrize("release", [False, True])
def test_an_infinite_gradient_is_seen_before_it_is_used(
    release: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradient(monkeypatch, at=1)
    job = {"clip": None, "release": True} if release else {}
    result = train(config(tmp_path, steps=4, **job))
    reasons = [line["reason"] for line in result.history if line["event"] == "skip"]
    assert len(reasons) == 1
    assert ("up_proj.weight is not finite" if release else "the gradient norm is") in reasons[0]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(result).values())
    snapshot = checkpoint.load_latest(tmp_path / "checkpoints")
    assert snapshot is not None
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.flatten(snapshot.optimizer)[1].values())


def test_too_many_bad_steps_in_a_row_end_the_run_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_loss(monkeypatch, at={1, 4, 5, 6})
    with pytest.raises(Diverged, match=r"step 7: the loss is nan, 3 steps in a row .*lower method\.lr") as caught:
        train(config(tmp_path / "run", steps=9, max_bad_steps=3))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-3", "step-6"]
    assert not (tmp_path / "run" / "run.lock").exists()


def test_skips_are_the_same_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_loss(monkeypatch, at={4})
    train(config(tmp_path / "whole", steps=8))
    break_loss(monkeypatch, at={4})
    with pytest.raises(InterruptedError):
        train(config(tmp_path / "run", steps=8), on_event=stop_at(5))
    break_loss(monkeypatch, at={1})  # resumed at step 3: the same batch is now the second one
    result = train(config(tmp_path / "run", steps=8, resume=True))
    assert result.skipped == 1
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def stop_at(number: int) -> Any:
    """A listener that fails, as any fault in the middle of a run would."""

    def listen(event: progress.Event) -> None:
        if isinstance(event, progress.Skipped | progress.StepDone) and event.step == number:
            raise InterruptedError

    return listen


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def poison(event: progress.Event) -> None:
        if isinstance(event, progress.StepDone) and event.step == 4:
            parameters[0].data[0, 0] = math.inf

    parameters: list[torch.Tensor] = []
    build = session.build_optimizer

    def remember(job: Any, model: Any) -> Any:
        parameters.append(model.lm_head.weight)
        return build(job, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "build_optimizer", remember)
        with pytest.raises(Diverged, match=r"the weight lm_head\.weight is no longer finite; not saved"):
            train(config(tmp_path, steps=9, max_bad_steps=50, eval_every=50), on_event=poison)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_precision(precision: str, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", precision=precision, steps=6))
    kinds = {tensor.dtype for tensor in weights(result).values()}
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert result.config.method.storage["weight"] == ("stochastic" if precision == "bf16" else "plain")
    exact = train(config(tmp_path / "exact", steps=6))
    assert result.loss == pytest.approx(exact.loss, rel=1e-2)


def test_activation_checkpointing_changes_memory_only(tmp_path: Path) -> None:
    job = {"name": "llama-tiny", "seq": 64, "batch": 4, "steps": 2}
    plain = train(config(tmp_path / "a", "apollo-mini", **job))
    again = train(config(tmp_path / "b", "apollo-mini", checkpointing=True, **job))
    assert distance(weights(plain), weights(again)) == 0
    assert again.measured["peak"] < plain.measured["peak"]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("adamw", {}),
        ("galore", {"rank": 32}),
        ("galore-8bit", {}),
        ("apollo-mini", {"checkpointing": True}),
        ("adamw", {"precision": "bf16"}),
        ("galore", {"release": True, "clip": None}),
    ],
)
def test_what_was_predicted_is_measured(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    told: list[progress.Event] = []
    result = train(config(tmp_path, method, name="llama-tiny", steps=2, seq=64, **changes), on_event=told.append)
    assert result.measured["state"] == result.predicted["state"] == result.state_bytes  # exact
    assert result.measured["peak"] == pytest.approx(result.predicted["peak"], rel=0.05)
    assert [event.measured for event in told if isinstance(event, progress.Measured)] == [result.measured]
    assert [line["measured"] for line in result.history if line["event"] == "memory"] == [result.measured]


def test_a_run_that_does_not_fit_is_refused_with_the_smallest_change(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="smallest change that fits"):
        train(config(tmp_path / "run", name="llama-tiny", seq=256, batch=8, budget="32MiB"))
    assert not (tmp_path / "run").exists()
    result = train(config(tmp_path / "run", "auto", name="llama-tiny", steps=2, budget="13MiB"))
    assert result.config.method.key != "auto"
    assert result.predicted["peak"] <= 13 << 20


def test_events_come_in_order(tmp_path: Path) -> None:
    told: list[progress.Event] = []
    job = {"checkpoint_async": "never"}  # beside the training, a checkpoint is whole at some later step
    train(config(tmp_path, steps=4, checkpoint_every=2, eval_every=2, **job), on_event=told.append)
    kinds = [type(event).__name__ for event in told if not isinstance(event, progress.Working)]
    steps = ["StepDone", "Measured", "StepDone", "Evaluated", "Saved", "StepDone", "StepDone", "Evaluated", "Saved"]
    assert kinds == ["Started", *steps, "Saved"]


def test_the_global_random_state_and_threads_of_the_caller(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(config(tmp_path / "run", steps=1, threads=before + 1))
    assert torch.get_num_threads() == before


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.RichProgress(every=0.0, label="adamw") as show:
        train(config(tmp_path, steps=3), on_event=show)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("adamw: ") for line in lines)
    assert sum("tokens/s" in line for line in lines) == 3
    assert any("memory, predicted / measured: weights" in line for line in lines)


def test_a_live_line_on_a_terminal(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    screen = io.StringIO()
    with progress.RichProgress(Console(file=screen, force_terminal=True, width=160)) as show:
        train(config(tmp_path, steps=2), on_event=show)
    assert "step 2/2" in screen.getvalue()
    assert "predicted" in screen.getvalue()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
