"""Folders that are whole or not there: written aside, hashed, made durable, renamed into place; checked before they are trusted.

The order of the steps is the save protocol: temporary folder, files and their fsync, manifest, fsync of manifest and folder,
rename, fsync of the parent. A process may be killed between any two of them (`reach` lets a test do so).
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tare.core.errors import CheckpointError
from tare.plan.budget import format_bytes
from tare.train.cache import sha256_file

MANIFEST = "manifest.json"
FORMAT, SHARDED = 1, 2  # of the checkpoint folder; a sharded one is nothing that tare 0.1 could read
NEWEST = SHARDED
MAX_MANIFEST = 1 << 24
TEMPORARY = ".tmp-"


class NewerFormat(CheckpointError):
    """Written by a later tare: intact, so falling back to an older checkpoint would silently lose work."""


def reach(stage: str) -> None:
    """A point where a test may have the process killed: `TARE_FAIL_AT=stage`, or `stage@3` for its third time."""
    wanted, _, count = os.environ.get("TARE_FAIL_AT", "").partition("@")
    if wanted == stage:
        _reached[stage] = _reached.get(stage, 0) + 1
        if _reached[stage] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


_reached: dict[str, int] = {}


def commit(folder: Path, writers: Mapping[str, Callable[[Path], dict[str, Any] | None]], facts: dict[str, Any]) -> None:
    """Write a folder by the protocol; at no moment does `folder` exist and lack anything.

    Args:
        folder: the place; what is there is removed when all else is done. Its parent must exist.
        writers: file name -> function that writes the file at the path it is given, and may give back its size and hash.
        facts: what else the manifest states (plain JSON values).

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    temporary = aside(folder)
    with undone(folder, temporary):
        temporary.mkdir()
        seal(temporary, folder, {name: put(temporary / name, write) for name, write in writers.items()}, facts)


def put(path: Path, write: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
    """Write one file of a folder that is being made, durable; what the manifest has to say of it."""
    reach(f"before_write:{path.name}")
    fact = write(path)
    reach(f"after_write:{path.name}")
    sync(path)
    reach(f"after_fsync:{path.name}")
    return fact or {"size": path.stat().st_size, "sha256": sha256_file(path)}


def seal(temporary: Path, folder: Path, files: Mapping[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Put the manifest of its files into a temporary folder, and the folder into its place."""
    (temporary / MANIFEST).write_bytes(_manifest({"format": FORMAT, **facts, "files": dict(files)}))
    reach("after_write:manifest")
    sync(temporary / MANIFEST)
    sync(temporary)
    reach("before_rename")
    if folder.exists():  # same step after a resume, or a damaged one that was passed over: never written over in place
        remove(folder)
    os.rename(temporary, folder)
    reach("after_rename")
    sync(folder.parent)
    reach("after_commit")


@contextlib.contextmanager
def undone(folder: Path, temporary: Path) -> Iterator[None]:
    """Inside, a fault removes the temporary folder; those of the disk become a `CheckpointError`."""
    try:
        yield
    except BaseException as fault:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(fault, OSError | SafetensorError):
            raise CheckpointError(
                f"{folder}: could not be saved: {why(fault)}; what was saved before is intact"
            ) from fault
        raise


def verify(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The manifest of a folder whose every byte is as it was written.

    part, parts: of several processes each reads the content of every `parts`-th file only; names and sizes are checked by all.

    Raises:
        NewerFormat: written by a later version of tare.
        CheckpointError: a missing, changed, cut or foreign file; the message names it.
    """
    manifest = read_manifest(folder)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(fact, dict) for fact in files.values()):
        raise CheckpointError(f"{folder / MANIFEST}: lists no files")
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(present - set(files)):
        raise CheckpointError(f"{folder / name}: does not belong to this checkpoint (not in its manifest); remove it")
    for number, (name, fact) in enumerate(sorted(files.items())):
        path = folder / name
        # A manifest is input too: only plain names inside the folder are opened.
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint")
        size = path.stat().st_size
        if size != fact.get("size"):
            raise CheckpointError(f"{path}: damaged ({size} bytes, {fact.get('size')} were written)")
        if number % parts == part and sha256_file(path) != fact.get("sha256"):
            raise CheckpointError(f"{path}: damaged (its content has changed since it was written)")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, proven unchanged by its own hash. Raises as `verify` does."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise CheckpointError(f"{path}: damaged (too large)")
        data = path.read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        intact = _manifest({key: value for key, value in manifest.items() if key != "sha256"}) == data
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so the checkpoint is not whole") from None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: damaged (not a manifest)") from None
    if not intact:
        raise CheckpointError(f"{path}: damaged (its content has changed since it was written)")
    if not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{path}: states no format")
    if manifest["format"] > NEWEST:
        raise NewerFormat(
            f"{folder}: checkpoint format {manifest['format']}, written by tare {manifest.get('tare')}; "
            f"this tare reads up to {NEWEST}; upgrade tare"
        )
    return manifest


def remove(folder: Path) -> None:
    """Delete a folder such that a kill in the middle never leaves half of it under its name."""
    doomed = aside(folder)
    os.rename(folder, doomed)
    reach("during_delete")
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(parent: Path, prefixes: tuple[str, ...]) -> None:
    """Remove what a killed process left half-written or half-deleted. The caller holds the run's lock."""
    for path in parent.glob(f"*{TEMPORARY}*"):
        if not path.name.startswith(prefixes):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise `CheckpointError` unless the disk that holds `folder` (or its nearest parent) has `size` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise CheckpointError(
            f"{folder}: no space for {what}: it needs {format_bytes(size)}, {format_bytes(free)} are free; "
            "free some space or choose another run.out"
        )


def aside(folder: Path) -> Path:
    """A fresh name beside `folder`, on the same file system, that `sweep` recognises."""
    return folder.with_name(f"{folder.name}{TEMPORARY}{secrets.token_hex(4)}")


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` (not there yet, or empty) when all is well: whole, or not at all."""
    place = aside(folder)
    try:
        place.mkdir(parents=True)
        yield place
        sync_tree(place)
        if folder.exists():
            folder.rmdir()
        os.rename(place, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """`sync` of a folder and all that is in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest(content: dict[str, Any]) -> bytes:
    """The bytes of a manifest, in one canonical form, with the hash of all that it states."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False).encode()


def why(fault: Exception) -> str:
    """The reason in the words of the system, without a library's wrapping."""
    text = (getattr(fault, "strerror", None) or str(fault)).splitlines()[0]
    low = text.lower()
    return f"no space left ({text})" if "no space" in low or "too large" in low or "quota" in low else text
