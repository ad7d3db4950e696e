"""Runs whose weights are split in 24 bits or int8: planned to the byte, resumed bit for bit, and saved for any other program."""

import pytest
import torch
from safetensors.torch import load_file
from train_runs import config, fingerprint, finish

import tare
from tare.cli.flags import take_dotted
from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.core.weights import quantize_weights_, weight_bytes
from tare.plan.measure import StepMeter
from tare.plan.models import build_model
from tare.train.loop import train


@pytest.mark.parametrize(
    ("weight", "method", "precision"),
    [("split24", "galore", "bf16"), ("int8", "galore", "bf16"), ("int8", "adamw", "fp32")],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, weight, method, precision):
    changes = {"storage": {"weight": weight}, "precision": precision, "steps": 6}
    if method == "galore":
        changes["rank"] = 8
    result = train(config(tmp_path / "whole", method, **changes))
    assert result.predicted_peak == pytest.approx(result.measured_peak, rel=0.05)
    assert result.predicted["state"] == result.measured["state"]
    assert result.predicted["weights"] == pytest.approx(result.measured["weights"], rel=1e-2)  # buffers apart
    job = config(tmp_path / "cut", method, **changes)
    assert finish(job, fail_at="after_commit@1") == -9
    assert finish(config(tmp_path / "cut", method, **changes, resume=True)) == 0
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    kept = load_file(tmp_path / "whole" / "checkpoints" / "step-6" / "weights.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (f"{name}.codes" in kept) == (weight == "int8")
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert saved[name].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    again = build_model(tmp_path / "whole" / "model", dtype=saved[name].dtype)
    assert type(again.get_parameter(name)) is torch.nn.Parameter
    assert torch.equal(again.get_parameter(name), saved[name])


def test_split_weights_need_bf16(tmp_path):
    with pytest.raises(InputError, match=r"split24.*bf16"):
        train(config(tmp_path / "run", storage={"weight": "split24"}))
    assert not (tmp_path / "run").exists()


def test_the_flag_for_storage_is_short():
    rest, given = take_dotted(["--storage.weight", "int8"])
    assert not rest
    assert [(g.path, g.value) for g in given] == [
        (g.path, g.value) for g in take_dotted(["--method.storage.weight=int8"])[1]
    ]


@pytest.mark.parametrize("key", ["adamw", "galore", "apollo-mini"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("release", [False, True])
def test_the_plan_of_int8_weights_is_what_is_measured(key, dtype, release):
    plan = tare.plan(
        "llama-tiny", batch=4, seq=128, methods=[key], dtype=dtype, precision=dtype, release=release,
        storage={"weight": "int8"},
    )  # fmt: skip
    row = plan.row(key)
    model = build_model("llama-tiny", dtype=dtype).train()
    quantize_weights_(model)
    optimizer = plan.settings.choice(key).build(model)
    tokens = torch.zeros(4, 128, dtype=torch.long)
    peaks = []
    for _ in range(3):
        with StepMeter(model, optimizer, extra=[tokens]) as meter:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(meter.peak)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert row.weights == weight_bytes(model) + buffers
    assert row.peak == pytest.approx(max(peaks[1:]), rel=0.05)


def test_int8_weights_of_seven_billion_take_a_little_over_a_byte():
    row = tare.plan(
        "llama-7b", batch=1, seq=256, methods=["galore"], dtype="bf16", precision="bf16", storage={"weight": "int8"}
    ).row("galore")
    linear, rest = 6_476_005_376, 2 * 32_000 * 4096 + 65 * 4096
    assert row.weights == pytest.approx(linear * (1 + 4 / 256) + 2 * rest, rel=1e-3)


def test_a_checkpoint_of_another_form_is_refused(tmp_path):
    from tare.core.errors import CheckpointError

    job = config(tmp_path / "run", "adamw", precision="bf16", storage={"weight": "split24"}, steps=3)
    train(job)
    other = {"precision": "bf16", "storage": {"weight": "int8"}, "steps": 4, "resume": True}
    with pytest.raises(CheckpointError, match=r"method\.storage"):
        train(config(tmp_path / "run", "adamw", **other))


def test_meta_and_fake_weights_have_the_same_account():
    with torch.device("meta"):
        layer = torch.nn.Linear(512, 100, bias=False)
    quantize_weights_(layer)
    assert isinstance(layer.weight, Int8Weight)
    assert weight_bytes(layer) == 512 * 100 + 4 * 200
