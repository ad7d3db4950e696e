"""`tare bench step` on a tiny model: the result says what was run, adds up, and turns into tables. No speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tare.core.errors import InputError
from tare.methods import registry
from tare.report import (
    bench_peers,
    bench_probe,
    bench_rows,
    bench_shapes,
    bench_specs,
    bench_step,
    bench_tables,
    bench_timing,
)
from tare.report.bench_step import Wanted
from tare.report.tables import render

QUICK = Wanted(
    peers="none", rounds=3, threads=1, device="cpu", patience=0, refresh_rounds=2, refresh_seconds=0.05, copied=4
)


@pytest.fixture(scope="module")
def bench():
    return bench_shapes.build("llama-tiny")


@pytest.fixture(scope="module")
def result():
    methods = "adamw,adamw-8bit,galore:period=3,apollo-mini:period=3"
    return bench_step.bench_step("llama-tiny", replace(QUICK, methods=methods, peers="torch-adamw-foreach"))


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
    assert plain["absent"] == []


def test_every_round_is_kept_and_ratios_are_taken_within_a_round(result):
    assert result["rows"][0]["key"] == bench_rows.BAR
    for found in result["rows"][1:]:
        assert len(found["ms"]) == len(found["bar_ms"]) == 3
        assert found["ratios"] == [own / bar for own, bar in zip(found["ms"], found["bar_ms"], strict=True)]
        assert found["ratio"]["q1"] <= found["ratio"]["median"] <= found["ratio"]["q3"]
        assert found["recompilations"] == found["compiled_graphs"] == 0


def test_state_is_counted_to_the_byte(result, bench):
    steps = 4 * len(list(bench.model.parameters()))
    assert (
        row(result, bench_rows.BAR)["state_bytes"] == 8 * 1_053_824 + steps
    )  # torch keeps a step tensor per parameter
    assert row(result, "adamw")["state_bytes"] == 8 * 1_053_824
    assert row(result, "adamw-8bit")["state_bytes"] < 2.1 * 1_053_824


def test_bytes_products_and_operations_are_what_the_algorithm_says(result, bench):
    """AdamW moves 28 bytes a parameter; GaLore's basis is only read; 4 r flop a weight."""
    assert row(result, "adamw")["moved_bytes"] == 28 * 1_053_824
    assert row(result, "adamw")["flops"] == 0
    galore = row(result, "galore:period=3")
    matrices = [p for p in bench.model.parameters() if p.ndim == 2 and 1024 not in p.shape]
    rank = galore["rank"]
    assert galore["flops"] == sum(4 * rank * p.numel() for p in matrices)
    basis = 4 * rank * sum(min(p.shape) for p in matrices)
    assert galore["moved_bytes"] == 12 * 1_053_824 + 2 * galore["state_bytes"] - basis
    assert row(result, "adamw")["launches"] < 20 < galore["launches"]
    for found in result["rows"]:
        assert found["over_bound"] == found["ms_median"] / max(found["bytes_ms"], found["gemm_ms"])


def test_state_bytes_agree_with_the_optimizers_own_account(bench):
    for spec in bench_rows.ours(bench, bench_specs.everything()):
        optimizer = spec.build(bench)
        assert bench_rows.state_bytes(optimizer) == optimizer.state_bytes().total, spec.key


def test_every_registered_method_has_a_row(bench):
    keys = {spec.key for spec in bench_rows.ours(bench, None)}
    assert {key for key in registry.keys("gradient") if key != "compose"} <= keys
    assert bench_rows.PLAIN in keys


def test_temporaries_stay_under_one_largest_matrix(result):
    """Issue 2: at most one largest matrix a method. Here also: a matrix of the layers, not the embedding."""
    for found in (found for found in result["rows"] if found["kind"] == "tare"):
        assert found["temporary_bytes"] <= result["shapes"]["largest_matrix_bytes"], found["key"]
    assert row(result, "adamw")["temporary_bytes"] < 4096
    assert row(result, "galore:period=3")["temporary_bytes"] <= result["shapes"]["largest_linear_bytes"]


def test_refreshes_and_a_staggered_period_are_timed_apart(result):
    keys = {"galore:period=3", "apollo-mini:period=3"}
    assert {found["key"] for found in result["refreshes"]} == keys
    assert all(found["refreshed"] for found in result["refreshes"])
    assert all(1 <= len(found["refresh_ms"]) <= 2 for found in result["refreshes"])
    assert {found["key"] for found in result["staggered"]} == keys
    assert all(len(found["steps_ms"]) == 3 for found in result["staggered"])


def test_a_jump_brings_a_refresh_about(bench):
    spec = bench_rows.refreshing(bench, bench_specs.parse("apollo-mini:period=200"))[0][0]
    contender = bench_rows.Contender(spec, spec.build(bench))
    bench_timing.warm_up(contender)
    before = contender.refreshed()
    contender.jump(200)
    contender.step()
    assert contender.refreshed() > before


def test_memory_splits_the_contenders_into_groups():
    found = bench_step.bench_step("llama-tiny", replace(QUICK, methods="adamw,lion,adan", memory=1, refresh=False))
    assert [each["group"] for each in found["rows"]] == [0, 1, 2, 3]


def test_one_layer_and_16_bit_weights():
    bench = bench_shapes.build("llama-tiny-layer", dtype="bf16")
    names = [name for name, _ in bench.model.named_parameters()]
    assert len(names) == 9
    assert all(name.startswith("layers.0.") for name in names)
    assert bench.about()["largest_linear_bytes"] == 2 * 128 * 344
    optimizer = bench_rows.ours(bench, bench_specs.parse("adamw"))[0].build(bench)
    assert optimizer.storage.weight == "stochastic"  # as `tare train` would have it


def test_tables_are_made_from_the_file(result, tmp_path):
    (tmp_path / "step-llama-60m.json").write_text(json.dumps(result))
    for view in ("", "/full", "/refreshes", "/staggered"):
        assert "apollo" in render(f"step-llama-60m{view}", tmp_path)
    assert "copy of 256 MiB" in render("step-llama-60m/notes", tmp_path)
    assert "torch AdamW foreach" in render("step-llama-60m/duels", tmp_path)
    assert "| galore:period=3 r=32 |" in render("step-llama-60m", tmp_path)
    assert "torch AdamW fused (the bar)" in bench_tables.text(result)
    assert "x fused AdamW" in render("step-llama-60m/all", tmp_path)
    (tmp_path / "old.json").write_text(json.dumps(result | {"format": 1}))
    assert "bytes/param" not in render("old/all", tmp_path)


def test_disturbed_samples_are_repeated_until_patience_ends(monkeypatch):
    monkeypatch.setattr(bench_timing.Witness, "disturbance", lambda self: 1.0)
    monkeypatch.setattr(bench_timing.time, "sleep", lambda seconds: None)
    patience = bench_timing.Patience(1.0)
    calls = []
    assert len(patience.sample(lambda: calls.append(0))) == 1
    assert patience.repeated == len(calls) - 1 >= 3
    assert patience.kept == 1


def test_peers_are_optional(monkeypatch, bench):
    monkeypatch.setattr(bench_peers, "installed", lambda package: None if package else "1")
    wanted, absent = bench_step.choose(replace(QUICK, methods="adamw", peers="galore-torch,torch-muon"), bench)
    assert [spec.key for spec in wanted] == ["adamw", "torch-muon"]
    assert absent == [{"key": "galore-torch", "package": "galore-torch", "reason": "not installed"}]
    assert bench_step.choose(replace(QUICK, methods="none"), bench) == ([], [])
    monkeypatch.setattr(bench_peers, "installed", lambda package: "1")
    _, absent = bench_step.choose(replace(QUICK, methods="none", peers="all"), bench)
    assert {each["key"]: each["reason"] for each in absent}["heavyball-adamw"].startswith("compiles for minutes")


def test_a_row_that_fails_does_not_cost_the_others(monkeypatch, bench):
    def broken(bench):
        raise ValueError("no such thing\nmore")

    monkeypatch.setattr(bench_peers, "PEERS", (bench_rows.Spec("broken", "broken", "peer", broken),))
    found = bench_step.bench_step("llama-tiny", replace(QUICK, methods="adamw", peers="broken", refresh=False))
    assert [each["key"] for each in found["rows"]] == [bench_rows.BAR, "adamw"]
    assert found["absent"] == [{"key": "broken", "package": "", "reason": "ValueError: no such thing"}]


def test_a_row_that_is_too_slow_is_named_with_its_time():
    found = bench_step.bench_step("llama-tiny", replace(QUICK, methods="adamw", slowest=0.0, refresh=False))
    assert [each["key"] for each in found["absent"]] == ["adamw"]
    assert "the first step takes" in found["absent"][0]["reason"]


def test_gradients_are_given_back_where_an_optimizer_changes_them():
    bench = bench_shapes.build("llama-tiny-layer")
    untouched = bench_shapes.sums(bench)
    rude = bench_rows.Contender(bench_rows.BAR_SPEC, bench_rows.BAR_SPEC.build(bench))
    first, second, *_ = bench.model.parameters()
    first.grad.mul_(2)
    second.requires_grad_(False)
    bench_step._keep_gradients(rude, bench, untouched, 0)
    assert rude.notes == ["changes the gradients"]
    assert bench_shapes.sums(bench) == untouched


def test_operations_of_our_own_kernels_are_counted(bench):
    if not bench_probe.library.load():
        pytest.skip("no C++ compiler here")
    spec = bench_rows.ours(bench, bench_specs.parse("adamw-8bit"))[0]
    counted = bench_probe.probe(bench_rows.Contender(spec, spec.build(bench)), bench.device)
    assert counted["own_kernels"] > 0
    assert counted["launches"] >= counted["own_kernels"]


def test_bad_input_is_one_line():
    for shapes, wanted, message in (
        ("lama-60m", QUICK, r"--shapes: unknown model 'lama-60m'.*llama-60m"),
        ("llama-tiny", replace(QUICK, methods="galor"), r"--methods: unknown method 'galor'.*galore"),
        ("llama-tiny", replace(QUICK, methods="none", peers="galor"), r"--peers: unknown row 'galor'.*galore-torch"),
        ("llama-tiny", replace(QUICK, dtype="fp8"), "--dtype: expected fp32 or bf16"),
        ("llama-tiny", replace(QUICK, device="tpu"), "--device: expected auto, cpu or cuda"),
    ):
        with pytest.raises(InputError, match=message):
            bench_step.bench_step(shapes, wanted)
    with pytest.raises(InputError, match="--rounds: expected a whole number >= 2"):
        Wanted(rounds=1)


def test_the_command_writes_json_without_paths_of_this_machine(tmp_path, capsys):
    out = tmp_path / "folder" / "step.json"
    arguments = ["--shapes", "llama-tiny", "--methods", "adamw", "--rounds", "2", "--threads", "1", "--patience", "0"]
    arguments += ["--no-refresh", "--no-peers"]
    assert bench_step.run([*arguments, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text())
    assert printed == written
    assert str(tmp_path) not in out.read_text()
    assert str(Path.home()) not in out.read_text()
    assert torch.get_num_threads() >= 1
