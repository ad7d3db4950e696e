"""`tare bench step` on a tiny model: the result says what was run, adds up, and turns into tables. No speed is asserted."""

import json
from pathlib import Path

import pytest
import torch

from tare.core.errors import InputError
from tare.report import bench_rows, bench_step, bench_tables, bench_timing
from tare.report.tables import render


@pytest.fixture(scope="module")
def result():
    return bench_step.bench_step(
        "llama-tiny",
        ["adamw", "adamw-8bit", "galore", "apollo", "apollo-mini"],
        rounds=3,
        threads=1,
        period=3,
        refresh_rounds=2,
        patience=0,
    )


def row(result, key):
    return next(row for row in result["rows"] if row["key"] == key)


def test_it_says_what_was_measured_and_on_what(result):
    plain = json.loads(json.dumps(result, allow_nan=False))
    assert plain["kind"] == "bench-step"
    assert plain["shapes"]["parameters"] == 1_053_824
    assert plain["command"].startswith("tare bench step --shapes llama-tiny --methods adamw,")
    assert plain["versions"]["torch"] == torch.__version__
    assert plain["threads"] == 1
    assert plain["matrix_library"]
    assert plain["native"]
    assert plain["bandwidth"]["copy_gb_s"] > 0


def test_every_round_is_kept_and_ratios_are_taken_within_a_round(result):
    assert result["rows"][0]["key"] == bench_rows.BAR
    for found in result["rows"][1:]:
        assert len(found["ms"]) == len(found["bar_ms"]) == 3
        assert found["ratios"] == [own / bar for own, bar in zip(found["ms"], found["bar_ms"], strict=True)]
        assert found["ratio"]["q1"] <= found["ratio"]["median"] <= found["ratio"]["q3"]


def test_state_is_counted_to_the_byte(result):
    steps = 4 * len(list(bench_step._model("llama-tiny", 0)[0].parameters()))
    assert (
        row(result, bench_rows.BAR)["state_bytes"] == 8 * 1_053_824 + steps
    )  # torch keeps a step tensor per parameter
    assert row(result, "adamw")["state_bytes"] == 8 * 1_053_824
    assert row(result, "adamw-8bit")["state_bytes"] < 2.1 * 1_053_824


def test_state_bytes_agree_with_the_optimizers_own_account():
    model, _, ranks = bench_step._model("llama-tiny", 0)
    for spec in bench_rows.ROWS:
        if spec.kind == "tare":
            optimizer = spec.build(model, ranks)
            assert bench_rows.state_bytes(optimizer) == optimizer.state_bytes().total, spec.key


def test_temporaries_stay_under_one_largest_matrix(result):
    """Issue 2: at most one largest matrix a method. Here also: a matrix of the layers, not the embedding."""
    for found in result["rows"][1:]:
        assert found["temporary_bytes"] <= result["shapes"]["largest_matrix_bytes"], found["key"]
    assert row(result, "adamw")["temporary_bytes"] < 4096
    assert row(result, "galore")["temporary_bytes"] <= result["shapes"]["largest_linear_bytes"]


def test_refreshes_and_a_staggered_period_are_timed_apart(result):
    assert {found["key"] for found in result["refreshes"]} == {"galore", "apollo", "apollo-mini"}
    assert all(len(found["refresh_ms"]) == 2 for found in result["refreshes"])
    assert all(len(found["steps_ms"]) == 3 for found in result["staggered"])


def test_a_jump_brings_a_refresh_about():
    model, _, ranks = bench_step._model("llama-tiny", 0)
    spec = next(spec for spec in bench_rows.REFRESHES if spec.key == "apollo-mini")
    contender = bench_rows.Contender(spec, spec.build(model, ranks))
    bench_timing.warm_up(contender)
    state = next(s for s in contender.optimizer.state.values() if "refreshed" in s)
    assert state["refreshed"] == 1
    contender.jump(200)
    contender.step()
    assert state["refreshed"] == 2


def test_tables_are_made_from_the_file(result, tmp_path):
    (tmp_path / "step-llama-60m.json").write_text(json.dumps(result))
    for name in ("step-llama-60m", "step-llama-60m/refreshes", "step-llama-60m/staggered", "step-llama-60m/notes"):
        assert "apollo" in render(name, tmp_path) or name.endswith("notes")
    assert "| galore r=32 |" in render("step-llama-60m", tmp_path)
    assert "torch AdamW fused (the bar)" in bench_tables.text(result)
    assert "x fused AdamW" in bench_tables.markdown(result)


def test_disturbed_samples_are_repeated_until_patience_ends(monkeypatch):
    monkeypatch.setattr(bench_timing.Witness, "disturbance", lambda self: 1.0)
    monkeypatch.setattr(bench_timing.time, "sleep", lambda seconds: None)
    patience = bench_timing.Patience(1.0)
    calls = []
    assert len(patience.sample(lambda: calls.append(0))) == 1
    assert patience.repeated == len(calls) - 1 >= 3
    assert patience.kept == 1


def test_peers_are_optional(monkeypatch):
    monkeypatch.setattr(bench_rows, "installed", lambda package: None)
    wanted, absent = bench_step._choose(["adamw", "galore-torch"], peers=True)
    assert [spec.key for spec in wanted] == ["adamw"]
    assert absent == [{"key": "galore-torch", "package": "galore-torch", "reason": "not installed"}]
    assert bench_step._choose(["galore-torch"], peers=False) == ([], [])


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match=r"--shapes: unknown model 'lama-60m'.*llama-60m"):
        bench_step.bench_step("lama-60m", ["adamw"], refresh=False)
    with pytest.raises(InputError, match=r"--methods: unknown row 'galor'.*galore"):
        bench_step.bench_step("llama-tiny", ["galor"])
    with pytest.raises(InputError, match="--rounds: expected a whole number >= 2"):
        bench_step.bench_step("llama-tiny", rounds=1)


def test_the_command_writes_json_without_paths_of_this_machine(tmp_path, capsys):
    out = tmp_path / "folder" / "step.json"
    arguments = [
        "--shapes",
        "llama-tiny",
        "--methods",
        "adamw",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--no-refresh",
        "--patience",
        "0",
    ]
    assert bench_step.run([*arguments, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text())
    assert printed == written
    assert str(tmp_path) not in out.read_text()
    assert str(Path.home()) not in out.read_text()
    assert torch.get_num_threads() >= 1
