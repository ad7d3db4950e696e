"""The commands as a user meets them: help, methods, plan, train, eval, compare; JSON on stdout and nothing else there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tare.cli.main import main
from tare.methods import registry
from tare.train.configfile import load

HEAVY = {"torch", "transformers", "numpy", "rich", "datasets"}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argv", [["--help"], [], ["--version"], ["train", "--help"], ["plan", "--help"], ["nope"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = f"import sys; from tare.cli.main import main; main({argv}); print(sorted({HEAVY} & set(sys.modules)))"
    done = run_python(code)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_help_names_every_command(tare: Any) -> None:
    shown = tare("--help")
    assert (shown.code, shown.err) == (0, "")
    assert tare() == shown
    for name in ("train", "compare", "plan", "eval", "methods"):
        assert f"\n  {name} " in shown.out
        assert tare(name, "--help").code == 0


def test_help_of_train_names_every_flag_and_default(tare: Any) -> None:
    from tare.cli.flags import FLAGS

    shown = tare("train", "--help").out
    assert all(name in shown for name in FLAGS)
    assert "optimizer steps [400]" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_version(tare: Any) -> None:
    from tare import __version__

    assert tare("--version").out == f"tare {__version__}\n"


def test_methods_table_and_json(tare: Any, tiny: Path) -> None:
    shown = tare("methods", "--model", tiny)
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 100
    document = json.loads(tare("methods", "--model", tiny, "--json").out)
    assert {method["key"] for method in document["methods"]} == set(registry.keys())
    assert all(key in shown.out for key in registry.keys())  # noqa: SIM118
    adamw = next(method for method in document["methods"] if method["key"] == "adamw")
    assert adamw["state"]["bytes"] == 2 * adamw["state"]["weights_bytes"]


def test_one_method_in_full(tare: Any) -> None:
    card = registry.card("apollo-mini")
    shown = tare("methods", "apollo-mini", "--model", "llama-tiny").out
    words = " ".join(shown.split())
    assert card.arxiv in shown
    assert card.idea in words
    assert all(" ".join(line.split()) in words for line in (*card.limits, *card.differences))
    document = json.loads(tare("methods", "apollo-mini", "--model", "llama-tiny", "--json").out)
    assert document["defaults"]["rank"] == {"type": "int", "default": "1"}
    assert document["state"]["model"] == "llama-tiny"


def test_plan_has_a_line_per_method(tare: Any, tiny: Path) -> None:
    argv = ("plan", tiny, "--batch", 2, "--seq", 32, "--methods", "adamw,galore", "--rank", 4, "--budget", "1GiB")
    shown = tare(*argv)
    assert (shown.code, shown.err) == (0, "")
    assert all(word in shown.out for word in ("weights", "gradients", "state", "activations", "temporaries", "peak"))
    assert max(map(len, shown.out.splitlines())) <= 100
    rows = json.loads(tare(*argv, "--json").out)["rows"]
    assert {row["method"] for row in rows} == {"adamw", "galore"}
    for row in rows:
        parts = ("weights", "gradients", "state", "activations", "temporaries")
        assert sum(row[part] for part in parts) == row["peak"]


def test_plan_is_of_what_train_would_do(tare: Any, tiny: Path, job: list[str], tmp_path: Path) -> None:
    flags = ("--model", tiny, "--seq", 32, "--batch", 2, "--method", "lion")
    plan = json.loads(tare("plan", *flags, "--json").out)["rows"][0]
    done = json.loads(tare("train", *job, *flags[2:4], *flags[6:], "--steps", 2, "--out", tmp_path / "a", "--json").out)
    assert done["predicted_peak"] == plan["peak"]
    assert done["state_bytes"] == plan["state"]


def test_train_eval_and_the_folder(tare: Any, job: list[str], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ("train", *job, "--seq", 32, "--method", "apollo-mini", "--steps", 4, "--budget", "1GiB", "--out", out)
    shown = tare(*argv)
    assert shown.code == 0, shown.err
    assert "% of the budget 1.00 GiB" in shown.err
    assert "predicted" in shown.out
    assert str(out / "model") in shown.out
    assert {"config.yaml", "metrics.jsonl", "model", "report.html"} <= {path.name for path in out.iterdir()}
    assert load(out / "config.yaml").method.key == "apollo-mini"

    held = json.loads(tare("eval", out, "--json").out)
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in reversed(last) if line["event"] == "eval")
    limited = json.loads(tare("eval", out, "--tokens", 300, "--json").out)
    assert limited["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert limited["tokens"] == logged["tokens"] < held["tokens"]

    file = text / "3.txt"
    whole = json.loads(tare("eval", out / "model", "--data", file, "--seq", 32, "--json").out)
    again = json.loads(tare("eval", out, "--data", file, "--batch", 7, "--json").out)
    assert whole["loss"] == pytest.approx(again["loss"], rel=1e-5)
    assert whole["tokens"] == again["tokens"]
    assert tare("eval", out).out.startswith(str(out / "model"))


def test_release_turns_clipping_off(tare: Any, job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = tare("train", *job, "--seq", 32, "--method", "adamw", "--steps", 2, "--release", "--out", out, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["config"]["train"]["clip"] is None


def test_resume_needs_only_the_folder(tare: Any, job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--seq", 32, "--method", "lion", "--steps", 4, "--out", out)
    first = tare("train", *job, *flags, "--json")
    again = tare("train", "--resume", "--out", out, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["loss"] == json.loads(first.out)["loss"]
    refused = tare("train", "--resume", "--out", out, "--seq", 16)
    assert refused.code == 2
    assert "data.seq" in refused.err


def test_compare_and_resume(tare: Any, job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "both"
    argv = ("compare", *job, "--seq", 32, "--steps", 4, "--rank", 4, "--out", out)
    done = tare(*argv, "--methods", "adamw,galore,apollo-mini", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["adamw", "galore", "apollo-mini"]
    assert rows["galore"]["settings"]["rank"] == 4
    assert rows["apollo-mini"]["settings"].get("rank", 1) == 1
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert (out / "galore" / "model" / "config.json").is_file()
    page = (out / "report.html").read_text()
    assert all(f">{method}</td>" in page for method in rows)

    stamp = (out / "adamw" / "metrics.jsonl").stat().st_mtime_ns
    again = tare("compare", "--resume", "--out", out, "--methods", "adamw,galore,lion")
    assert again.code == 0, again.err
    assert "adamw: finished before" in again.err
    assert (out / "adamw" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert (out / "lion" / "model").is_dir()
    assert max(map(len, again.out.split("report:")[0].splitlines())) <= 100


def test_a_method_that_does_not_fit_is_a_row(tare: Any, job: list[str], tmp_path: Path) -> None:
    plan = json.loads(tare("plan", *job[:2], "--batch", 2, "--seq", 32, "--methods", "adamw,lion", "--json").out)
    peaks = {row["method"]: row["peak"] for row in plan["rows"]}
    budget = f"{(peaks['adamw'] + peaks['lion']) / 2 / 1024:.3f}KiB"
    argv = ("compare", *job, "--seq", 32, "--steps", 2, "--methods", "adamw,lion", "--budget", budget)
    done = tare(*argv, "--out", tmp_path / "some", "--json")
    assert done.code == 0, done.err
    assert [row["status"] for row in json.loads(done.out)["rows"]] == ["refused", "done"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_saves_and_ends_with_130(job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tare.cli.main", "train", *job, "--seq", "32", "--method", "adamw"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--steps", "100000", "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (out / "checkpoints").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert shown == ""
    assert errors.splitlines()[-1].startswith("tare: interrupted at step ")
    assert "tare train --resume --out" in errors


@pytest.mark.parametrize("left", [None, "run.lock"])
def test_resuming_what_never_began_trains_nothing_else(
    left: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The defaults would be another training than the one that was killed."""
    out = tmp_path / "run"
    out.mkdir()
    if left is not None:
        (out / left).write_text("999999\n")
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "there is no run in" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} <= {"run.lock"}
