"""S11: whatever bytes stand in a file, what comes out is a result or one of our errors, in one line; nothing else escapes."""

import contextlib
import gzip
import json
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import altered, damaged
from test_hostile_files import vouch
from train_runs import config, corpus

from tare.cli.flags import take_dotted
from tare.core.errors import InputError
from tare.plan.models import build_model
from tare.train import cache, checkpoint, metrics
from tare.train.config import RunConfig
from tare.train.configfile import build, dump, load, loads
from tare.train.loop import train
from tare.train.sources import documents
from tare.train.tasks.rows import read_table
from tare.train.tokenizer import load_tokenizer
from tare.zeroth.logfile import read as read_log

ONCE = settings(
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck)
)  # of what takes a tenth of a second
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


def ours(act: Callable[[], Any]) -> None:
    """Nothing escapes but our errors, and they are one line."""
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            act()
        except InputError as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 7000  # a value of the file may stand in it


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "run"
    train(config(out, "mezo", steps=2, checkpoint_every=1, lr=1e-4))
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


YAML = dump(build(loads("train: {steps: 5}\nmethod: {options: {betas: [0.9, 0.99]}}\ndata: {source: 'a: b'}"))).encode()


def config_bytes(data: bytes, place: Path) -> None:
    (place / "run.yaml").write_bytes(data)
    ours(lambda: load(place / "run.yaml"))


@FEW
@given(damaged(YAML))
def test_configuration_bytes(place: Path, data: bytes) -> None:
    config_bytes(data, place)


@FEW
@given(altered(asdict(RunConfig())))
def test_configuration_values(place: Path, tree: Any) -> None:
    config_bytes(json.dumps(tree).encode(), place)  # JSON is YAML


@FEW
@given(
    st.lists(
        st.text(max_size=30).map(lambda text: f"--{text}")
        | st.sampled_from(["--train.steps", "=", "1", "--run.x=1", "--"]),
        max_size=6,
    )
)
def test_words_of_a_command(words: list[str]) -> None:
    ours(lambda: build(take_dotted(words)[1]))


def checkpoint_file(done: Path, place: Path, name: str, data: bytes) -> None:
    """A checkpoint in which one file is damaged and the manifest vouches for it."""
    step, path = checkpoint.found(done / "checkpoints")[0]
    copy = place / f"step-{step}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    (copy / name).write_bytes(data)
    if name != "manifest.json":
        vouch(copy)
    ours(lambda: whole(copy, step))


def whole(path: Path, step: int) -> None:
    snapshot = checkpoint.load(path, step)
    assert snapshot.step == step
    str(snapshot.optimizer), str(snapshot.trainer)


@ONCE
@given(st.data())
def test_checkpoint_bytes(done: Path, place: Path, data: Any) -> None:
    path = checkpoint.found(done / "checkpoints")[0][1]
    name = data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
    checkpoint_file(done, place, name, data.draw(damaged((path / name).read_bytes())))


@ONCE
@given(st.data())
def test_checkpoint_values(done: Path, place: Path, data: Any) -> None:
    path = checkpoint.found(done / "checkpoints")[0][1]
    name = data.draw(st.sampled_from(sorted(file.name for file in path.glob("*.json"))))
    tree = data.draw(altered(json.loads((path / name).read_bytes())))
    checkpoint_file(done, place, name, json.dumps(tree).encode())


def with_header(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with another header before the same tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@ONCE
@given(st.data())
def test_headers_of_weights(done: Path, place: Path, data: Any) -> None:
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(done / "model", folder)
    file = folder / "model.safetensors"
    file.write_bytes(with_header(file.read_bytes(), lambda tree: data.draw(altered(tree))))
    ours(lambda: build_model(folder))
    path = checkpoint.found(done / "checkpoints")[0][1] / "weights.safetensors"
    checkpoint_file(done, place, path.name, with_header(path.read_bytes(), lambda tree: data.draw(altered(tree))))


@ONCE
@given(st.data())
def test_config_and_index_of_a_model(done: Path, place: Path, data: Any) -> None:
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(done / "model", folder)
    if data.draw(st.booleans()):
        tree = data.draw(altered(json.loads((folder / "config.json").read_bytes())))
        (folder / "config.json").write_text(json.dumps(tree))
    else:
        index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(data.draw(altered(index))))
    ours(lambda: build_model(folder))


@ONCE
@given(st.data())
def test_tokenizers(done: Path, place: Path, data: Any) -> None:
    file, about = (
        json.loads((done / "model" / name).read_bytes()) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    file_, about_ = data.draw(altered(file)), data.draw(altered(about))
    (place / "tokenizer.json").write_text(json.dumps(file_))
    folder = place / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(done / "model" / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(about_))
    ours(lambda: load_tokenizer(place / "tokenizer.json", 300))
    ours(lambda: load_tokenizer(folder, 300))


LINES = b'{"text": "one \\u00e9", "label": 1}\n{"text": "two", "label": 0}\n\n{"text": "three"}\n'


@FEW
@given(st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".json", ".md"]), damaged(LINES))
def test_texts(place: Path, suffix: str, data: bytes) -> None:
    path = place / f"data{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    ours(lambda: list(documents(str(path))))


@FEW
@given(st.sampled_from([".jsonl", ".csv", ".tsv", ".csv.gz"]), damaged(b'text,label\n"a, b",1\nc,0\n' + LINES))
def test_tables(place: Path, suffix: str, data: bytes) -> None:
    path = place / f"rows{suffix}"
    path.write_bytes(data)
    ours(lambda: read_table(str(path), "classify"))


@ONCE
@given(st.data())
def test_parquet(place: Path, data: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    path = place / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"] * 20, "label": [1, 0] * 20}), path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    ours(lambda: read_table(str(path), "classify"))


@FEW
@given(st.data())
def test_logs(done: Path, place: Path, data: Any) -> None:
    path = place / "run.seeds"
    path.write_bytes(data.draw(damaged((done / "run.seeds").read_bytes())))
    ours(lambda: read_log(path))
    (place / "metrics.jsonl").write_bytes(data.draw(damaged((done / "metrics.jsonl").read_bytes())))
    assert all(isinstance(line["step"], int) for line in metrics.read(place / "metrics.jsonl"))


@FEW
@given(st.data())
def test_a_damaged_cache_entry_is_built_anew(data: Any) -> None:
    make = lambda folder: (folder / "a.txt").write_text("hello") and None  # noqa: E731
    shutil.rmtree(
        cache.root() / "fuzz", ignore_errors=True
    )  # an earlier example may have left damage that matters to nobody
    folder = cache.entry("fuzz", "k", make)
    name = data.draw(st.sampled_from(["a.txt", "manifest.json"]))
    (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    assert (cache.entry("fuzz", "k", make) / "a.txt").read_text() == "hello"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bytes", "values", "checkpoint", "texts"])
def test_for_long(what: str, done: Path, place: Path) -> None:
    path = checkpoint.found(done / "checkpoints")[0][1]
    names = sorted(file.name for file in path.iterdir())

    @MANY
    @given(st.data())
    def run(data: Any) -> None:
        if what == "bytes":
            config_bytes(data.draw(damaged(YAML, 20)), place)
        elif what == "values":
            config_bytes(json.dumps(data.draw(altered(asdict(RunConfig()), 5))).encode(), place)
        elif what == "checkpoint":
            name = data.draw(st.sampled_from(names))
            checkpoint_file(done, place, name, data.draw(damaged((path / name).read_bytes(), 3)))
        else:
            (place / "x.jsonl").write_bytes(data.draw(damaged(LINES, 20) | st.binary(max_size=300)))
            ours(lambda: list(documents(str(place / "x.jsonl"))))

    run()


def test_the_corpus_itself_is_read(place: Path) -> None:
    assert sum(1 for _ in documents(corpus())) > 10
    with contextlib.suppress(InputError):
        read_table(corpus(), "classify")
