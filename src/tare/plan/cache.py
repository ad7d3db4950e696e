"""Results kept on disk: `$TARE_CACHE/plan/` (default `~/.cache/tare/plan/`), one JSON file each.

The name is a hash of everything that the result depends on, the sources of tare and the versions of torch and transformers
included. A file that cannot be read is computed anew; a folder that cannot be written is no error.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ABOVE = ("cli", "report", "testing", "train")  # rooms that no plan depends on


def cache_folder() -> Path:
    """Where plans are kept."""
    root = os.environ.get("TARE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "tare") / "plan"


def cached(what: dict[str, Any], compute: Callable[[], T], encode: Callable[[T], Any], decode: Callable[[Any], T]) -> T:
    """The result for `what` (JSON-able, complete) from disk, or computed and put there.

    Args:
        what: everything that the result depends on beyond versions.
        compute: makes the result.
        encode: result to plain JSON.
        decode: plain JSON to result; anything it raises means a damaged file.
    """
    file = cache_folder() / f"{_key(what)}.json"
    try:
        return decode(json.loads(file.read_text(encoding="utf-8"))["result"])
    except Exception:  # absent, truncated, edited, written by something else: all the same to us
        pass
    result = compute()
    _write(file, {"what": what, "result": encode(result)})
    return result


def _key(what: dict[str, Any]) -> str:
    versions = [torch.__version__, version("transformers"), _sources()]
    text = json.dumps([what, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def deciding_files() -> list[Path]:
    """tare's own files that decide about memory: all but those of the rooms that stand on plans and say only what becomes of them."""
    root = Path(__file__).parent.parent
    return sorted(
        file
        for file in root.rglob("*.*")
        if file.is_file() and "__pycache__" not in file.parts and file.relative_to(root).parts[0] not in ABOVE
    )


@functools.cache
def _sources() -> str:
    """A hash of those files: a changed method must not meet an old plan."""
    digest = hashlib.sha256()
    for file in deciding_files():
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(content, out, default=str)
        os.replace(name, file)  # whole or not at all, also with two writers
    except OSError:
        return
