"""Runs on models held in few bits (qzo): planned, resumed, saved dequantised, evaluated and replayed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from task_models import job, llama, table
from train_runs import fingerprint

from tare.core.errors import CheckpointError, InputError
from tare.plan.models import build_model
from tare.train import checkpoint, loop, progress
from tare.train.config import RunConfig
from tare.train.quantize import Quantization
from tare.train.replaying import replay_folder


def quantized(config: RunConfig, text: str | None = "int4:group=6") -> RunConfig:
    return replace(config, model=replace(config.model, quantize=text))


def test_a_run_is_planned_resumed_saved_and_replayed(tmp_path: Path) -> None:
    data, model = table(tmp_path / "t.jsonl"), llama(tmp_path / "m", weights=True)
    options: dict[str, Any] = {"steps": 4, "lr": 1e-3}
    done = loop.train(quantized(job(tmp_path / "whole", model, data, "qzo", **options)))
    assert done.predicted["weights"] == pytest.approx(done.measured["weights"], rel=0.01)
    assert done.predicted["weights"] < 0.85 * sum(
        t.nbytes for t in load_file(Path(model) / "model.safetensors").values()
    )
    assert done.predicted["peak"] >= 0.95 * done.measured["peak"]

    def stop(event: Any) -> None:
        if isinstance(event, progress.StepDone) and event.step == 3:
            raise OSError("the power is out")

    with pytest.raises(OSError, match="power"):
        loop.train(quantized(job(tmp_path / "cut", model, data, "qzo", **options)), on_event=stop)
    loop.train(quantized(job(tmp_path / "cut", model, data, "qzo", resume=True, **options)))
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"model.quantize: the run was started with 'int4:group=6', not 'int8'"):
        loop.train(quantized(job(tmp_path / "cut", model, data, "qzo", resume=True, **options), "int8"))
    log = tmp_path / "whole" / "run.seeds"
    again = replay_folder(log, Path(model), tmp_path / "again", quantize=Quantization.parse("int4:group=6"))
    assert again.exact
    weights, copies = (load_file(place / "model.safetensors") for place in (done.out / "model", again.out))
    assert all(torch.equal(weights[name], copies[name]) for name in weights)
    with pytest.raises(InputError, match=r"the model has no model.layers.0.self_attn.q_proj.scale"):
        replay_folder(log, Path(model), tmp_path / "no")


def test_the_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    """Of the last checkpoint's codes and scales, in the layers' own words; and what is no linear layer is as it was."""
    data, model = table(tmp_path / "t.jsonl"), llama(tmp_path / "m", weights=True)
    done = loop.train(quantized(job(tmp_path / "r", model, data, "qzo", steps=2, lr=1e-5)))
    last = checkpoint.load_latest(done.out / "checkpoints")
    assert last is not None
    kept, base = last.weights, load_file(Path(model) / "model.safetensors")
    plain = build_model(str(done.out / "model"))
    saved = dict(plain.named_parameters())
    name = "model.layers.0.mlp.down_proj"
    scale, zero = (kept[f"{name}.{part}"].repeat_interleave(6, 1) for part in ("scale", "zero"))
    packed = kept[f"{name}.codes"]
    codes = torch.cat([packed & 15, packed >> 4], 1)
    width = saved[f"{name}.weight"].shape[1]
    expected = (codes[:, :width] - zero[:, :width].float()) * scale[:, :width]
    assert torch.equal(saved[f"{name}.weight"], expected)
    assert float((expected - base[f"{name}.weight"]).abs().max()) < 0.2 * float(base[f"{name}.weight"].abs().max())
    assert torch.equal(saved["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not any("scale" in key for key in saved)


@pytest.mark.parametrize(
    ("method", "text", "words"),
    [
        ("qzo", None, r"model.quantize: missing; qzo trains the scales of a quantised model: set it \(--quantize int4"),
        ("mezo", "int4", r"model.quantize: mezo trains weights, not scales; leave it out, or use qzo"),
        ("adamw", "int8", r"model.quantize: adamw trains weights, not scales; leave it out, or use qzo"),
    ],
)
def test_what_does_not_go_together_is_refused(method: str, text: str | None, words: str, tmp_path: Path) -> None:
    config = job(tmp_path / "r", llama(tmp_path / "m"), table(tmp_path / "t.jsonl"), method)
    with pytest.raises(InputError, match=words):
        loop.train(quantized(config, text))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("text", ["int3", "int4:128", "int4:group=0", "int4:group=-1", "int4:group=", "INT4"])
def test_bad_forms_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"^model.quantize: expected int4 or int8, with :group=N .*got " + json.dumps(text)[1:-1].join("''"),
    ):
        quantized(job(tmp_path / "r", "llama-tiny", "stdlib", "qzo"), text)
