"""The cache on disk: folders that are built once, checked before they are trusted, and never half-written.

An entry is a folder `<root>/<kind>/<key>/` whose `manifest.json` (size and SHA-256 of each file) is written last. It is
built beside its place and renamed into it, so a killed process leaves nothing that is mistaken for an entry.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tare.core.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two processes may then do the same work twice; the result is the same
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
FORMAT = 1
HASHED_BYTES = 1 << 30  # larger files are checked by size alone when opened: hashing 100 GB at every start is no help
HASHED_SOURCE = 64 << 20  # the same for the files of a source, which are not ours and may lie on a slow disk
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # of a rename: something stands in the place
_log = logging.getLogger("tare.cache")


def root() -> Path:
    """The cache folder: `$TARE_CACHE`, else `$XDG_CACHE_HOME/tare`, else `~/.cache/tare`. It need not exist yet."""
    if given := os.environ.get("TARE_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative value is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "tare"


def key_of(*parts: object) -> str:
    """A file-name-safe key (32 hexadecimal digits) of the parts, which must have a JSON form.

    >>> key_of("stdlib", 4096) == key_of("stdlib", 4096) != key_of("stdlib", 8192)
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint_files(files: Iterable[tuple[str, Path]], *parts: object) -> str:
    """SHA-256 (hexadecimal) of the names and contents of files, and of further parts with a JSON form.

    Files above `HASHED_SOURCE` count by name, size and time of change. Where the files lie does not count.
    """
    facts: list[object] = [*parts]
    for name, path in files:
        info = path.stat()
        facts.append([name, info.st_size, info.st_mtime_ns if info.st_size > HASHED_SOURCE else sha256_file(path)])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def last_known(kind: str, key: str, ask: Callable[[], str]) -> str:
    """What `ask()` returns, remembered; when it raises, what it returned the last time, if there was one."""
    memory = root() / kind / key
    try:
        answer = ask()
    except Exception:
        if memory.is_file():
            return memory.read_text()
        raise
    with contextlib.suppress(OSError):  # a cache that cannot be written makes the memory fail, not the answer
        write_atomic(memory, answer.encode())
    return answer


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old bytes or the new: temp, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _beside(path)
    try:
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def entry(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of the entry `(kind, key)`, built by `build(empty folder)` when it is missing or damaged.

    Processes that ask for the same entry at once wait for the first builder where the system has file locks; where it
    has none, each builds and the first rename wins. A damaged entry is built anew. What `build` raises passes through.

    Raises `InputError` when the cache folder cannot be written.

    >>> import os, tempfile, unittest.mock
    >>> with tempfile.TemporaryDirectory() as place, unittest.mock.patch.dict(os.environ, TARE_CACHE=place):
    ...     (entry("demo", "k", lambda folder: (folder / "a.txt").write_text("hello") and None) / "a.txt").read_text()
    'hello'
    """
    folder = root() / kind / key
    if verify(folder):  # first, so that a filled cache may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f"{key}.lock") as locked:
            if verify(folder):
                return folder
            if locked:  # nobody else is building this entry: what lies here was left by a killed process
                for stale in folder.parent.glob(f"{key}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            temp = _beside(folder)
            temp.mkdir()
            try:
                build(temp)
                _seal(temp)
                _publish(temp, folder)
            finally:
                shutil.rmtree(temp, ignore_errors=True)  # after a rename there is nothing left to remove
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"cache: {str(root())!r} cannot be written ({reason}): free space there or set TARE_CACHE to another folder"
        ) from error
    return folder


def verify(folder: Path) -> bool:
    """Whether `folder` is a whole entry: a manifest of this format, and every file with the size and hash it states.

    Files above `HASHED_BYTES` are checked by size alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return False
        for name, (size, digest) in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != size or (size <= HASHED_BYTES and sha256_file(path) != digest):
                _log.warning("cache entry %s: %s is damaged; it is built anew", folder, name)
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a whole entry but its JSON, as its manifest states them."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    return {name: digest for name, (_, digest) in files.items() if not name.endswith(".json")}


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _seal(folder: Path) -> None:
    """Make the files durable, then write the manifest: its presence says that all else is there."""
    files: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = (path.stat().st_size, sha256_file(path))
    write_atomic(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def _publish(temp: Path, folder: Path) -> None:
    """Rename a sealed folder into its place; give way to a good entry that another process put there, replace a bad."""
    for _ in range(16):
        try:
            os.rename(temp, folder)
            _sync_folder(folder.parent)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if verify(folder):
            return
        # Where there are no locks a good entry may have come in this instant; it goes, and ours, which is the same, comes.
        bad = _beside(folder)
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            os.rename(folder, bad)
        if bad.is_dir():
            shutil.rmtree(bad, ignore_errors=True)
        else:
            bad.unlink(missing_ok=True)  # something that is no folder stood in the place
    raise OSError(None, f"another process keeps writing {folder.name}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold an advisory lock that dies with the process; yields False where the file system has none."""
    with open(path, "a+b") as file:
        held = fcntl is not None
        if held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                held = False
        yield held


def _beside(path: Path) -> Path:
    """A fresh name in the same folder (so on the same file system, where a rename is atomic)."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Folders cannot be opened on Windows, where the rename is durable enough."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
