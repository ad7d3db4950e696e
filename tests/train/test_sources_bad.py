"""Sources that cannot be read: every one gives a single line that names the file, and the line in it."""

import contextlib
import gzip
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.core.errors import InputError
from tare.train.sources import documents, fingerprint


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with a cache of its own."""
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(source: str, column: str = "text") -> list[str]:
    return [document.text for document in documents(source, column)]


def write_parquet(path: str, **columns: list[Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def bad(name: str, content: bytes = b"", message: str = "", column: str = "text") -> Any:
    return pytest.param(name, content, message, column, id=message[:40])


@pytest.mark.parametrize(
    ("name", "content", "message", "column"),
    [
        bad("empty.txt", b"", "'empty.txt' is empty"),
        bad("blank.txt", b" \n\n", "'blank.txt' holds no text"),
        bad("blank.jsonl", b'{"text": " "}\n', "'blank.jsonl' holds no text"),
        bad("nul.txt", b"one\ntwo\nth\0ree\n", "nul.txt:3: not UTF-8 text"),
        bad("latin.txt", "one\ntwo é\n".encode("latin-1"), "latin.txt:2: not UTF-8 text"),
        bad("utf16.txt", "one two".encode("utf-16"), "utf16.txt:1: not UTF-8 text"),
        bad("cut.txt", "one\né".encode()[:-1], "cut.txt:2: not UTF-8 text"),
        bad("noise.bin", bytes(range(256)) * 50, "noise.bin:1: not UTF-8 text"),
        bad("a.jsonl", b'{"text": "one"}\n{"text": "two"\n', "a.jsonl:2: malformed JSON (Expecting"),
        bad("b.jsonl", b'{"text": "one"}\n[1, 2]\n', "b.jsonl:2: a JSON list, not an object"),
        bad("array.json", b'[\n{"text": "one"}\n]\n', "array.json:1: malformed JSON"),
        bad("deep.jsonl", b"[" * 100_000 + b"\n", "deep.jsonl:1: malformed JSON"),
        bad("nul.jsonl", b'{"text": "one"}\n\0\0\0\n', "nul.jsonl:2: not UTF-8 text"),
        bad("latin.jsonl", b'{"text": "one"}\n{"text": "\xe9"}\n', "latin.jsonl:2: not UTF-8 text"),
        bad(
            "c.jsonl",
            b'{"id": 1, "body": "x"}\n',
            "c.jsonl:1: no column 'text'; present: id, body; set data.text_column",
        ),
        bad("d.jsonl", b'{"text": "x"}\n{"text": 5}\n', "d.jsonl:2: column 'text' holds int, not text"),
        bad("e.jsonl", b'{"text": null}\n', "e.jsonl:1: column 'text' holds NoneType, not text"),
        bad("f.jsonl", b'{"text": "\\ud800"}\n', "f.jsonl:1: column 'text' holds half of a surrogate"),
        bad("g.jsonl.gz", b"this is not gzip", "g.jsonl.gz' cannot be read (Not a gzipped file"),
        bad("h.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 99)[:40], "h.jsonl.gz' cannot be read (Compressed file"),
        bad("i.txt.xz", b"this is not xz", "i.txt.xz' cannot be read"),
        bad("j.parquet", b"PAR1 but not really", "j.parquet: cannot be read (Parquet"),
        bad("k.csv", b"text\none\n", "'k.csv' is a table; allowed:"),
        bad("missing.txt", b"-", "'missing.txt' does not exist; allowed:"),
        bad("./here/nothing", b"-", "'./here/nothing' does not exist"),
        bad("a/b/c", b"-", "'a/b/c' does not exist"),
        bad("folder/nothing", b"-", "'folder/nothing' does not exist"),
        bad("", b"-", "'' does not exist"),
        bad("\0", b"-", "does not exist"),
        bad("x" * 5000 + ".txt", b"-", "does not exist"),
        bad("folder", b"-", "the folder 'folder' holds no text"),
        bad("/dev/zero", b"-", "'/dev/zero' is no regular file"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(
    at: Path, name: str, content: bytes, message: str, column: str
) -> None:
    Path("folder").mkdir()
    Path("folder/picture.png").write_bytes(b"\x89PNG\0")
    if content != b"-":
        Path(name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(documents(name, column))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("data: ")
    assert message in line


def test_bad_parquet_columns(at: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_parquet("a.parquet", id=[1], body=["x"])
    with pytest.raises(
        InputError, match=r"a.parquet: row 1: no column 'text'; present: id, body; set data.text_column"
    ):
        texts("a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: row 1: column 'id' holds int, not text"):
        texts("a.parquet", "id")
    Path("bad.parquet").write_bytes(Path("a.parquet").read_bytes()[:100])
    with pytest.raises(InputError, match=r"bad.parquet: cannot be read"):
        texts("bad.parquet")
    assert capfd.readouterr().err == ""  # the libraries below add no lines of their own


def test_one_bad_file_in_a_folder_is_named(at: Path) -> None:
    Path("data").mkdir()
    Path("data/a.txt").write_text("fine")
    Path("data/b.txt").write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match=r"data: data/b.txt:1: not UTF-8 text"):
        texts("data")


def test_a_file_without_permission(at: Path) -> None:
    Path("secret.txt").write_text("text")
    Path("secret.txt").chmod(0)
    at.chmod(0o755)  # it is the current folder, so those above it are not asked
    with as_nobody(), pytest.raises(InputError, match=r"'secret.txt' cannot be read \(Permission denied\)"):
        texts("secret.txt")
    with as_nobody(), pytest.raises(InputError, match=r"'secret.txt' cannot be read \(Permission denied\)"):
        fingerprint("secret.txt")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Give up the rights of root for a while, to whom every file is readable."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_without_the_hub_one_line_within_seconds(at: Path) -> None:
    script = (
        "from tare.train.sources import documents\nfrom tare.core.errors import InputError\n"
        "try: list(documents('owner/name:en'))\nexcept InputError as error: print(error)"
    )
    # Port 9 of this machine refuses: the real client fails in the real way, wherever the test runs.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begin < 45
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "data: 'owner/name' does not exist here and was not found as a hub data set" in done.stdout
    assert "check spelling and network; allowed:" in done.stdout
