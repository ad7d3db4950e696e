"""Rows of a table: read from JSON lines, CSV, TSV or Parquet; labels; few-shot subsets; what is held out.

Every bad input is one line that names the file, the row and what is there. Which rows are taken depends on content and seed alone.
"""

import csv
import hashlib
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tare.core.errors import InputError
from tare.train import sources
from tare.train.tasks.templates import Row, Template, spelling

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Table:
    """The rows of a file. name: as it was given. places: where each row stands, for errors."""

    name: str
    rows: list[Row]
    places: list[str]


def read_table(given: str, task: str) -> Table:
    """The rows of a file.

    Raises:
        InputError: no such file, raw text, a malformed line or row, no rows.
    """
    path = Path(given).expanduser()
    allowed = "allowed: .jsonl, .csv, .tsv (also .gz, .xz) or .parquet with a column for each part of the template"
    if not path.is_file():
        what = "is raw text" if given == "stdlib" else "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"data: {given!r} {what}, and task {task} needs rows with columns; {allowed}")
    kind = sources.file_kind(path)
    if kind not in TABLES:
        raise InputError(f"data: {given!r} is raw text, and task {task} needs rows with columns; {allowed}")
    rows: list[Row] = []
    places: list[str] = []
    try:
        for place, row in _parquet(path) if kind == ".parquet" else _lines(path, kind):
            rows.append(row)
            places.append(f"{given}:{place}")
    except UnicodeDecodeError as fault:
        raise InputError(f"data: {given!r} is not UTF-8 text (byte {fault.start}); convert it") from fault
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as fault:
        raise InputError(f"data: {given!r} cannot be read ({sources.error_line(fault)}); is it whole?") from fault
    if not rows:
        raise InputError(f"data: {given!r} holds no rows; {allowed}")
    return Table(given, rows, places)


def _lines(path: Path, kind: str) -> Iterator[tuple[int, Row]]:
    with sources.open_file(path) as file:
        reader = io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if kind == ".csv" else None)
        if kind in (".csv", ".tsv"):
            yield from _cells(reader, path, kind)
            return
        yield from sources.json_rows(reader, path)


def _cells(reader: io.TextIOWrapper, path: Path, kind: str) -> Iterator[tuple[int, Row]]:
    """CSV with quotes; TSV without any, as GLUE has it. The first line names the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
    table = csv.reader(reader, **how)
    try:
        names = next(table, [])
        if len(set(names)) < len(names) or not all(names):
            raise InputError(f"data: {path}:1: the first line must name every column once, got {', '.join(names)}")
        for cells in table:
            if not cells:
                continue
            if len(cells) != len(names):
                raise InputError(
                    f"data: {path}:{table.line_num}: {len(cells)} cells, and {len(names)} columns are named"
                )
            yield table.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as fault:
        raise InputError(f"data: {path}:{table.line_num}: not a table ({fault})") from fault


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet

    try:
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    except InputError:
        raise
    except Exception as fault:  # pyarrow's own kinds
        raise InputError(f"data: {path}: cannot be read ({sources.error_line(fault)}); is it whole?") from fault


def require_columns(table: Table, template: Template) -> None:
    """Raise InputError for the first row that lacks a column, or holds no text there."""
    for row, place in zip(table.rows, table.places, strict=True):
        if missing := template.missing(row):
            there = ", ".join(map(str, row))
            raise InputError(
                f"data: {place}: no column {', '.join(map(repr, missing))}, which {template.name} needs; present: {there}; set "
                "task.template"
            )
        there_ = template.adapt(row)
        empty = [name for name in template.columns if there_[name] is None or there_[name] == ""]
        if empty:
            raise InputError(f"data: {place}: column {empty[0]!r} is empty; repair the row or leave it out")


def require_label(table: Table, label_column: str) -> None:
    """Raise InputError for the first row without a label."""
    for row, place in zip(table.rows, table.places, strict=True):
        if row.get(label_column) is None or row[label_column] == "":
            what = "is empty" if label_column in row else "is missing"
            there = ", ".join(map(str, row))
            raise InputError(f"data: {place}: column {label_column!r} {what}; present: {there}; set task.label_column")


def label_names(table: Table, label_column: str) -> list[str]:
    """The labels that the rows hold, in order: numbers by value, texts by letter."""
    found = {spelling(row[label_column]) for row in table.rows if row.get(label_column) is not None}
    return sorted(found, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))


def labels_of(table: Table, template: Template, label_column: str) -> list[int]:
    """The class of every row, or the number of its right answer. Raises InputError for a label that is none."""
    found = []
    known = {name: number for number, label in enumerate(template.labels) for name in label.names}
    for row, place in zip(table.rows, table.places, strict=True):
        name = spelling(row[label_column])
        if template.task == "choice":
            count = len(template.answers(row))
            if count < 2:
                raise InputError(f"data: {place}: {count} answers; a choice needs two or more")
            if not name.isdigit() or int(name) >= count:
                raise InputError(
                    f"data: {place}: label {name!r}; expected the number of the right answer, 0 to {count - 1}"
                )
            found.append(int(name))
        elif name in known:
            found.append(known[name])
        else:
            names = ", ".join(label.names[0] for label in template.labels)
            raise InputError(
                f"data: {place}: label {name!r} has no word in {template.name}; labels: {names}; set task.words"
            )
    return found


def few(table: Table, labels: list[int], shots: int, seed: int, by_class: bool, names: list[str]) -> list[int]:
    """Numbers of `shots` rows of each class (or in all), drawn by the seed and the rows' content; in the order of the table.

    Raises InputError where a class has fewer.
    """
    counts = Counter(labels)
    for number in sorted(counts) if by_class else []:
        if counts[number] < shots:
            raise InputError(
                f"task.shots: {shots} of each class, and {table.name!r} has {counts[number]} of {names[number]!r}"
            )
    if by_class and len(counts) < len(names):
        absent = next(name for number, name in enumerate(names) if number not in counts)
        raise InputError(f"task.shots: {shots} of each class, and {table.name!r} has none of {absent!r}")
    if not by_class and len(labels) < shots:
        raise InputError(f"task.shots: {shots}, and {table.name!r} has {len(labels)} examples")
    taken: Counter[int] = Counter()
    chosen = []
    for index in sorted(range(len(labels)), key=lambda i: (hash_of(table.rows[i], str(seed)), i)):
        group = labels[index] if by_class else 0
        if taken[group] < shots:
            taken[group] += 1
            chosen.append(index)
    return sorted(chosen)


def held_out(table: Table, share: float) -> tuple[list[int], list[int]]:
    """(training, evaluation): the rows with the lowest hash of their content are held out; equal rows stand on one side.

    Raises InputError where there are no two different rows.
    """
    hashes = [hash_of(row) for row in table.rows]
    limit = sorted(hashes)[max(1, round(share * len(hashes))) - 1]
    if limit == max(hashes):
        raise InputError(f"data: {table.name!r} has too few different rows to hold some out; set data.eval_source")
    held = [i for i, value in enumerate(hashes) if value <= limit]
    return [i for i, value in enumerate(hashes) if value > limit], held


def subset(table: Table, chosen: list[int]) -> Table:
    """Some rows of a table."""
    return Table(table.name, [table.rows[i] for i in chosen], [table.places[i] for i in chosen])


def hash_of(row: Row, salt: str = "") -> int:
    """64 bits of a row's content."""
    text = salt + json.dumps(row, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def fingerprint(tables: list[Table]) -> str:
    """SHA-256 (hexadecimal) of the content of tables, in their order."""
    digest = hashlib.sha256()
    for table in tables:
        for row in table.rows:
            digest.update(hash_of(row).to_bytes(8, "little"))
        digest.update(b"|")
    return digest.hexdigest()
