"""Fine-tuning with forward passes only, and with gradients, on tasks: it learns, resumes bit for bit, is planned, logged and replayed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from task_models import bert, copa, job, llama, table
from train_runs import fingerprint

import tare
from tare.core.errors import InputError
from tare.plan.activations import causal_loss
from tare.plan.measure import StepMeter
from tare.plan.models import build_model
from tare.train import loop, metrics, progress, session
from tare.train.evaluate import evaluating
from tare.train.replaying import replay_folder
from tare.train.tasks.data import open_task
from tare.train.tasks.scoring import scores


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(place / "model" / "model.safetensors") for place in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_broke_off_ends_with_the_same_bits_and_the_same_log(tmp_path: Path) -> None:
    data, model = table(tmp_path / "t.jsonl"), llama(tmp_path / "m", weights=True)
    options: dict[str, Any] = {"options": {"rule": "adam"}, "steps": 5}
    whole = loop.train(job(tmp_path / "whole", model, data, **options))

    def fail(event: Any) -> None:
        if isinstance(event, progress.StepDone) and event.step == 5:
            raise OSError("the power is out")

    with pytest.raises(OSError, match="power"):
        loop.train(job(tmp_path / "cut", model, data, **options), on_event=fail)
    assert (tmp_path / "cut" / "checkpoints" / "step-4").is_dir()
    loop.train(job(tmp_path / "cut", model, data, resume=True, **options))
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    assert (tmp_path / "cut" / "run.seeds").read_bytes() == (tmp_path / "whole" / "run.seeds").read_bytes()
    lines = [
        [
            (x["event"], x["step"], x["loss"])
            for x in metrics.read(tmp_path / name / "metrics.jsonl")
            if x["event"] in ("step", "eval")
        ]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert [step for event, step, _ in lines[0] if event == "eval"] == [0, 2, 4, 5]
    assert whole.forwards == 10
    assert whole.zero_shot.keys() == whole.scores.keys() == {"accuracy", "f1"}
    done = replay_folder(tmp_path / "whole" / "run.seeds", Path(model), tmp_path / "again")
    assert done.exact
    (tmp_path / "again").rename(tmp_path / "model")
    assert same(tmp_path, tmp_path / "whole")


SLOWLY = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "mezo") for kind in ("causal", "masked", "classifier", "choice")),
        ("classifier", "adamw"),
        *(pytest.param(kind, "adamw", marks=SLOWLY) for kind in ("causal", "masked", "choice")),
    ],
)
def test_every_kind_of_model_takes_steps(kind: str, method: str, tmp_path: Path) -> None:
    architecture = {"masked": "BertForMaskedLM", "classifier": "BertModel"}.get(kind)
    model = bert(tmp_path / "m", architecture) if architecture else llama(tmp_path / "m", weights=True)
    data = copa(tmp_path / "t.jsonl") if kind == "choice" else table(tmp_path / "t.jsonl", 30)
    more = {"task": "choice"} if kind == "choice" else {}
    heard: list[Any] = []
    done = loop.train(job(tmp_path / "r", model, data, method, steps=2, **more), on_event=heard.append)
    assert done.steps == 2
    assert done.skipped == 0
    assert not same_weights(Path(model), done.out / "model")
    assert (done.forwards, (done.out / "run.seeds").exists()) == ((4, True) if method == "mezo" else (0, False))
    assert done.predicted["peak"] >= 0.95 * done.measured["peak"]  # of the longest examples
    notes = [event.text for event in heard if isinstance(event, progress.Note)]
    assert any("dropout off" in note for note in notes) == (method == "mezo")


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    b = {name if name in a else name.removeprefix("bert."): tensor for name, tensor in b.items()}
    assert a.keys() & b.keys()
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


@pytest.mark.parametrize("objective", ["loss", "accuracy", "f1"])
def test_what_a_step_evaluates_is_the_objective_of_one_batch(objective: str, tmp_path: Path) -> None:
    data, model = table(tmp_path / "t.jsonl"), llama(tmp_path / "m", weights=True)
    config = session.resolve(job(tmp_path / "r", model, data, objective=objective, options={"eps": 0.3}))
    run = session.build(config, {})
    assert not run.model.training
    records: list[Any] = []
    run.optimizer.on_step = records.append  # type: ignore[attr-defined]
    batch = run.order.batch(0, 4)
    run.optimizer.step(lambda: run.objective(batch))  # type: ignore[arg-type]
    values = records[0].losses
    assert len(set(values)) == 2 or objective != "loss"
    if objective == "accuracy":
        assert all(4 * value == round(4 * value) for value in values)
    with evaluating(run.model), torch.no_grad():
        at_rest = float(run.objective(batch))
    assert 0.0 <= at_rest <= 1.0 or objective == "loss"


def test_a_run_is_the_loop_that_one_would_write(tmp_path: Path) -> None:
    """Same weights, bit for bit, as stepping by hand on the run's batches with cross-entropy over the answers."""
    data, model = table(tmp_path / "t.jsonl"), llama(tmp_path / "m", weights=True)
    config = job(tmp_path / "r", model, data, steps=3, schedule="constant", warmup=0.0, accumulate=2)
    done = loop.train(config)
    task = open_task(config)
    net = build_model(model).eval()
    optimizer = tare.MeZO(net, lr=1e-3, seed=0)
    for step in range(3):
        batches = [task.batch(8 * step + 4 * part, 4) for part in range(2)]

        def closure(batches: list[Any] = batches) -> torch.Tensor:
            found = [torch.nn.functional.cross_entropy(scores(net, "causal", batch), batch.gold) for batch in batches]
            return (found[0] + found[1]) / 2

        optimizer.step(closure)
    saved = load_file(done.out / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in net.state_dict().items() if name in saved)
    assert done.forwards == 12


@pytest.mark.slow
def test_gradients_learn_the_rule(tmp_path: Path) -> None:
    data, model = table(tmp_path / "t.jsonl"), bert(tmp_path / "m", "BertForSequenceClassification")
    config = job(
        tmp_path / "r", model, data, "adamw", lr=1e-2, steps=60, batch=16, checkpoint_every=1000, eval_every=1000
    )
    done = loop.train(config)
    assert done.scores["accuracy"] > done.zero_shot["accuracy"]
    assert done.scores["accuracy"] > 0.9


def test_losses_that_are_not_finite_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tare.train.tasks import data as module

    real, calls = module.TaskData.objective, []

    def sometimes(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        return torch.tensor(math.nan) if len(calls) in (3, 4) else real(self, model, batch)

    monkeypatch.setattr(module.TaskData, "objective", sometimes)
    heard: list[Any] = []
    done = loop.train(job(tmp_path / "r", llama(tmp_path / "m"), table(tmp_path / "t.jsonl")), on_event=heard.append)
    assert done.skipped == 1
    assert [event.step for event in heard if isinstance(event, progress.Skipped)] == [2]
    assert "1 skipped" in progress.step_line([event for event in heard if isinstance(event, progress.StepDone)][-1])


def test_an_objective_without_gradient_needs_a_forward_only_method(tmp_path: Path) -> None:
    config = job(tmp_path / "r", llama(tmp_path / "m"), table(tmp_path / "t.jsonl"), "adamw", objective="accuracy")
    with pytest.raises(InputError, match=r"task.objective: accuracy has no gradient, and adamw .*mezo"):
        loop.train(config)
    assert not (tmp_path / "r").exists()


def test_few_shots_and_evaluation_data_of_its_own(tmp_path: Path) -> None:
    held = table(tmp_path / "held.jsonl", 10)
    config = job(tmp_path / "r", llama(tmp_path / "m"), table(tmp_path / "t.jsonl"), shots=3, eval_source=held)
    run = session.build(session.resolve(config), {})
    assert (len(run.task.train), len(run.task.eval)) == (6, 10)  # type: ignore[union-attr]
    assert sum(example.gold for example in run.task.train) == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "batch", "seq", "hyper", "precision"),
    [
        ("llama-tiny", 4, 128, {}, "fp32"),
        ("llama-tiny", 1, 16, {}, "bf16"),
        ("llama-tiny", 2, 64, {"rule": "adam"}, "fp32"),
        ("llama-tiny", 4, 64, {"memory": "in-place-exact"}, "fp32"),
        pytest.param("llama-tiny", 4, 128, {}, "bf16", marks=pytest.mark.slow),
        pytest.param("llama-tiny", 2, 64, {"rule": "adam"}, "bf16", marks=pytest.mark.slow),
        pytest.param("llama-9m", 2, 128, {}, "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_within_five_percent(
    model: str, batch: int, seq: int, hyper: dict[str, Any], precision: Any
) -> None:
    plan = tare.plan(model, batch=batch, seq=seq, methods=["mezo"], precision=precision, hyper=hyper)
    net = build_model(model, dtype=precision).eval()
    optimizer = plan.settings.choice("mezo").build(net)
    tokens = torch.arange(batch * seq).view(batch, seq) % 1000
    for _ in range(2):
        with StepMeter(net, optimizer, extra=[tokens]) as meter:
            optimizer.step(lambda: causal_loss(net, tokens))  # type: ignore[arg-type]
    row = plan.row("mezo")
    assert row.peak == pytest.approx(meter.peak, rel=0.05)
    assert row.state == int(optimizer.state_bytes())


def test_a_first_look_at_the_weights_is_planned() -> None:
    plan = tare.plan("llama-tiny", batch=1, seq=16, methods=["sparse-mezo"])
    net = build_model("llama-tiny").eval()
    optimizer = plan.settings.choice("sparse-mezo").build(net)
    tokens = torch.arange(16).view(1, 16)
    with StepMeter(net, optimizer, extra=[tokens]) as meter:
        optimizer.step(lambda: causal_loss(net, tokens))  # type: ignore[arg-type]
    assert plan.row("sparse-mezo").event == "first step"
    assert plan.row("sparse-mezo").peak == pytest.approx(meter.peak, rel=0.05)
