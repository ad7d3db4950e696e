"""Checkpoints: what goes in comes out bit for bit, and no damaged byte goes unseen."""

import json
import math
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tare.core.errors import CheckpointError
from tare.train import checkpoint, integrity

STATE: dict[str, Any] = {
    "state": {
        0: {
            "step": 3,
            "exp_avg": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
            "codes": torch.arange(256, dtype=torch.uint8),
            "half": torch.tensor([1.5, -0.0, math.inf], dtype=torch.bfloat16),
            "indices": torch.tensor([2**40, -1]),
            "scalar": torch.tensor(0.1, dtype=torch.float64),
            "mask": torch.tensor([True, False]),
            "empty": torch.zeros(0, 5),
            "strided": torch.arange(6.0).reshape(2, 3).T,
            "norm": math.nan,
        },
        1: {},
    },
    "param_groups": [
        {"lr": 1e-3, "betas": (0.9, 0.999), "limit": -math.inf, "name": "$odd", "foreach": None, "params": [0, 1]}
    ],
}
WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
TRAINER: dict[str, Any] = {
    "counters": {"step": 3, "tokens": 2**53 + 1},
    "random": {"python": (3, (1, 2**32 - 1), None)},
}


def save(folder: Path, step: int = 3, **more: Any) -> Path:
    return checkpoint.save(folder, step, weights=WEIGHTS, optimizer=STATE, trainer=TRAINER, **more)


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.contiguous().numpy(force=True).tobytes() == (b.contiguous().numpy(force=True).tobytes())
            if a.dtype != torch.bfloat16
            else torch.equal(a.view(torch.int16), b.view(torch.int16))
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def test_a_checkpoint_gives_back_every_bit_and_every_type(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints")
    assert path.name == "step-3"
    snapshot = checkpoint.load_latest(tmp_path / "checkpoints")
    assert snapshot is not None
    assert (snapshot.step, snapshot.skipped) == (3, ())
    assert same(snapshot.weights, WEIGHTS)
    assert same(snapshot.optimizer, STATE)
    assert same(snapshot.trainer, TRAINER)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    for file in save(tmp_path / "c").iterdir():
        data = file.read_bytes()
        assert data[:2] not in (b"\x80\x04", b"\x80\x02", b"PK")
        if file.suffix == ".json":
            json.loads(data)


def test_state_that_is_no_plain_value_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state state\.0\.projector: a Linear cannot be checkpointed"):
        checkpoint.flatten({"state": {0: {"projector": nn.Linear(1, 1)}}})
    with pytest.raises(TypeError, match="trainer state holds tensors: rng"):
        checkpoint.save(tmp_path / "c", 1, weights={}, optimizer={}, trainer={"rng": torch.zeros(1)})
    assert not (tmp_path / "c").exists()


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate([5.0, 2.0, None, 4.0, 3.0, None]):
        save(tmp_path / "c", step, keep=2, facts={"eval_loss": loss})
    assert [step for step, _ in checkpoint.found(tmp_path / "c")] == [5, 4, 1]


@pytest.mark.parametrize("keep", [1, 2])
def test_never_fewer_than_two_are_kept(keep: int, tmp_path: Path) -> None:
    for step in (9, 10, 11):
        save(tmp_path / "c", step, keep=keep)
    assert [step for step, _ in checkpoint.found(tmp_path / "c")] == [11, 10]


def test_none_at_all_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "nowhere") is None
    (tmp_path / "step-3.tmp-abcd").mkdir()
    (tmp_path / "step-03").mkdir()
    assert checkpoint.load_latest(tmp_path) is None


def positions(size: int) -> list[int]:
    return sorted({*range(0, size, max(1, size // 40)), size - 1})


@pytest.mark.parametrize(
    "name", [*(checkpoint.WEIGHTS, checkpoint.TENSORS, checkpoint.OPTIMIZER, checkpoint.TRAINER), "manifest.json"]
)
def test_a_flipped_byte_in_any_file_is_found_and_the_older_one_is_used(name: str, tmp_path: Path, tally: Any) -> None:
    save(tmp_path, 3)
    file = save(tmp_path, 6) / name
    good = file.read_bytes()
    for position in positions(len(good)):
        for bit in (0x01, 0x20):  # 0x20 also turns upper into lower case, and a space into NUL
            bad = bytearray(good)
            bad[position] ^= bit
            file.write_bytes(bad)
            snapshot = checkpoint.load_latest(tmp_path)
            assert snapshot is not None
            assert snapshot.step == 3
            assert len(snapshot.skipped) == 1
            assert f"step-6/{name}: damaged" in snapshot.skipped[0]
            assert "\n" not in snapshot.skipped[0]
            tally("changed bytes, found", 1)
    file.write_bytes(good)
    assert checkpoint.load(file.parent, 6).skipped == ()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_found(share: float, tmp_path: Path) -> None:
    path = save(tmp_path, 6)
    for file in path.iterdir():
        good = file.read_bytes()
        file.write_bytes(good[: int(len(good) * share)])
        with pytest.raises(CheckpointError, match=f"{file.name}: damaged.*no intact checkpoint is left"):
            checkpoint.load_latest(tmp_path)
        file.write_bytes(good)


def test_missing_extra_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a", 6)
    (path / "shard-2.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"shard-2\.safetensors: does not belong"):
        integrity.verify(path)
    (path / "shard-2.safetensors").unlink()
    (path / checkpoint.OPTIMIZER).unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.json: missing"):
        integrity.verify(path)
    other = checkpoint.save(tmp_path / "b", 6, weights={"x": torch.zeros(1)}, optimizer=STATE, trainer=TRAINER)
    path = save(tmp_path / "a", 6)
    shutil.copy(other / "manifest.json", path / "manifest.json")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged"):
        integrity.verify(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing, so the checkpoint is not whole"):
        integrity.verify(path)


def test_a_copied_folder_under_another_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 3).rename(tmp_path / "step-8")
    with pytest.raises(CheckpointError, match="step-8: holds step 3"):
        checkpoint.load_latest(tmp_path)


def test_links_and_paths_in_a_manifest_are_not_followed(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    secret = tmp_path / "secret"
    secret.write_bytes((path / checkpoint.OPTIMIZER).read_bytes())
    (path / checkpoint.OPTIMIZER).unlink()
    (path / checkpoint.OPTIMIZER).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"optimizer\.json: missing"):
        integrity.verify(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"].pop(checkpoint.OPTIMIZER)
    manifest.pop("sha256")
    (path / checkpoint.OPTIMIZER).unlink()
    (path / "manifest.json").write_bytes(integrity._manifest(manifest))
    with pytest.raises(CheckpointError, match="secret: missing from the checkpoint"):
        integrity.verify(path)


def test_a_newer_format_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6, facts={"tare": "9.0", "format": integrity.NEWEST + 1})
    with pytest.raises(CheckpointError, match=r"format 3, written by tare 9\.0; this tare reads up to 2; upgrade"):
        checkpoint.load_latest(tmp_path)


def test_no_space_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c", 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"no space for the checkpoint of step 6: it needs .* free some space"):
        save(tmp_path / "c", 6)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-3"]


def test_a_write_that_fails_leaves_no_torn_file_and_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    big = {"w": torch.zeros(1 << 18)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(CheckpointError, match=r"step-6: could not be saved: no space left.*saved before is intact"):
            checkpoint.save(tmp_path / "c", 6, weights=big, optimizer=STATE, trainer=TRAINER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-3"]
    integrity.verify(tmp_path / "c" / "step-3")


def test_a_vanished_run_folder_is_an_error_and_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone/checkpoints: cannot be written"):
        save(tmp_path / "gone" / "checkpoints")
    assert not (tmp_path / "gone").exists()


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7))
        model[1].weight = model[0].weight
        return model

    model = build()
    model[2].running_mean.fill_(0.5)
    with torch.no_grad():
        model[0].weight.mul_(3)
    weights = checkpoint.weights_of(model)
    assert "1.weight" not in weights
    assert "2.running_mean" in weights
    checkpoint.save(tmp_path, 1, weights=weights, optimizer={}, trainer={})
    fresh = build()
    snapshot = checkpoint.load_latest(tmp_path)
    assert snapshot is not None
    checkpoint.restore_weights(fresh, snapshot)
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh[1].weight, model[0].weight)
    assert torch.equal(fresh[2].running_mean, model[2].running_mean)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, weights=checkpoint.weights_of(nn.Linear(3, 2)), optimizer={}, trainer={})
    snapshot = checkpoint.load_latest(tmp_path)
    assert snapshot is not None
    with pytest.raises(
        CheckpointError, match=r"another model: 'weight' is \[2, 3\] float32 there, \[2, 4\] float32 here"
    ):
        checkpoint.restore_weights(nn.Linear(4, 2), snapshot)
    with pytest.raises(CheckpointError, match=r"another model: 'weight' is .* bfloat16 here"):
        checkpoint.restore_weights(nn.Linear(3, 2, dtype=torch.bfloat16), snapshot)
    with pytest.raises(CheckpointError, match="another model: the model lacks 'bias'"):
        checkpoint.restore_weights(nn.Linear(3, 2, bias=False), snapshot)


def test_mutated_manifests_and_json_raise_only_our_error(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    for text in (
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"files": 3}',
        b"\xff\xfe",
        b"[" * 5000,
        b'{"format": "x"}',
        b'{"a": NaN}',
    ):
        (path / "manifest.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            integrity.verify(path)
    (path / "a").write_text("")
    for plain in (
        {"files": None},
        {"files": {}, "format": "x"},
        {"files": {"a": {}}, "format": 1},
        {"files": {"a": 1}},
        {"files": {}, "format": 1, "step": 3},
    ):
        (path / "manifest.json").write_bytes(integrity._manifest(plain))
        with pytest.raises(CheckpointError):
            checkpoint.load(path, 3)


def test_code_planted_in_any_file_never_runs(tmp_path: Path) -> None:
    """Even under a manifest that vouches for it."""
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    for name in (checkpoint.WEIGHTS, checkpoint.TENSORS, checkpoint.OPTIMIZER, checkpoint.TRAINER):
        path = save(tmp_path / "c", 3)
        (path / name).write_bytes(pickle.dumps(Payload()))
        manifest = integrity.read_manifest(path)
        manifest.pop("sha256")
        fact = {"size": (path / name).stat().st_size, "sha256": integrity.sha256_file(path / name)}
        manifest["files"][name] = fact
        (path / "manifest.json").write_bytes(integrity._manifest(manifest))
        integrity.verify(path)
        with pytest.raises(CheckpointError, match=f"{name}: damaged"):
            checkpoint.load_latest(tmp_path / "c")
        assert not marker.exists()
