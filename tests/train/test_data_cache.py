"""The cache: whole entries or none, whoever dies and whoever else is writing."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tare.core.errors import InputError
from tare.train import cache
from tare.train.config import DataConfig
from tare.train.data import open_corpus
from tare.train.sources import documents


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def build_letters(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.bin").write_bytes(b"b" * 10)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "mine"))
    assert cache.root() == tmp_path / "mine"
    monkeypatch.delenv("TARE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "tare"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.root() == tmp_path / "home" / ".cache" / "tare"


def test_an_entry_is_built_once(place: Path) -> None:
    calls: list[Path] = []
    for _ in range(2):
        folder = cache.entry("demo", "k", lambda folder: (calls.append(folder), build_letters(folder), None)[-1])
        assert (folder / "sub" / "b.bin").read_bytes() == b"b" * 10
    assert len(calls) == 1
    assert not list(folder.parent.glob("*.tmp-*"))


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "grow", "gone", "no manifest", "half manifest", "other manifest", "file"]
)
def test_a_damaged_entry_is_built_anew(place: Path, damage: str) -> None:
    folder = cache.entry("demo", "k", build_letters)
    path, manifest = folder / "a.bin", folder / cache.MANIFEST
    if damage == "flip":
        path.write_bytes(b"a" * 999 + b"b")
    elif damage in ("cut", "grow"):
        path.write_bytes(b"a" * (500 if damage == "cut" else 2000))
    elif damage == "gone":
        path.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half manifest":
        manifest.write_bytes(manifest.read_bytes()[:20])
    elif damage == "other manifest":
        manifest.write_text(json.dumps({"format": 99, "files": {}}))
    else:
        folder.rename(place / "away")
        folder.write_text("something that is no folder")
    assert not cache.verify(folder)
    assert cache.entry("demo", "k", build_letters) == folder
    assert path.read_bytes() == b"a" * 1000
    assert cache.verify(folder)
    assert not list(folder.parent.glob("*.tmp-*"))


def test_a_builder_that_fails_leaves_nothing(place: Path) -> None:
    def fail(folder: Path) -> None:
        build_letters(folder)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        cache.entry("demo", "k", fail)
    assert [path.name for path in (place / "cache" / "demo").iterdir()] == ["k.lock"]


def test_a_killed_builder_leaves_nothing_that_counts(place: Path) -> None:
    script = (
        "import sys, time\nfrom tare.train import cache\n"
        "def build(folder):\n    (folder / 'a.bin').write_bytes(b'half')\n    print('in', flush=True)\n    time.sleep(60)\n"
        "cache.entry('demo', 'k', build)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"in\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    kind = place / "cache" / "demo"
    assert len(list(kind.glob("k.tmp-*"))) == 1
    folder = cache.entry("demo", "k", build_letters)
    assert (folder / "a.bin").read_bytes() == b"a" * 1000
    assert sorted(path.name for path in kind.iterdir()) == ["k", "k.lock"]


RACE = """
import sys, time
from pathlib import Path
from tare.train import cache
if sys.argv[2] == "without locks":
    cache.fcntl = None
def build(folder):
    time.sleep(0.3)
    (folder / "a.bin").write_bytes(b"a" * 100_000)
    print("built", flush=True)
Path(sys.argv[1], f"ready-{sys.argv[3]}").touch()
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.002)
folder = cache.entry("demo", "k", build)
if sys.argv[2:5:2] != ["without locks", "damaged"]:  # there the other may be putting its own, equal entry in place
    assert (folder / "a.bin").read_bytes() == b"a" * 100_000
"""


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_two_processes_at_once(place: Path, locks: str, before: str) -> None:
    if before == "damaged":
        (cache.entry("demo", "k", build_letters) / "a.bin").write_bytes(b"bad")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(place), locks, str(number), before], stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    for number in range(2):
        wait_for(place / f"ready-{number}")
    (place / "go").touch()
    built = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert built.count("built\n") == 1 or locks == "without locks"
    assert cache.verify(place / "cache" / "demo" / "k")
    assert not list((place / "cache" / "demo").glob("*.tmp-*"))


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


CORPUS = """
import hashlib, sys
from tare.train.config import DataConfig
from tare.train.data import open_corpus
corpus = open_corpus(DataConfig(source=sys.argv[1], seq=32), 300, progress=lambda line: print(line, file=sys.stderr))
print(hashlib.sha256(corpus.train.tobytes() + corpus.eval.tobytes()).hexdigest(), corpus.tokenizer_hash, corpus.fingerprint)
"""


def test_two_processes_open_one_corpus(place: Path) -> None:
    text = "".join(document.text for document, _ in zip(documents("stdlib"), range(40), strict=False))
    (place / "a.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", CORPUS, str(place / "a.txt")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != ""
    if cache.fcntl is not None:
        assert sum(error.count("training a tokenizer") for _, error in answers) == 1


def test_a_damaged_shard_is_tokenized_again(place: Path) -> None:
    (place / "a.txt").write_text("some words in a line\n" * 2000 + "others\n")
    config = DataConfig(source=str(place / "a.txt"), seq=32)
    first = open_corpus(config, 300)
    expected = first.train.tobytes()
    path = Path(first.describe()["cache"]) / "train.bin"
    del first
    path.write_bytes(bytes(len(expected)))
    assert open_corpus(config, 300).train.tobytes() == expected


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        InputError, match=r"^cache: '.*file/cache' cannot be written \(Not a directory\): .* set TARE_CACHE"
    ):
        cache.entry("demo", "k", build_letters)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(place: Path) -> None:
    def fill(folder: Path) -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)

    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        cache.entry("demo", "k", fill)
    assert [path.name for path in (place / "cache" / "demo").iterdir()] == ["k.lock"]


def test_a_filled_cache_may_be_read_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.entry("demo", "k", build_letters)
    monkeypatch.setattr(Path, "mkdir", None)  # any attempt to write fails
    assert cache.entry("demo", "k", build_letters) == folder


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_others_may_read_what_the_umask_lets_them(place: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = cache.entry("demo", "k", build_letters)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / cache.MANIFEST).stat().st_mode) == 0o644


def test_a_small_file_is_replaced_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "x" / "small"
    cache.write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        cache.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_what_was_known_last_stands_in(place: Path) -> None:
    def fail() -> str:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.last_known("demo", "k", fail)
    assert cache.last_known("demo", "k", lambda: "one") == "one"
    assert cache.last_known("demo", "k", fail) == "one"
