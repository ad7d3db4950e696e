"""`tare bench quality` with tiny settings: sweeps, seeds, going on after a kill, both settings, tables. No loss is asserted to be good."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tare.core.errors import InputError
from tare.report import bench_quality, bench_quality_tables, bench_rows, bench_run, bench_shapes, bench_specs
from tare.report.bench_quality import Wanted
from tare.report.tables import render
from tare.train.config import DataConfig, ModelConfig, RunConfig, RunSection, TrainConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        lines = (f"{number} times {other} is {number * other}." for other in range(200))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def wanted(source: Path, runs: Path, methods: str, **changes: object) -> Wanted:
    config = RunConfig(
        model=ModelConfig(name="llama-tiny"),
        data=DataConfig(source=str(source), seq=16, eval_tokens=64, eval_fraction=0.2),
        train=TrainConfig(steps=4, batch=1),
        run=RunSection(device="cpu", threads=1),
    )
    small = {"seeds": 2, "grid": 3, "short": 0.25, "middle": 0.5, "name": "sums"}
    return Wanted(config, bench_specs.parse(methods), runs=runs, **{**small, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Wanted, list[str]]:
    said: list[str] = []
    job = wanted(source, tmp_path_factory.mktemp("runs"), "adamw,galore:rank=8,lr=5e-3,adamw:dense_lr=2,lr=1e-3")
    return bench_quality.bench_quality(job, note=said.append), job, said


def test_methods_are_named_with_their_options() -> None:
    first, second = bench_specs.parse(
        "compose:basis=dct,residual=sign,lr=~1e-3,galore:betas=[0.9,0.99],storage.moment=int8"
    )
    assert (first.key, first.options, first.centre) == ("compose", {"basis": "dct", "residual": "sign"}, 1e-3)
    assert (second.options, second.storage) == ({"betas": [0.9, 0.99]}, {"moment": "int8"})
    for text, message in (
        ("galor", r"unknown method 'galor'.*galore"), ("galore:rang=4", r"no option 'rang'.*rank"), ("rank=4", "no method before it"),
        ("galore:rank=", "'rank' has no value"), ("adamw,adamw", "named twice"), ("adamw:dense_lr=0", "expected a number > 0"),
        (" , ", "expected a comma-separated list"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            bench_specs.parse(text)


def test_what_runs_by_default_can_be_built() -> None:
    bench = bench_shapes.build("llama-tiny-layer")
    found = bench_quality.default_methods()
    assert len(found) > len(bench_quality.BESIDE)
    assert {spec.text for spec in found} >= set(bench_quality.BESIDE)
    for row in bench_rows.ours(bench, found):
        row.build(bench)


def test_everybody_sees_the_same_tokens_and_every_seed_is_kept(compared) -> None:
    result, _, _ = compared
    plain = json.loads(json.dumps(result, allow_nan=False))
    assert [row["method"] for row in plain["rows"]] == ["adamw", "galore:rank=8,lr=5e-3", "adamw:dense_lr=2,lr=1e-3"]
    for row in plain["rows"]:
        assert row["status"] == "done"
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert {run["tokens"] for run in row["runs"]} == {64}
        assert row["losses"] == [run["loss"] for run in row["runs"]]
        assert row["loss"] == pytest.approx(sum(row["losses"]) / 2)
        assert row["spread"] == pytest.approx(abs(row["losses"][0] - row["losses"][1]) / 2**0.5)
        assert row["predicted_peak"] == pytest.approx(row["measured_peak"], rel=0.1)
    adamw, galore, apart = plain["rows"]
    assert adamw["state_bytes"] == 8 * 1_053_824 == apart["state_bytes"] > galore["state_bytes"]
    assert adamw["over_adamw"] == {"mean": 0.0, "spread": 0.0}
    assert galore["over_adamw"]["mean"] == pytest.approx(galore["loss"] - adamw["loss"])
    assert plain["corpus"]["name"] == "sums"


def test_only_what_has_no_learning_rate_is_swept(compared) -> None:
    result, job, _ = compared
    adamw, galore, apart = result["rows"]
    assert galore["sweep"] == apart["sweep"] == []
    assert (galore["lr"], apart["lr"]) == (5e-3, 1e-3)
    short = [tried for tried in adamw["sweep"] if tried["steps"] == 1]
    longer = [tried for tried in adamw["sweep"] if tried["steps"] == 2]
    assert 3 <= len(short) <= 3 + bench_quality.EXTENSIONS
    assert len(longer) == 3
    best = min(longer, key=lambda tried: tried["loss"])
    assert adamw["lr"] == best["lr"]
    centre = min(short, key=lambda tried: tried["loss"])["lr"]
    assert sorted(tried["lr"] for tried in longer) == pytest.approx([centre / 2, centre, centre * 2], rel=1e-2)
    assert job.cost == 3 * 0.25 + 3 * 0.5 + 2


def test_a_finished_run_is_not_made_again(compared, monkeypatch) -> None:
    result, job, said = compared
    assert any("whole runs done, about" in line for line in said)
    monkeypatch.setattr(bench_run, "train_once", lambda *given: pytest.fail("trained again"))
    assert bench_quality.bench_quality(job)["rows"] == result["rows"]
    kept = sorted(path.name for path in job.runs.iterdir())
    assert len(kept) == len(set(kept)) >= 3 + 3 + 2 * 3
    (job.runs / kept[0]).unlink()  # as if it had been killed in the middle
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        bench_quality.bench_quality(job)


def test_equal_settings_give_equal_numbers(compared, source) -> None:
    result, job, _ = compared
    config, _ = bench_quality._Bench(job, print).config(job.methods[1], "clean", 5e-3, 1, 4)
    again = bench_run.train_once(config)
    assert again.loss == result["rows"][1]["losses"][1]
    assert again.legacy_loss is None


def test_legacy_is_what_the_published_scripts_do(source, tmp_path) -> None:
    job = wanted(source, tmp_path / "runs", "galore:rank=8,lr=5e-3,adamw-8bit:lr=1e-3", settings=("legacy",), seeds=1)
    galore, eight = bench_quality.bench_quality(job)["rows"]
    run = galore["runs"][0]
    assert run["storage"]["moment"] == "bf16_legacy"
    assert run["storage"]["weight"] == "plain"
    assert eight["runs"][0]["storage"]["moment"] == "int8"
    batches = 4  # of one sequence of 16
    assert run["legacy_loss"] == pytest.approx(run["loss"] * batches / (batches + 1), rel=1e-3)
    assert galore["loss"] == run["legacy_loss"]


def test_what_refuses_or_diverges_is_a_row_with_the_reason(source, tmp_path, monkeypatch) -> None:
    job = wanted(source, tmp_path / "runs", "galore:storage.basis=seed,adamw:lr=1e30", seeds=1)
    job = replace(job, config=replace(job.config, train=replace(job.config.train, clip=None, max_bad_steps=1)))
    result = bench_quality.bench_quality(job)
    refused, diverged = result["rows"]
    assert refused["status"] == "refused"
    assert "seed" in refused["reason"]
    assert diverged["loss"] is None
    assert diverged["diverged"] == 1
    shown = bench_quality_tables.text(json.loads(json.dumps(result, allow_nan=False)))
    assert "1 of 1 diverged" in shown
    assert "Not run: `galore:storage.basis=seed`" in shown


def test_tables_are_made_from_the_file(compared, tmp_path) -> None:
    result, _, _ = compared
    (tmp_path / "quality-sums.json").write_text(json.dumps(result))
    assert "| `galore:rank=8,lr=5e-3` | 0.005 |" in render("quality-sums/quality", tmp_path)
    assert "1 steps" in render("quality-sums/lr", tmp_path)
    assert "3 around the preset" in bench_quality_tables.text(result)


def test_the_command_leaves_no_paths_of_this_machine(source, tmp_path, capsys, monkeypatch) -> None:
    from tare.cli.main import main

    out = tmp_path / "deep" / "quality.json"
    words = [
        "bench",
        "quality",
        "--model",
        "llama-tiny",
        "--data",
        source,
        "--steps",
        2,
        "--batch",
        1,
        "--seq",
        16,
        "--threads",
        1,
    ]
    words += [
        "--data.eval_tokens",
        64,
        "--data.eval_fraction",
        0.2,
        "--methods",
        "adamw:lr=1e-3",
        "--seeds",
        1,
        "--name",
        "sums",
    ]
    assert main([str(word) for word in [*words, "--runs", tmp_path / "runs", "--out", out, "--json"]]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    text = out.read_text()
    assert str(tmp_path) not in text
    assert str(source) not in text
    assert str(Path.home()) not in text
    assert "--methods adamw:lr=1e-3" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": ("dirty",)}, "--setting: expected clean, legacy or both"), ({"grid": 4}, "--grid: expected an odd number"),
        ({"seeds": 0}, "--seeds: expected a number from 1"), ({"factor": 1.0}, "--factor: expected a number from 1.01"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(source, tmp_path, changes, message) -> None:
    with pytest.raises(InputError, match=message):
        wanted(source, tmp_path, "adamw", **changes)
