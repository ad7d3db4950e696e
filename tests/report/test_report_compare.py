"""A comparison with a stand-in for training: what is run, what is kept, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tare.core.errors import CheckpointError, DoesNotFit, InputError
from tare.plan.report import show
from tare.report.compare import MethodBegins, compare
from tare.report.rows import memory_table, table
from tare.train.config import MethodConfig, ModelConfig, RunConfig, RunSection, TrainConfig
from tare.train.loop import Result
from tare.train.progress import Started


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Every training is recorded and writes what the comparison looks at; lion does not fit, fira is interrupted."""
    seen: list[RunConfig] = []

    def train(config: RunConfig, *, on_event: Any) -> Result:
        seen.append(config)
        key, out = config.method.key, Path(config.run.out)
        if key == "lion":
            raise DoesNotFit("needs more")
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text("x")
        on_event(Started("m", key, 1, 0, 1, 1, out))
        memory = {"weights": 10, "state": 5, "activations": 5, "peak": 20}
        history = [{"event": "step", "step": 1, "loss": 4.0}, {"event": "eval", "step": 1, "loss": None}]
        return Result(
            out=out, method=key, steps=1, loss=float(len(key)), perplexity=2.0, eval_tokens=9, tokens=8,
            tokens_per_second=0.0, state_bytes=5, predicted=memory, measured={"weights": 10, "state": 5, "rest": 5, "peak": 20},
            seconds=1.0, skipped=0, interrupted=key == "fira", config=config, history=history,
        )  # fmt: skip

    monkeypatch.setattr("tare.train.loop.train", train)
    return seen


def config(out: Path, **run: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig("llama-tiny"), train=TrainConfig(steps=10), run=RunSection(out=str(out), budget="1GiB", **run)
    )


def test_every_method_runs_with_the_same_settings_in_its_own_folder(calls: list[RunConfig], tmp_path: Path) -> None:
    heard: list[Any] = []
    result = compare(config(tmp_path / "c"), ["adamw", "galore"], heard.append)
    assert [each.run.out for each in calls] == [str(tmp_path / "c" / "adamw"), str(tmp_path / "c" / "galore")]
    assert len({(each.train, each.data, each.run.seed) for each in calls}) == 1
    assert [(event.method, event.number) for event in heard if isinstance(event, MethodBegins)] == [
        ("adamw", 1),
        ("galore", 2),
    ]
    assert [row.method for row in result.rows] == ["adamw", "galore"]
    kept = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert kept == json.loads(json.dumps(result.to_json()))
    assert {"compare.yaml", "report.html", "adamw", "galore"} <= {path.name for path in (tmp_path / "c").iterdir()}


def test_options_go_to_the_methods_that_know_them(calls: list[RunConfig], tmp_path: Path) -> None:
    base = replace(config(tmp_path), method=MethodConfig(rank=4, lr=1e-3, options={"scale": 0.5}))
    compare(replace(base, run=replace(base.run, out=str(tmp_path / "c"))), ["adamw", "galore", "apollo-mini"])
    assert [each.method.rank for each in calls] == [None, 4, None]  # apollo-mini is rank 1 by what it is
    assert [each.method.options for each in calls] == [{}, {"scale": 0.5}, {"scale": 0.5}]
    assert {each.method.lr for each in calls} == {1e-3}


def test_nothing_starts_if_one_method_is_wrong(calls: list[RunConfig], tmp_path: Path) -> None:
    base = replace(config(tmp_path / "c"), method=MethodConfig(options={"period": 0}))
    with pytest.raises(InputError, match="period"):
        compare(base, ["adamw", "galore"])
    assert calls == []
    assert not (tmp_path / "c").exists()


def test_finished_methods_are_not_run_again(calls: list[RunConfig], tmp_path: Path) -> None:
    first = compare(config(tmp_path / "c"), ["adamw"])
    second = compare(config(tmp_path / "c", resume=True), ["adamw", "galore"])
    assert [each.method.key for each in calls] == ["adamw", "galore"]
    assert second.rows[0] == first.rows[0]
    longer = replace(config(tmp_path / "c", resume=True), train=TrainConfig(steps=11))
    compare(longer, ["adamw"])
    assert [each.method.key for each in calls] == ["adamw", "galore", "adamw"]
    assert calls[-1].run.resume


def test_an_interrupted_method_is_taken_up_again(calls: list[RunConfig], tmp_path: Path) -> None:
    result = compare(config(tmp_path / "c"), ["adamw", "fira", "galore"])
    assert result.interrupted
    assert [row.method for row in result.rows] == ["adamw"]
    assert not (tmp_path / "c" / "fira" / "row.json").exists()
    compare(config(tmp_path / "c", resume=True), ["adamw", "fira", "galore"])
    assert [each.method.key for each in calls] == ["adamw", "fira", "fira"]


def test_a_method_that_does_not_fit_is_a_row_unless_all_are(calls: list[RunConfig], tmp_path: Path) -> None:
    result = compare(config(tmp_path / "c"), ["lion", "adamw"])
    assert [(row.status, row.note) for row in result.rows] == [("refused", "needs more"), ("done", "")]
    with pytest.raises(DoesNotFit, match="no method fits: lion: needs more"):
        compare(config(tmp_path / "d"), ["lion"])
    assert not (tmp_path / "d").exists()


def test_folders_that_cannot_take_a_comparison(calls: list[RunConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        compare(config(tmp_path / "file"), ["adamw"])
    with pytest.raises(InputError, match="is not empty"):
        compare(config(tmp_path), ["adamw"])
    with pytest.raises(CheckpointError, match="no comparison"):
        compare(config(tmp_path, resume=True), ["adamw"])
    assert calls == []


def text_of(renderable: Any) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_are_aligned_and_add_up(calls: list[RunConfig], tmp_path: Path) -> None:
    rows = compare(config(tmp_path / "c"), ["adamw", "galore"]).rows
    shown = text_of(table(rows))
    assert max(map(len, shown.splitlines())) <= 100
    lines = [line.rstrip() for line in text_of(memory_table(rows[0])).splitlines() if line.strip()]
    assert [line.split()[0] for line in lines if line.split()[0].isalpha()] == [
        "MiB", "weights", "state", "rest", "activations", "peak",
    ]  # fmt: skip
    assert lines[-1].split()[-2:] == ["+0.0", "%"]


def test_a_plan_fits_a_terminal() -> None:
    from tare.plan.api import plan

    found = plan("llama-tiny", budget="1GiB", batch=1, seq=8, methods=["adamw", "galore-adafactor"])
    shown = text_of(show(found))
    assert "llama-tiny, batch 1, seq 8, fp32, budget 1.00 GiB" in shown
    assert shown.count("yes") == 2
    assert "\u2026" not in shown  # nothing is cut, and there is room for the longest event and method
    widest = next(line for line in shown.splitlines() if line.startswith("galore-adafactor")).rstrip()
    spare = len("optimizer step") - len(found.row("galore-adafactor").event)
    assert len(widest) + spare + len("100.44") - len("1.0") <= 100
