"""Markdown tables of README and docs, made from the JSON files in bench/results and from nothing else."""

import json
from pathlib import Path

from tare.core.errors import InputError


def markdown(header: list[str], rows: list[list[str]], right: int = 1) -> str:
    """A table; columns from `right` on are numbers."""
    rule = ["---"] * right + ["---:"] * (len(header) - right)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def render(name: str, results: Path) -> str:
    """The table called `name`, from `results/<name up to the colon>.json`; a line saying so when not measured yet."""
    from tare.report import bench_tables

    stem, _, view = name.partition("/")
    path = results / f"{stem}.json"
    if not path.exists():
        return f"*not measured yet: no bench/results/{stem}.json*"
    key = view or stem
    if key not in bench_tables.VIEWS:
        raise InputError(f"table: {key!r} is unknown; known: {', '.join(bench_tables.VIEWS)}")
    return bench_tables.VIEWS[key](json.loads(path.read_text(encoding="utf-8")))
