"""S1-S7, S10: files that come from elsewhere. Nothing in them runs, nothing in them is believed about sizes, and no name leads out."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_runs import config, corpus, model

from tare.cli.main import main
from tare.core.errors import CheckpointError, DoesNotFit, InputError
from tare.plan.models import build_model
from tare.train import checkpoint, integrity, machine
from tare.train.loop import train
from tare.train.tokenizer import load_tokenizer

CODES = {0, 2, 3}  # done, wrong input, does not fit; never a fault of ours


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped before its end, and the model of another that went through."""
    out = tmp_path_factory.mktemp("done") / "run"
    train(config(out, steps=4, checkpoint_every=2))
    return out


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Callable[[], bytes]]:
    """Makes the bytes of a pickle that would leave a trace if anyone loaded it; fails the test if someone did."""
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    def make() -> bytes:
        return pickle.dumps(Payload())

    assert pickle.loads(make()) is None and marker.exists()  # noqa: PT018  (the canary sings)
    marker.unlink()
    yield make
    assert not marker.exists(), "a payload ran"


def call(*argv: object) -> tuple[int, str]:
    """What `tare` says to a command: its code, and stderr."""
    out, err = io.StringIO(), io.StringIO()
    environment = dict(os.environ)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in argv])
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return code, err.getvalue()


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_pickle_in_the_place_of_any_file_of_a_run_never_runs(
    done: Path, canary: Any, tmp_path: Path, tally: Any
) -> None:
    names = files_of(done)
    assert {"config.yaml", "metrics.jsonl", "model/model.safetensors", "checkpoints/step-4/manifest.json"} <= set(names)
    for number, name in enumerate(names):
        out = tmp_path / str(number)
        shutil.copytree(done, out)
        (out / name).write_bytes(canary())
        code, said = call("train", "--resume", "--out", out, "--steps", 4)
        assert code in CODES, f"{name}: {said}"
        if code:
            assert said.count("\n") == 1, said
            assert Path(name).name in said, said
        shutil.rmtree(out)
        tally("payloads, none run", 1)


def test_a_pickle_in_the_place_of_any_file_of_a_model_never_runs(
    done: Path, canary: Any, tmp_path: Path, tally: Any
) -> None:
    for number, name in enumerate(files_of(done / "model")):
        folder = tmp_path / str(number)
        shutil.copytree(done / "model", folder)
        (folder / name).write_bytes(canary())
        code, said = call("eval", folder, "--data", corpus(), "--seq", 32, "--tokens", 200)
        assert code in CODES, f"{name}: {said}"
        assert (code == 0) == (name in ("generation_config.json",)), f"{name}: {said}"
        assert "fault:" not in said
        shutil.rmtree(folder)
        tally("payloads, none run", 1)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.safetensors"])
def test_pickled_weights_are_refused_by_name_and_a_renamed_one_too(
    done: Path, canary: Any, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done / "model", folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(canary())
    with pytest.raises(InputError, match=name.replace(".safetensors", ".*")):
        build_model(folder)


def test_code_that_comes_with_a_model_is_never_imported(done: Path, tmp_path: Path) -> None:
    """`auto_map` with a file beside it, as trust_remote_code would run it; in the model's config and the tokenizer's."""
    marker = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for where, key in (
        ("config.json", "AutoModelForCausalLM"),
        ("config.json", "AutoConfig"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ):
        folder = tmp_path / f"{where}-{key}"
        shutil.copytree(done / "model", folder)
        (folder / "modeling_x.py").write_text(code)
        content = json.loads((folder / where).read_text())
        content["auto_map"] = {key: [None, "modeling_x.X"] if key == "AutoTokenizer" else "modeling_x.X"}
        (folder / where).write_text(json.dumps(content))
        assert call("eval", folder, "--data", corpus(), "--seq", 32, "--tokens", 200)[0] in CODES
        content["model_type"] = "unknown-kind"
        content["tokenizer_class"] = "X"
        (folder / where).write_text(json.dumps(content))
        code_, said = call("eval", folder, "--data", corpus(), "--seq", 32, "--tokens", 200)
        assert code_ in CODES
        if where == "config.json":
            assert "its own code, which tare never runs" in said
    assert not marker.exists()


def test_a_chat_template_is_copied_and_never_rendered(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done / "model", folder)
    marker = tmp_path / "ran"
    text = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    (folder / "chat_template.jinja").write_text(text)
    out = tmp_path / "out"
    job = config(out, steps=1, name=str(folder), tokenizer=str(folder))
    train(job)
    assert not marker.exists()


NAMES = [
    "../outside.safetensors",
    "/etc/passwd.safetensors",
    "a/b.safetensors",
    "C:\\x.safetensors",
    "x\0.safetensors",
    "..",
    "",
    7,
    None,
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_in_an_index_stay_inside(name: Any, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done / "model", folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json"):
        build_model(folder)


def header(tensors: dict[str, Any], body: bytes = b"", size: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def fact(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES = {
    "a shape of terabytes": header({"weight": fact([1 << 40], 0, 4)}, b"\0" * 4),
    "a product that overflows": header({"weight": fact([1 << 33, 1 << 33], 0, 4)}, b"\0" * 4),
    "offsets beyond the file": header({"weight": fact([1 << 30], 0, 1 << 32)}, b"\0" * 4),
    "offsets backwards": header({"weight": fact([1], 4, 0)}, b"\0" * 4),
    "two tensors in one place": header({"weight": fact([2], 0, 8), "bias": fact([2], 0, 8)}, b"\0" * 8),
    "a hole": header({"weight": fact([1], 0, 4), "bias": fact([1], 8, 12)}, b"\0" * 12),
    "bytes of nobody": header({"weight": fact([1], 0, 4)}, b"\0" * 400),
    "a header of exabytes": header({}, size=1 << 62),
    "a header longer than the file": header({}, size=1 << 20),
    "an unknown type": header({"weight": fact([1], 0, 4, "F99")}, b"\0" * 4),
    "a negative side": header({"weight": fact([-1], 0, 4)}, b"\0" * 4),
    "no header": struct.pack("<Q", 0),
    "names twice": struct.pack("<Q", 2) + b"[]",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(lie: str, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done / "model", folder)
    (folder / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(InputError, match="the weights cannot be read"):
        build_model(folder)
    # In a checkpoint, even under a manifest that vouches for it.
    out = tmp_path / "run"
    shutil.copytree(done, out)
    for step, path in checkpoint.found(out / "checkpoints"):
        for name in ("weights.safetensors", "optimizer.safetensors"):
            shutil.copytree(path, tmp_path / "keep")
            (path / name).write_bytes(LIES[lie])
            vouch(path)
            with pytest.raises(CheckpointError, match=f"{name}: damaged|{name}"):
                read_whole(path, step)
            shutil.rmtree(path)
            (tmp_path / "keep").rename(path)


def read_whole(path: Path, step: int) -> None:
    """A checkpoint with every tensor in it."""
    snapshot = checkpoint.load(path, step)
    assert snapshot.weights
    assert snapshot.optimizer


def vouch(path: Path) -> None:
    """A manifest that is right about every file that is there."""
    manifest = integrity.read_manifest(path)
    manifest.pop("sha256")
    for name in manifest["files"]:
        manifest["files"][name] = {"size": (path / name).stat().st_size, "sha256": integrity.sha256_file(path / name)}
    (path / "manifest.json").write_bytes(integrity._manifest(manifest))


def test_archives_and_views_that_grow_are_no_weights(done: Path, tmp_path: Path) -> None:
    """A deflated torch archive (a thousand times smaller than what it holds) and a view of stride 0, renamed to be taken for weights."""
    small = tmp_path / "small.pt"
    torch.save({"weight": torch.zeros(1).expand(10**13)}, small)
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as file, zipfile.ZipFile(small) as old:
        for name in old.namelist():
            file.writestr(name, old.read(name))
    for source in (small, tmp_path / "packed.pt"):
        folder = tmp_path / source.stem
        shutil.copytree(done / "model", folder)
        shutil.copy(source, folder / "model.safetensors")
        with pytest.raises(InputError, match="the weights cannot be read"):
            build_model(folder)
    with tarfile.open(tmp_path / "data.tar", "w") as file:
        file.add(small, "../../escaped")
    assert (
        call("train", "--model", model(), "--data", tmp_path / "data.tar", "--out", tmp_path / "out", "--steps", 1)[0]
        == 2
    )
    assert not (tmp_path / "out").exists()


SHAPES = [("hidden_size", 10**9), ("vocab_size", 10**12), ("intermediate_size", 10**10), ("num_hidden_layers", 10**8)]


@pytest.mark.parametrize(("key", "value"), SHAPES, ids=[key for key, _ in SHAPES])
def test_a_config_of_a_model_that_fits_no_machine_is_refused_before_it_is_built(
    key: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("tare.train.session.build_model", built)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 300,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **shape, key: value}))
    with pytest.raises(InputError, match=r"there are .* at all; take a smaller model|allowed: up to 10000"):
        train(config(tmp_path / "out", name=str(tmp_path / "model")))
    assert not (tmp_path / "out").exists()


def test_what_the_machine_has_is_known() -> None:
    there = machine.memory_of(torch.device("cpu"))
    assert there is not None
    machine.require(there, torch.device("cpu"))
    with pytest.raises(DoesNotFit, match=r"--budget \d"):
        machine.require(there + 1, torch.device("cpu"))


def test_a_tokenizer_that_is_none_of_ours(done: Path, tmp_path: Path) -> None:
    text = json.loads((done / "model" / "tokenizer.json").read_text())
    for number, change in enumerate(
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, {"version": 9}, {"added_tokens": [7]})
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({**text, **change}))
        with contextlib.suppress(InputError):
            load_tokenizer(path, 300)


def test_links_out_of_a_checkpoint_are_not_followed(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (step, path), *_ = checkpoint.found(out / "checkpoints")
    (path / "weights.safetensors").rename(tmp_path / "elsewhere")
    (path / "weights.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: missing"):
        checkpoint.load(path, step)


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_OWN_VARIABLE")


def test_no_token_and_no_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "canary-7f3a91c2"
    for name in SECRETS:
        monkeypatch.setenv(name, secret)
    out = tmp_path / "run"
    words = f"--data {corpus()} --seq 32 --batch 2 --eval-every 2 --checkpoint-every 1 --data.eval_tokens 300 --device cpu --threads 1"
    code, said = call(
        "train", "--model", model(), *words.split(), "--steps", 2, "--out", out, "--method", "adamw", "--json"
    )
    assert code == 0, said
    assert secret not in said
    places = [*out.rglob("*"), *Path(os.environ["TARE_CACHE"]).rglob("*")]
    holding = [path for path in places if path.is_file() and secret.encode() in path.read_bytes()]
    assert holding == []
    call("train", "--model", "nowhere", *words.split(), "--steps", 2, "--out", tmp_path / "other", "--debug")
    assert secret not in said


def test_environment_variables_in_settings_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-1b2c")
    file = tmp_path / "run.yaml"
    file.write_text('data:\n  source: "$HF_TOKEN"\n')
    code, said = call(
        "train", "--config", file, "--out", tmp_path / "out", "--model", model(), "--steps", 1, "--seq", 32
    )
    assert code == 2
    assert "canary" not in said
    assert "$HF_TOKEN" in said


def test_a_model_whose_weights_are_not_numbers(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    save_file(
        {**tensors, name: torch.full_like(tensors[name], torch.nan)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="holds NaN or infinite values"):
        build_model(folder)
    save_file({**tensors, name: tensors[name][:-1]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weight lm_head\.weight is \[299, 64\] there and \[300, 64\]"):
        build_model(folder)
