"""`tare replay`: from a log and a base model to a model folder; refusals in one line, nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tare import MeZO, SeedLog
from tare.plan.models import build_model

STEPS = 6


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(log, base folder, folder of the trained model as the run itself saved it)."""
    place = tmp_path_factory.mktemp("replay")
    model = build_model("llama-tiny", dtype=request.param)
    model.save_pretrained(place / "base")
    for name, text in (("tokenizer.json", "{}"), ("tokenizer_config.json", "{}"), ("chat_template.jinja", "x")):
        (place / "base" / name).write_text(text)
    tokens = torch.arange(24).view(2, 12)
    with SeedLog(place / "run.seeds") as log:
        opt = MeZO(model, lr=1e-4, rule="momentum", on_step=log)
        for _ in range(STEPS):
            opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    model.save_pretrained(place / "trained")
    return place / "run.seeds", place / "base", place / "trained"


def test_the_folder_is_that_of_the_trained_model(tare: Any, run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    log, base, trained = run
    shown = tare("replay", log, "--model", base, "--out", tmp_path / "out")
    assert (shown.code, shown.err) == (0, "")
    assert "bit for bit the trained model" in shown.out
    got, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(trained / "model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    build_model(tmp_path / "out", dtype=next(iter(wanted.values())).dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json(tare: Any, run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    log, base, _ = run
    shown = tare("replay", log, "--model", base, "--out", tmp_path / "out", "--steps", 2, "--json")
    document = json.loads(shown.out)
    assert (shown.code, document["steps"], document["exact"], document["method"]) == (0, 2, None, "mezo")
    assert document["log_bytes"] == log.stat().st_size - 22  # the seal


def test_a_torn_log_is_replayed_with_a_warning(tare: Any, run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    log, base, _ = run
    torn = tmp_path / "torn.seeds"
    torn.write_bytes(log.read_bytes()[:-30])
    shown = tare("replay", torn, "--model", base, "--out", tmp_path / "out", "--json")
    document = json.loads(shown.out)
    assert (shown.code, document["steps"]) == (0, STEPS - 1)
    assert document["torn_bytes"] > 0
    assert "unfinished step" in shown.err


def test_refusals(tare: Any, run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    log, base, trained = run
    damaged = tmp_path / "damaged.seeds"
    data = bytearray(log.read_bytes())
    data[200] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for words, argv in (
        ("LOG: missing", ()),
        ("--model: missing", (log, "--out", out)),
        ("--out: missing", (log, "--model", base)),
        ("no such file", (tmp_path / "nothing", "--model", base, "--out", out)),
        ("not a seed log", (base / "config.json", "--model", base, "--out", out)),
        ("damaged at byte", (damaged, "--model", base, "--out", out)),
        ("began from other weights", (log, "--model", trained, "--out", out)),
        ("no such folder", (log, "--model", tmp_path / "nothing", "--out", out)),
        ("no config.json", (log, "--model", tmp_path / "empty", "--out", out)),
        ("is not empty", (log, "--model", base, "--out", tmp_path / "full")),
        ("is not empty", (log, "--model", base, "--out", base)),
        ("whole number", (log, "--model", base, "--out", out, "--steps", "many")),
        (f"holds {STEPS} steps, 99", (log, "--model", base, "--out", out, "--steps", 99)),
        ("--stepz: unknown option", (log, "--model", base, "--out", out, "--stepz", 1)),
    ):
        shown = tare("replay", *argv)
        assert shown.code == 2, (words, shown)
        assert words in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""
        assert not out.exists()
    assert not list(tmp_path.glob("*.tmp-*"))
