"""Sources: what is read, in which order, and what names its content."""

import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tare.core.errors import InputError
from tare.train import cache, sources
from tare.train.sources import PIECE, Document, documents, find, fingerprint


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with a cache of its own."""
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(source: str, column: str = "text") -> list[str]:
    return [document.text for document in documents(source, column)]


# What is read


def test_the_standard_library_is_real_text_in_a_fixed_order() -> None:
    first, second = list(documents("stdlib")), list(documents("stdlib"))
    assert first == second
    names = [document.name.split("#")[0] for document in first]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/events.py"} <= set(names)
    assert not any({"test", "site-packages", "idlelib"} & set(name.split("/")) for name in names)
    assert 5e6 < sum(len(document.text) for document in first) < 50e6


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n\r\té🎈"), max_size=400))
def test_a_text_file_comes_back_whole_with_newlines_made_one_kind(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    if not text.strip():
        with pytest.raises(InputError):
            texts(str(path))
        return
    assert "".join(texts(str(path))) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_a_byte_order_mark_is_taken_off(at: Path) -> None:
    Path("a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    Path("a.jsonl").write_bytes('\ufeff{"text": "one"}\r\n'.encode())
    assert texts("a.txt") == ["one\ntwo"]
    assert texts("a.jsonl") == ["one"]


def test_a_long_file_is_cut_at_line_ends(at: Path) -> None:
    text = "".join(f"line {number} of the file, é\n" for number in range(200_000))
    Path("long.txt").write_text(text, encoding="utf-8")
    pieces = list(documents("long.txt"))
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.endswith("\n") and len(piece.text) <= PIECE for piece in pieces)
    assert [piece.name for piece in pieces[:2]] == ["long.txt#0", "long.txt#1"]


def test_a_line_without_an_end_is_cut_too(at: Path) -> None:
    Path("a.txt").write_text("x" * 300_000)
    assert "".join(texts("a.txt")) == "x" * 300_000
    assert len(texts("a.txt")) > 4


def test_a_small_file_still_makes_several_documents(at: Path) -> None:
    Path("small.txt").write_text("a line of text\n" * 1500)
    assert len(texts("small.txt")) > 8


def test_a_folder_is_read_in_order_without_what_is_no_text(at: Path) -> None:
    for name in (
        "b.md",
        "a/z.txt",
        "a/b.py",
        ".git/config.txt",
        "__pycache__/x.py",
        ".hidden.txt",
        "picture.png",
        "empty.py",
    ):
        path = at / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG\0" if name.endswith("png") else b"" if "empty" in name else name.encode())
    (at / "data" / "rows.jsonl").write_text('{"text": "row"}\n')
    assert [document.name for document in documents("data")] == ["a/b.py", "a/z.txt", "b.md", "rows.jsonl:1"]


def test_json_lines_plain_and_compressed_are_the_same(at: Path) -> None:
    rows = b'{"text": "one", "n": 1}\n\n{"text": "", "n": 2}\n{"text": "three \\u00e9"}\n'
    Path("a.jsonl").write_bytes(rows)
    Path("b.jsonl.gz").write_bytes(gzip.compress(rows))
    Path("c.jsonl.xz").write_bytes(lzma.compress(rows))
    Path("d.json").write_bytes(rows)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.json"):
        assert list(documents(name)) == [Document(f"{name}:1", "one"), Document(f"{name}:4", "three é")]


def test_parquet_rows(at: Path) -> None:
    write_parquet("a.parquet", body=["one", "", "three"])
    assert list(documents("a.parquet", "body")) == [Document("a.parquet:1", "one"), Document("a.parquet:3", "three")]


def write_parquet(path: str, **columns: list[Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


# The hub


class Rows(list[dict[str, Any]]):
    column_names = None  # a stream does not know them before the first row


def use_hub(monkeypatch: pytest.MonkeyPatch, commit: Callable[[], str]) -> list[dict[str, Any]]:
    """Put a hub of two rows in the place of the real one; returns the calls of `load_dataset`."""
    import datasets
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def load(**what: Any) -> Rows:
        calls.append(what)
        return Rows([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=commit()))
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize(
    ("source", "path", "name", "split"),
    [
        ("owner/name", "owner/name", None, "train"),
        ("plain", "plain", None, "train"),
        ("owner/name-1.5:en", "owner/name-1.5", "en", "train"),
        ("owner/name:en:validation", "owner/name", "en", "validation"),
        ("owner/name::train[:10%]", "owner/name", None, "train[:10%]"),
    ],
)
def test_hub_names(
    at: Path, monkeypatch: pytest.MonkeyPatch, source: str, path: str, name: str | None, split: str
) -> None:
    calls = use_hub(monkeypatch, lambda: "c0ffee")
    assert texts(source) == ["one", "two"]
    assert calls == [{"path": path, "name": name, "split": split, "revision": "c0ffee", "streaming": True}]


def test_a_hub_data_set_is_read_up_to_a_limit(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, lambda: "c0ffee")
    monkeypatch.setattr(sources, "HUB_BYTES", 3)
    assert texts("owner/name") == ["one"]


def test_a_hub_data_set_counts_by_its_commit_which_is_remembered(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> str:
        raise OSError("no network\nat all")

    commits: Iterator[str] = iter(["a", "a", "b"])
    use_hub(monkeypatch, lambda: next(commits))
    prints = [fingerprint("owner/name") for _ in range(3)]
    assert prints[0] == prints[1] != prints[2]
    use_hub(monkeypatch, unreachable)
    assert fingerprint("owner/name") == prints[2]
    with pytest.raises(
        InputError, match=r"'owner/other' does not exist here and was not found as a hub data set \(no net"
    ):
        fingerprint("owner/other")


def test_a_path_that_exists_wins_over_a_hub_name(at: Path) -> None:
    Path("owner").mkdir()
    Path("owner/name").write_text("a file")
    assert find("owner/name").hub is None
    assert find("other/name").hub == ("other/name", None, "train")


# The fingerprint


def test_the_fingerprint_follows_content_and_names_alone(at: Path) -> None:
    def make(folder: str, **files: str) -> str:
        for name, text in files.items():
            (at / folder).mkdir(exist_ok=True)
            (at / folder / f"{name}.txt").write_text(text)
        return fingerprint(folder)

    first = make("x", a="one", b="two")
    assert make("y", a="one", b="two") == first  # another place and time, the same data
    os.utime("x/a.txt", (1, 1))
    assert fingerprint("x") == first
    assert fingerprint("x", "body") != first
    assert make("x", a="ono") != first
    assert make("y", c="") != first
    assert make("z", a="onet", b="wo") != first


def test_a_large_file_counts_by_size_and_time(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "HASHED_SOURCE", 2)
    Path("a.jsonl").write_text(json.dumps({"text": "one"}))
    first = fingerprint("a.jsonl")
    os.utime("a.jsonl", (1, 1))
    assert fingerprint("a.jsonl") != first
