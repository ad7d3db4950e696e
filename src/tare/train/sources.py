"""Where text comes from: the standard library, files, folders, JSON lines, Parquet, hub names; a stream of documents.

Every bad input is one `InputError` line that names the file (and line). No tokens here, and no training.
"""

import gzip
import io
import json
import lzma
import math
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tare.core.errors import InputError
from tare.train import cache

ALLOWED = '"stdlib", a text file, a folder, .jsonl (also .gz, .xz), .parquet, or a hub name owner/name[:config[:split]]'
HUB_BYTES = 1 << 30  # a hub data set is read up to this much text: some are larger than any disk
PIECE = 64 * 1024  # characters: a longer text file is cut at line ends into documents of at most this size

_ROWS = {".jsonl", ".ndjson", ".json", ".parquet"}  # .json: many published sets are JSON lines under that name
_CODE = "py pyi c h cc cpp hpp cu rs go java kt scala swift cs js ts css html xml sh sql rb php lua r jl toml yaml yml"
_TEXT = {f".{name}" for name in ("txt", "text", "md", "markdown", "rst", "tex", "org", "log", *_CODE.split())}
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::([\w.-]*))?(?::([\w.\[\]:%+-]+))?")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,7}$")  # ".txt" and ".parquet", not the ".5" of a version in a hub name
# Left out of "stdlib": tests, bundled wheels, and what many systems package apart from the library.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "_bundled"}


@dataclass(frozen=True)
class Document:
    """One text. `name` says where it came from: a file, a piece `file#3`, a line `file:12`."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """A source that was found: files as (name, path) in a fixed order, or a hub data set."""

    given: str
    files: tuple[tuple[str, Path], ...] = ()
    hub: tuple[str, str | None, str] | None = None  # name, config, split
    lenient: bool = False  # stdlib: a file that cannot be decoded is left out


@dataclass
class Spare:
    """How many bad rows may be left out, how many were, and what was wrong with the first."""

    limit: int = 0
    taken: int = 0
    first: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For what is kept of the source: nothing where nothing was left out."""
        return {"bad_rows": self.taken, "first_bad_row": self.first} if self.taken else {}

    def take(self, fault: InputError) -> None:
        """Leave a row out. Raises `InputError` where that would be one too many."""
        if not self.limit:
            raise fault
        if self.taken == self.limit:
            raise InputError(f"{fault} (data.bad_rows allows {self.limit}, which were left out before)")
        self.taken, self.first = self.taken + 1, self.first or str(fault)


def find(source: str) -> Source:
    """Decide what `source` names; `InputError` if nothing is there to read. An existing path wins over a hub name."""
    path, owner = Path(os.path.expanduser(source)), source.split("/")[0]
    if source == "stdlib":
        return Source(source, tuple(_library()), lenient=True)
    if source.strip() and os.path.isdir(path):
        if files := sorted(_walk(path)):
            return Source(source, tuple(files))
        raise InputError(f"data: the folder {source!r} holds no text; read are .txt, .md, code, .jsonl and .parquet")
    if source.strip() and os.path.exists(path):
        table, empty = file_kind(path) in (".csv", ".tsv"), path.stat().st_size == 0
        if table or empty or not path.is_file():
            problem = "is a table" if table else "is empty" if path.is_file() else "is no regular file"
            raise InputError(f"data: {source!r} {problem}; allowed: {ALLOWED}")
        return Source(source, ((path.name, path),))
    hub = _HUB.fullmatch(source)
    if hub is None or (":" not in source and _SUFFIX.search(source)) or (owner != source and os.path.isdir(owner)):
        raise InputError(f"data: {source!r} does not exist; allowed: {ALLOWED}")
    return Source(source, hub=(hub[1], hub[2] or None, hub[3] or "train"))


def documents(source: str | Source, text_column: str = "text", spare: Spare | None = None) -> Iterator[Document]:
    """The documents of a source, always in the same order; blank ones are left out.

    A text file is one document; one longer than `PIECE` (less where the whole source is small, so that something can be
    held out) is cut at line ends. A row of JSON lines, Parquet or a hub data set is one document: its `text_column`.

    spare: bad rows that are left out, and counted, instead; a file that is no text at all, or cut off, never is.

    Raises `InputError` at once for a source that is not there, and while reading at the first bad file, line or row.

    >>> next(documents("stdlib")).name
    '__future__.py'
    """
    found, spare = source if isinstance(source, Source) else find(source), spare or Spare()
    if not found.hub:
        return _not_blank(_file_rows(found, text_column, spare), found.given)
    name, config, split = found.hub
    what = {"path": name, "name": config, "split": split, "revision": _hub_commit(name, remembered=False)}
    return _not_blank(_streamed(name, text_column, f"hub data set {name!r}", HUB_BYTES, spare, **what), found.given)


def fingerprint(source: str | Source, text_column: str = "text") -> str:
    """Names the content of a source (hexadecimal; `cache.fingerprint_files`). A hub data set counts by its commit."""
    found = source if isinstance(source, Source) else find(source)
    commit = _hub_commit(found.hub[0]) if found.hub else None
    try:
        return cache.fingerprint_files(found.files, text_column, found.lenient, found.hub, commit)
    except OSError as error:
        raise _unreadable(Path(error.filename), error) from error


def _library() -> list[tuple[str, Path]]:
    files = _walk(Path(sysconfig.get_path("stdlib")), _NOT_LIBRARY)
    code = sorted(item for item in files if item[1].suffix == ".py" and not item[1].name.startswith("_sysconfigdata"))
    if not code:
        raise InputError('data: this Python came without the source of its library: "stdlib" needs the .py files')
    return code


def _walk(folder: Path, without: Iterable[str] = ()) -> Iterator[tuple[str, Path]]:
    """The files of a folder that are read, by suffix; hidden ones and `__pycache__` are passed over, others ignored."""

    def stop(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error) from error

    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if name[0] != "." and name not in {"__pycache__", *without}]
        for path in (Path(place, name) for name in names if name[0] != "."):
            if file_kind(path) in _TEXT | _ROWS and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read, compression aside: `a.jsonl.xz` is `.jsonl`."""
    return Path(path.stem if path.suffix.lower() in (".gz", ".xz") else path.name).suffix.lower()


def open_file(path: Path) -> Any:
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)(path, "rb")  # type: ignore[operator]


def _not_blank(rows: Iterator[Document], given: str) -> Iterator[Document]:
    full = (row for row in rows if row.text and not row.text.isspace())
    if (first := next(full, None)) is None:
        raise InputError(f"data: {given!r} holds no text: every file or row in it is blank")
    yield first
    yield from full


def _file_rows(found: Source, column: str, spare: Spare) -> Iterator[Document]:
    total = sum(os.path.getsize(path) for _, path in found.files if file_kind(path) not in _ROWS)
    piece = min(max(total // 32, PIECE // 32), PIECE)
    for name, path in found.files:
        if file_kind(path) == ".parquet":
            what = {"path": "parquet", "data_files": f"{path}", "split": "train"}
            yield from _streamed(name, column, f"{path}", math.inf, spare, **what)
            continue
        try:
            with open_file(path) as file:
                reader = io.TextIOWrapper(file, encoding="utf-8-sig")  # takes off a BOM and makes CRLF one newline
                rows = (
                    _json_lines(reader, path, name, column, spare)
                    if file_kind(path) in _ROWS
                    else _text(reader, name, piece)
                )
                yield from rows
        except UnicodeDecodeError as error:
            if not found.lenient:
                raise _not_text(path) from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise _unreadable(path, error) from error


def _text(reader: io.TextIOWrapper, name: str, piece: int) -> Iterator[Document]:
    kept, cuts = "", 0
    while more := reader.read(1 << 18):
        if "\0" in more:
            raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "NUL")
        kept += more
        while len(kept) > piece:
            end = kept.rfind("\n", 0, piece) + 1 or kept.rfind(" ", 0, piece) + 1 or piece
            yield Document(f"{name}#{cuts}", kept[:end])
            kept, cuts = kept[end:], cuts + 1
    yield Document(f"{name}#{cuts}" if cuts else name, kept)


def json_rows(reader: Iterable[str], path: Path, spare: Spare | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of JSON lines, each with the number of its line; blank lines are passed over.

    Raises `InputError`, naming file and line, for one that is no JSON object, unless `spare` takes it.
    """
    spare = spare or Spare()
    for number, line in enumerate(reader, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if "\0" in line:
                raise _not_text(path) from error
            what = f"malformed JSON ({error_line(error)})"
        else:
            if isinstance(row, dict):
                yield number, row
                continue
            what = f"a JSON {type(row).__name__}, not an object"
        spare.take(InputError(f"data: {path}:{number}: {what}; every line must be one JSON object"))


def _json_lines(reader: io.TextIOWrapper, path: Path, name: str, column: str, spare: Spare) -> Iterator[Document]:
    for number, row in json_rows(reader, path, spare):
        if (text := _cell(row, column, f"{path}:{number}", spare)) is not None:
            yield Document(f"{name}:{number}", text)


def _streamed(file: str, column: str, where: str, limit: float, spare: Spare, /, **what: Any) -> Iterator[Document]:
    """Rows of Parquet or of the hub, through `datasets`, until they hold `limit` characters."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it reports a bad file itself: we do, in one line
    try:
        rows = datasets.load_dataset(streaming=True, **what)
        for number, row in enumerate(rows, 1):
            if limit <= 0:
                return
            if (text := _cell(row, column, f"{where}: row {number}", spare)) is not None:
                yield Document(f"{file}:{number}", text)
                limit -= len(text)
    except InputError:
        raise
    except Exception as error:  # of pyarrow, datasets, fsspec or the network: whichever reads the bytes
        raise InputError(
            f"data: {where}: cannot be read ({error_line(error)}); is it whole, its name right?"
        ) from error
    finally:
        datasets.logging.set_verbosity(before)


def _hub_commit(name: str, remembered: bool = True) -> str:
    """The commit the hub serves now; without the hub the one last seen, so that a tokenized copy opens off line."""
    from huggingface_hub import HfApi

    try:
        ask = lambda: str(HfApi().dataset_info(name, timeout=10.0).sha)  # noqa: E731
        return cache.last_known("hub", cache.key_of(name), ask) if remembered else ask()
    except Exception as error:  # no network, no such set, no access: each comes in several classes
        what = f"data: {name!r} does not exist here and was not found as a hub data set ({error_line(error)})"
        raise InputError(f"{what}; check spelling and network; allowed: {ALLOWED}") from error


def _cell(row: dict[str, Any], column: str, where: str, spare: Spare) -> str | None:
    """The text of a row; the `InputError` that says what is wrong with it, or None where it is spared."""
    if column not in row:
        problem = f"no column {column!r}; present: {', '.join(map(str, row))}; set data.text_column"
    elif not isinstance(text := row[column], str):
        problem = f"column {column!r} holds {type(text).__name__}, not text; set data.text_column or repair the row"
    elif not text.isascii() and re.search("[\ud800-\udfff]", text):
        problem = f"column {column!r} holds half of a surrogate pair, which has no UTF-8 form; repair the row"
    else:
        return text
    spare.take(InputError(f"data: {where}: {problem}"))
    return None


def _not_text(path: Path) -> InputError:
    """Reads the file over again for the number of the line: only the way to an error pays for it."""
    with open_file(path) as file:
        lines = (raw.decode(errors="surrogateescape") for raw in file)  # bytes that are not UTF-8 become surrogates
        bad = next((number for number, line in enumerate(lines, 1) if re.search("[\0\ud800-\udfff]", line)), 0)
    return InputError(f"data: {path}:{bad}: not UTF-8 text (binary, NUL, another encoding); convert it or leave it out")


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"data: {str(path)!r} cannot be read ({error_line(error)}); check the file and its permissions")


def error_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]
