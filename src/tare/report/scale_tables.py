"""Tables of a plan at many GPUs (`bench/scale.py`): memory of a rank, and what ranks send each other. All of it is computed."""

from collections.abc import Callable
from typing import Any

from tare.report.tables import markdown

GIB = 2**30
Row = dict[str, Any]


def where(row: Row) -> str:
    """The ranks of a row in words."""
    if row["parallel"] == "alone":
        return "1"
    cut = f" {row['shards']} x {row['gpus'] // row['shards']}" if row["parallel"] == "hsdp" else ""
    return f"{row['gpus']:,} {row['parallel']}{cut}"


def places(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by their ranks; whole models need the same on any number of GPUs, so DDP stands there once."""
    found: dict[str, list[Row]] = {}
    once = min((row["gpus"] for row in rows if row["parallel"] == "ddp"), default=0)
    for row in rows:
        if row["parallel"] != "ddp" or row["gpus"] == once:
            found.setdefault(where(row), []).append(row)
    return found


def memory(result: dict[str, Any]) -> str:
    """The peak of the rank that needs most, by method, and its event where that is not backward."""
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    lines = []
    for name, rows in places(result["rows"]).items():
        by = {row["method"]: row for row in rows}
        lines.append([name, *(_peak(by[method]) for method in methods)])
    return markdown(["GPUs", *methods], lines)


def _peak(row: Row) -> str:
    event = "" if row["event"] == "backward" else f" ({row['event']})"
    return row["note"] or f"{row['peak'] / GIB:.1f}{event}"


def parts(result: dict[str, Any]) -> str:
    """What the peak is made of, for the first method."""
    names = ("weights", "gradients", "state", "activations", "temporaries", "gathered", "peak")
    first = result["rows"][0]["method"]
    lines = [
        [name, *(f"{row[part] / GIB:.2f}" for part in names)]
        for name, rows in places(result["rows"]).items()
        for row in rows
        if row["method"] == first
    ]
    return markdown(["GPUs", *names], lines)


def sent(result: dict[str, Any]) -> str:
    """What all methods send in a step, and then what single methods do."""
    lines = []
    for name, rows in _all(result["rows"]).items():
        about: dict[str, list[Row]] = {}
        for row in rows:
            for each in row.get("traffic", ()):
                about.setdefault(repr(each), []).append({**each, "method": row["method"]})
        for alike in about.values():
            each = alike[0]
            who = "all" if len(alike) == len(rows) else ", ".join(one["method"] for one in alike)
            if each["sent"] > GIB / 100:
                lines.append([
                    name, f"{each['collective']} of {each['what']}", who, str(each["count"]), f"{each['bytes'] / GIB:.2f}",
                    f"{each['sent'] / GIB:.2f}", f"{each['seconds'] * 1e3:.0f}",
                ])  # fmt: skip
    return markdown(["GPUs", "what", "methods", "times", "GiB", "GiB over a rank's link", "ms, computed"], lines, 3)


def _all(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(where(row), []).append(row)
    return found


def presets() -> str:
    """The links that have names."""
    from tare.plan.links import PRESETS

    lines = [[f"`{link.name}`", f"{link.speed / 1e9:g}", link.source] for link in PRESETS.values()]
    return markdown(["link", "GB/s, one GPU, one direction", "source"], lines, 3)


VIEWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "scale-memory": memory, "scale-parts": parts, "scale-sent": sent, "scale-links": lambda result: presets()
}  # fmt: skip
