"""Checkpoints of fine-tunes hold what is trained and name the base: small, exact to resume, and refused on another base."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_models import bert, job, llama, table

from tare.cli.main import main
from tare.core.errors import CheckpointError
from tare.train import checkpoint, loop, progress, session
from tare.train.adapters import AdapterConfig
from tare.train.base import NONE
from tare.train.config import RunConfig
from tare.train.convert import convert
from tare.train.doctor import examine

pytest.importorskip("peft")


def steps(
    tmp_path: Path, base: str, name: str, method: str = "adamw", match: str | None = None, **more: Any
) -> RunConfig:
    rows = table(tmp_path / "t.jsonl", 30)
    made = job(tmp_path / name, base, rows, method, steps=4, **more)
    made = replace(made, run=replace(made.run, checkpoint_every=2))
    if match is not None:
        return replace(made, train=replace(made.train, match=match))
    return replace(made, adapter=AdapterConfig("lora", dropout=0.2))


def cut_off(config: RunConfig, at: int = 3) -> None:
    """A run that breaks off behind a step."""

    def fail(event: Any) -> None:
        if isinstance(event, progress.StepDone) and event.step == at:
            raise OSError("the power is out")

    with pytest.raises(OSError, match="power"):
        loop.train(config, on_event=fail)


def same(a: Path, b: Path, file: str) -> bool:
    one, other = load_file(a / "model" / file), load_file(b / "model" / file)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("method", "match", "file"),
    [("adamw", None, "adapter_model.safetensors"), ("mezo", None, "adapter_model.safetensors"), ("adamw", "norm", "model.safetensors")],
)  # fmt: skip
def test_a_run_goes_on_from_what_was_trained_alone(method: str, match: str | None, file: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "m", weights=True)
    loop.train(steps(tmp_path, base, "whole", method, match))
    cut_off(steps(tmp_path, base, "cut", method, match))
    held = load_file(tmp_path / "cut" / "checkpoints" / "step-2" / "weights.safetensors")
    assert held
    assert all("lora_" in name for name in held) if match is None else all("norm" in name for name in held)
    manifest = json.loads((tmp_path / "cut" / "checkpoints" / "step-2" / "manifest.json").read_text())
    assert manifest["base"]["model"] == base
    assert manifest["base"]["bytes"] > 4 * sum(t.numel() * t.element_size() for t in held.values())
    loop.train(steps(tmp_path, base, "cut", method, match, resume=True))
    assert same(tmp_path / "cut", tmp_path / "whole", file)


def test_another_base_is_refused_and_doctor_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = llama(tmp_path / "m", weights=True)
    cut_off(steps(tmp_path, base, "cut"))
    notes = [finding for finding in examine(tmp_path / "cut").findings if finding.what == "base"]
    assert [(finding.level, base in finding.text) for finding in notes] == [("note", True)]
    file = Path(base) / "model.safetensors"
    good = file.read_bytes()
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"step-2: holds only what was trained, on the weights of '.*m', and the model has other"
    ) as told:
        loop.train(steps(tmp_path, base, "cut", resume=True))
    assert "\n" not in str(told.value)
    assert str(told.value).count("step-2") == 1
    file.write_bytes(good)
    loop.train(steps(tmp_path, base, "cut", resume=True))
    Path(base).rename(tmp_path / "elsewhere")
    assert main(["doctor", str(tmp_path / "cut")]) == 1
    assert "which is not there: put it back" in capsys.readouterr().out


def test_what_an_older_tare_saved_whole_is_still_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama(tmp_path / "m", weights=True)
    loop.train(steps(tmp_path, base, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(session, "base_of", lambda model, name: NONE)
        cut_off(steps(tmp_path, base, "cut"))
    assert any(
        "embed" in name for name in load_file(tmp_path / "cut" / "checkpoints" / "step-2" / "weights.safetensors")
    )
    loop.train(steps(tmp_path, base, "cut", resume=True))
    assert same(tmp_path / "cut", tmp_path / "whole", "adapter_model.safetensors")


def test_what_was_drawn_is_kept(tmp_path: Path) -> None:
    """A classifier's head that the files lack, frozen; and a base without weights at all."""
    base = bert(tmp_path / "b", "BertModel")
    cut_off(steps(tmp_path, base, "head", match="query"))
    held = load_file(tmp_path / "head" / "checkpoints" / "step-2" / "weights.safetensors")
    assert {name for name in held if "query" not in name} == {"classifier.weight", "classifier.bias"}
    fresh = llama(tmp_path / "fresh")
    text = tmp_path / "t.txt"
    text.write_text("the film is fine and the plot is dull. " * 400)
    made = job(tmp_path / "r", fresh, str(text), "adamw", task="lm", steps=4)
    made = replace(made, run=replace(made.run, checkpoint_every=2), adapter=AdapterConfig("lora"))
    cut_off(made)
    assert "base" not in json.loads((tmp_path / "r" / "checkpoints" / "step-2" / "manifest.json").read_text())


def test_other_forms_stand_on_the_same_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "m", weights=True)
    loop.train(steps(tmp_path, base, "run"))
    source = tmp_path / "run" / "checkpoints" / "step-4"
    pieces = convert(source, "sharded", tmp_path / "pieces").out
    back = convert(pieces, "single", tmp_path / "back").out
    assert (back / "weights.safetensors").read_bytes() == (source / "weights.safetensors").read_bytes()
    assert checkpoint.load(back, 4).content.manifest["base"] == checkpoint.load(source, 4).content.manifest["base"]
    convert(back, "model", tmp_path / "again")
    one, other = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "again", tmp_path / "run" / "model"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
