"""Wrong input: one line on stderr that names what is wrong and what is allowed, the exit code, nothing written.

One table; most rows run inside this process, the ones marked `process` (one per exit code) in their own.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tare.methods import registry

T = "train --model {tiny} --data {text} --steps 2 --batch 2 --seq 32 --out {out}"
DATA = "train --model {tiny} --steps 2 --batch 2 --seq 32 --out {out} --data"
MODEL = "train --data {text} --steps 2 --batch 2 --seq 32 --out {out} --model"
FREE = "train --model {tiny} --data {text} --steps 2 --out {out}"
PLACE = "train --model {tiny} --data {text} --steps 2 --batch 2 --seq 32 --out"
EVERY = ", ".join(registry.keys())

TABLE: list[tuple[str, int, str]] = [
    # command
    ("trian", 2, r"trian: unknown command \(did you mean 'train'\?\); commands: train, compare, plan, eval"),
    ("--versoin", 2, r"--versoin: unknown option"),
    (T + " --stpes 3", 2, r"--stpes: unknown option \(did you mean '--steps'\?\)"),
    (T + " --method", 2, r"--method: expected a value"),
    (T + " surplus", 2, r"'surplus': unexpected argument"),
    (T + " --json=1", 2, r"--json: takes no value"),
    (T + " --train.stps 3", 2, r"--train\.stps: unknown setting \(did you mean 'steps'\?\); allowed: steps, batch"),
    (T + " --train.clip", 2, r"--train\.clip: expected a value"),
    # configuration
    (T + " --config {f}/absent.yaml", 2, r"absent\.yaml: no such file"),
    (T + " --config {f}", 2, r"is a folder; --config expects a YAML file"),
    (T + " --config {f}/empty.txt", 2, r"empty\.txt: empty; expected sections model, data"),
    (T + " --config {f}/latin.txt", 2, r"latin\.txt: not UTF-8 text \(byte \d+\)"),
    (T + " --config {f}/syntax.yaml", 2, r"syntax\.yaml, line 3: not valid YAML"),
    (T + " --config {f}/twice.yaml", 2, r"twice\.yaml, line 3: 'seed' is given twice"),
    (T + " --config {f}/unknown.yaml", 2, r"line 2: run\.budgte: unknown setting \(did you mean 'budget'\?\)"),
    (T + " --config {f}/type.yaml", 2, r"type\.yaml, line 2: method\.lr: expected a number > 0, or none, got '1e-3'"),
    (T + " --lr nan", 2, r"--lr: expected a number > 0, or none, got 'nan'"),
    (T + " --lr -1", 2, r"--lr: expected a number > 0, or none, got -1"),
    (FREE + " --batch 0", 2, r"--batch: expected a whole number >= 1, got 0"),
    (FREE + " --batch 1.5", 2, r"--batch: expected a whole number >= 1, got 1\.5"),
    (T + " --train.steps 6", 2, r"--train\.steps: conflicts with --steps \(6 against 2\)"),
    (T + " --warmup 30", 2, r"--warmup: expected at most train\.steps = 2, got 30"),
    (T + " --schedule linear", 2, r"--schedule: expected one of cosine, constant, got 'linear'"),
    (T + " --precision fp16", 2, r"--precision: expected one of fp32, bf16-autocast, bf16, got 'fp16'"),
    (T + " --run.tensorboard", 2, r"run\.tensorboard: TensorBoard is not installed; pip install"),
    # method
    (T + " --method galor", 2, rf"method: 'galor' is unknown \(did you mean 'galore'\?\); known: {EVERY}"),
    (T + " --method adamw --rank 8", 2, r"method\.rank: adamw has no rank"),
    (T + " --rank 0", 2, r"--rank: expected a whole number >= 1, or none, got 0"),
    (T + " --method galore --method.options.scal 1", 2, r"has no option 'scal' \(did you mean 'scale'\?\)"),
    (T + " --method galore --method.options.period 0", 2, r"period.* 0"),
    (T + " --method galore --method.options.basis dvd", 2, r"basis.*'dvd'.*svd"),
    (T + " --method adamw --method.options.betas [0.9,1.5]", 2, r"beta.*1\.5"),
    (T + " --method adamw --method.options.lr 1", 2, r"method\.options\.lr: conflicts with method\.lr"),
    (T + " --method adamw --method.storage.moment int9", 2, r"'int9' is not one of fp32, bf16, int8"),
    (T + " --method adamw --method.storage.block 0", 2, r"storage\.block: expected a whole number >= 1, got 0"),
    (T + " --method adamw --method.storage.blok 1", 2, r"unknown field 'blok'.*block"),
    (T + " --method galore --method.options.targets nope", 2, r"'nope' matches no parameter"),
    (T + " --method apollo --rank 4 --release --accumulate 2", 2, r"use release=False or one micro-batch"),
    (T + " --method adamw --release --clip 1", 2, r"train\.clip: method\.release"),
    ("compare --methods galore,galor --out {out}", 2, r"--methods: unknown method 'galor'.*methods: adamw"),
    ("compare --methods adamw,adamw --out {out}", 2, r"--methods: 'adamw' is named twice"),
    ("compare --methods , --out {out}", 2, r"--methods: expected a comma-separated list of methods, got ','"),
    ("compare --methods adamw,lion --rank 4 --out {out}", 2, r"method\.rank: none of adamw, lion has a rank"),
    ("compare --methods adamw --method.options.x 1 --out {out}", 2, r"option 'x'"),
    ("methods galor", 2, rf"KEY: unknown method 'galor' \(did you mean 'galore'\?\); methods: {EVERY}"),
    # model
    (
        MODEL + " llama-tin",
        2,
        r"model 'llama-tin' .*did you mean 'llama-tiny'.*named models: llama-tiny, llama-3m, llama-9m",
    ),
    (MODEL + " {f}/empty", 2, r"empty' has no config\.json"),
    (MODEL + " {f}/notjson", 2, r"notjson/config\.json: not a readable JSON file"),
    (MODEL + " {f}/nokind", 2, r"nokind/config\.json: no model_type"),
    (
        MODEL + " {f}/strange",
        2,
        r"strange/config\.json: transformers knows no model_type 'lama' \(did you mean 'llama'",
    ),
    (MODEL + " {f}/torn", 2, r"torn: the weights cannot be read"),
    (MODEL + " {f}/pickled", 2, r"pytorch_model\.bin: pickled weights are never loaded"),
    ("plan", 2, r"MODEL: missing; give a named size such as llama-7b"),
    ("plan {tiny} --method lion --methods lion", 2, r"--methods: conflicts with --method"),
    ("plan llama-tin", 2, r"model 'llama-tin' .*did you mean 'llama-tiny'"),
    ("plan {tiny} --seq 999", 2, r"seq.* 999 .*64 positions"),
    ("methods --model nope", 2, r"model 'nope' .*named models: llama-tiny"),
    (FREE + " --seq 999", 2, r"seq.* 999 .*64 positions"),
    # tokenizer
    (T + " --tokenizer {f}/empty", 2, r"tokenizer: .*empty' has no tokenizer\.json"),
    (T + " --tokenizer {f}/broken.jsonl", 2, r"tokenizer: .*broken\.jsonl' is not a tokenizer\.json"),
    # data
    (DATA + " {f}/absent.txt", 2, r'data: .*absent\.txt\' does not exist; allowed: "stdlib", a text file'),
    (DATA + " {f}/empty.txt", 2, r"data: .*empty\.txt' is empty; allowed"),
    (DATA + " {f}/empty", 2, r"data: the folder .*empty' holds no text"),
    (DATA + " {f}/short.txt", 2, r"data: .*short\.txt"),
    (DATA + " {f}/broken.jsonl", 2, r"broken\.jsonl:2: malformed JSON"),
    (DATA + " {f}/column.jsonl", 2, r"column\.jsonl:1: no column 'text'; present: body"),
    (DATA + " {f}/latin.txt", 2, r"latin\.txt:1: not UTF-8 text"),
    (DATA + " {f}/table.csv", 2, r"table\.csv' is a table; allowed"),
    ("eval", 2, r"RUN_OR_MODEL: missing"),
    ("eval llama-tiny --data {text}", 2, r"llama-tiny: no such folder"),
    ("eval {f}/empty --data {text}", 2, r"neither a run .* nor a transformers model"),
    ("eval {tiny}", 2, r"--data: missing"),
    ("eval {tiny} --data {text} --tokens few", 2, r"--tokens: expected a whole number >= 2, got 'few'"),
    # output and checkpoints
    (PLACE + " {f}/short.txt", 2, r"run\.out: .*short\.txt is a file; give a folder"),
    (PLACE + " {f}", 2, r"run\.out: .* is not empty; resume the run in it \(--resume\), or choose another folder"),
    (PLACE + " {f}/short.txt/x", 2, r"run\.out: .*cannot be written"),
    (T + " --resume", 2, r"run\.resume: there is no run in .*check run\.out"),
    (PLACE + " {f} --resume", 2, r"run\.resume: there is no run in"),
    ("compare --out {f}", 2, r"run\.out: .* is not empty; resume the comparison in it"),
    ("compare --out {out} --resume", 2, r"run\.resume: there is no comparison in"),
    # device and budget
    (T + " --device tpu", 2, r"--device: expected auto, cpu, mps, cuda or cuda:N, got 'tpu'"),
    (T + " --budget 8", 2, r"--budget: '8' has no unit: write a number and a unit, e\.g\. 24GiB"),
    (T + " --budget -1", 2, r"--budget: '-1' is not an amount"),
    (T + " --threads 0", 2, r"--threads: expected a whole number >= 1, or none, got 0"),
    (T + " --method adamw --budget 100KiB", 3, r"100\.0 KiB.*adamw.*needs.*KiB.*(fits|possible)"),
    (T + " --budget 1KiB", 3, r"budget 1\.00 KiB is too small: .* needs .*the least that is possible"),
    (
        "compare --model {tiny} --data {text} --seq 32 --methods adamw,lion --budget 1KiB --out {out}",
        3,
        r"no method fits",
    ),
]
OWN_PROCESS = ["trian", "train.steps 6", "method galor", "absent.txt", "{f} --resume", "budget 1KiB --out"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that are wrong, each in its own way."""
    place = tmp_path_factory.mktemp("wrong")
    texts = {
        "empty.txt": "",
        "short.txt": "hi",
        "syntax.yaml": "train:\n  steps: [1\n",
        "twice.yaml": "run:\n  seed: 1\n  seed: 2\n",
        "unknown.yaml": "run:\n  budgte: 1GiB\n",
        "type.yaml": 'method:\n  lr: "1e-3"\n',
        "broken.jsonl": '{"text": "a"}\n{oops\n',
        "column.jsonl": '{"body": "a"}\n' * 5,
        "table.csv": "text\na\n",
        "notjson/config.json": "{",
        "nokind/config.json": "{}",
        "strange/config.json": '{"model_type": "lama"}',
    }
    for name, content in texts.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content, encoding="utf-8")
    (place / "latin.txt").write_bytes("# é\n".encode("latin-1") * 50)
    (place / "empty").mkdir()
    return place


@pytest.fixture
def fill(files: Path, tiny: Path, text: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Puts real paths into a row of the table."""
    for name, weights in (("torn", "model.safetensors"), ("pickled", "pytorch_model.bin")):
        (files / name).mkdir(exist_ok=True)
        (files / name / "config.json").write_bytes((tiny / "config.json").read_bytes())
        (files / name / weights).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    names = {"f": files, "tiny": tiny, "text": text, "out": tmp_path / "out"}
    return lambda line: [word.format(**names) for word in line.split()]


def snapshot(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(place.rglob("*"))}


def judge(code: int, out: str, err: str, expected: int, pattern: str) -> None:
    assert code == expected, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert len(err) < 700
    assert re.search(pattern, err), err


@pytest.mark.parametrize(("line", "code", "pattern"), TABLE, ids=[line for line, _, _ in TABLE])
def test_one_line_and_nothing_written(
    tare: Any,
    fill: Any,
    files: Path,
    tmp_path: Path,
    line: str,
    code: int,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "tensorboard" in line:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not installed
    argv = fill(line)
    before = snapshot(files)
    outcome = tare(*argv)
    judge(outcome.code, outcome.out, outcome.err, code, pattern)
    assert not (tmp_path / "out").exists()
    assert snapshot(files) == before


@pytest.mark.parametrize("part", OWN_PROCESS)
def test_the_same_from_a_process_of_its_own(fill: Any, tmp_path: Path, part: str) -> None:
    line, code, pattern = next(row for row in TABLE if part in row[0])
    done = subprocess.run(
        [sys.executable, "-m", "tare.cli.main", *fill(line)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    judge(done.returncode, done.stdout, done.stderr, code, pattern)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tare: Any) -> None:
    outcome = tare("methods", "nope", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("tare: KEY: unknown method 'nope'")


def test_a_fault_is_one_line_with_a_hint(tare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("tare.cli.methods.run", broken)
    outcome = tare("methods")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "tare: fault: ZeroDivisionError: first; run again with --debug for the traceback\n"


def test_plan_that_does_not_fit_says_what_would(tare: Any, tiny: Path) -> None:
    outcome = tare(
        "plan", tiny, "--batch", "2", "--seq", "32", "--methods", "adamw,lion", "--budget", "300KiB", "--json"
    )
    document = json.loads(outcome.out)
    assert outcome.code == 3
    assert not any(row["fits"] for row in document["rows"])
    assert document["advice"]["text"]
