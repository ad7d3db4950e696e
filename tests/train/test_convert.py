"""Conversions: no bit changes on the way to pieces and back, and a run goes on from any form."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import config

import tare
from tare.cli.main import main
from tare.core.errors import CheckpointError, InputError
from tare.train import checkpoint, integrity, sharded
from tare.train.convert import convert
from tare.train.loop import train


def build() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 11), nn.Linear(11, 1)).to(torch.bfloat16)
    return model, tare.GaLore(model, lr=0.1, rank=2, storage=tare.Storage(moment="int8", min_quantized=1, block=4))


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(3, 6, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer = build()
    step(model, optimizer)
    trainer = {"counters": {"step": 1}, "config": {"run": {"seed": 3}}, "odd": (float("inf"), None)}
    return checkpoint.save(
        tmp_path / "c",
        1,
        weights=checkpoint.weights_of(model),
        optimizer=optimizer.state_dict(),
        trainer=trainer,
        facts={"tare": "x"},
    )


def files(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_to_pieces_and_back_is_the_same_to_the_byte(ranks: int, saved: Path, tmp_path: Path) -> None:
    before = files(saved)
    there = convert(saved, "sharded", tmp_path / "pieces", ranks)
    assert there.out == tmp_path / "pieces" / "step-1"
    manifest = integrity.verify(there.out)
    assert (manifest["format"], manifest["ranks"], manifest["tare"]) == (integrity.SHARDED, ranks, "x")
    back = convert(tmp_path / "pieces", "single", tmp_path / "whole")
    assert files(back.out) == before == files(saved)


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_model_goes_on_from_pieces_bit_for_bit(ranks: int, saved: Path, tmp_path: Path) -> None:
    ends = []
    for place in (saved.parent, convert(saved, "sharded", tmp_path / "p", ranks).out.parent):
        model, optimizer = build()
        snapshot = checkpoint.load_latest(place)
        assert snapshot is not None
        sharded.restore(model, optimizer, snapshot)
        step(model, optimizer)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_run_is_converted_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(config(out, steps=4, checkpoint_every=2))
    whole = (out / "model" / "model.safetensors").read_bytes()
    assert main(["convert", str(out), "--to", "model", "--out", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == whole
    assert {path.name for path in (tmp_path / "m").iterdir()} == {path.name for path in (out / "model").iterdir()}
    capsys.readouterr()
    half = out / "checkpoints" / "step-2"
    assert main(["convert", str(half), "--to", "sharded", "--ranks", "3", "--out", str(tmp_path / "p"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    shutil.move(tmp_path / "p", out / "checkpoints")
    train(config(out, steps=4, checkpoint_every=2, resume=True))
    assert (out / "model" / "model.safetensors").read_bytes() == whole


def test_bad_input_is_one_line_and_writes_nothing(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "x")
    for given, told in (
        ([], "SOURCE: missing"),
        ([str(saved)], "--to: missing"),
        ([str(saved), "--to", "single"], "--out: missing"),
        ([str(saved), "--to", "onnx", "--out", out], "--to: expected one of single, sharded, model, got 'onnx'"),
        ([str(saved), "--to", "sharded", "--ranks", "0", "--out", out], "--ranks: expected at least 1"),
        ([str(saved), "--to", "sharded", "--ranks", "two", "--out", out], "--ranks: expected a whole number"),
        ([str(tmp_path / "nowhere"), "--to", "single", "--out", out], "no such folder"),
        ([str(saved), "--to", "single", "--out", str(saved)], "exists and is not empty"),
    ):
        assert main(["convert", *given]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="holds no checkpoint"):
        convert(tmp_path, "single", tmp_path / "x")
    (saved / "optimizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"optimizer\.json: damaged"):
        convert(saved, "single", tmp_path / "x")
