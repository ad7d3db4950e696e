"""A plan for eyes (a `rich` table: one unit for all sizes, the event of the peak, what fits) and for programs (JSON)."""

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from tare.methods import registry
from tare.plan.budget import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

    from tare.plan.api import Plan

PARTS = ("weights", "gradients", "state", "activations", "temporaries", "gathered", "peak")
DROPPED = (
    "temporaries",
    "activations",
    "gradients",
    "weights",
    "gathered",
)  # in this order, where the terminal is narrow


def show(plan: "Plan") -> "RenderableType":
    """The table with its heading, and what there is to say about single methods."""
    from rich.console import Group
    from rich.text import Text

    unit, _ = _unit(plan)
    lines: list[RenderableType] = [Text(heading(plan), style="bold"), Text(), _Fitting(plan), Text()]
    lines += [Text(f"{row.method}: {row.note}") for row in plan.rows if row.note]
    lines += [Text(line) for line in _remarks(plan)]
    lines += [Text(line) for line in of_ranks(plan)]
    rank = " on the rank that needs most" if plan.settings.ranks is not None else ""
    lines.append(
        Text(f"{unit} of tensors at the moment of the peak{rank}; state is exact. A device's own needs come on top.")
    )
    return Group(*lines)


def _remarks(plan: "Plan") -> list[str]:
    """Each remark once, with the methods that it is about unless it is about all."""
    about: dict[str, list[str]] = {}
    for row in plan.rows:
        for remark in filter(None, row.remark.split("; ")):
            about.setdefault(remark, []).append(row.method)
    return [
        f"{remark}." if len(methods) == len(plan.rows) else f"{', '.join(methods)}: {remark}."
        for remark, methods in about.items()
    ]


def of_ranks(plan: "Plan") -> list[str]:
    """Where ranks differ, and what they send each other in a step: what all methods send, then what single ones do."""
    ranks, links = plan.settings.ranks, plan.settings.links
    rows = [row for row in plan.rows if row.ranks is not None]
    if ranks is None or not rows:
        return []
    lines, about = [], dict[tuple[Any, ...], list[str]]()
    for row in rows:
        found = row.ranks
        assert found is not None
        if found.first.state != found.worst.state:
            lines.append(
                f"{row.method}: rank {found.worst.rank} keeps {format_bytes(found.worst.state)} of state, rank 0 "
                f"{format_bytes(found.first.state)} (peak {format_bytes(found.first.peak)})."
            )
        for each, time in zip(found.traffic, found.seconds or (None,) * len(found.traffic), strict=True):
            about.setdefault((each, time), []).append(row.method)
    for (each, time), methods in sorted(about.items(), key=lambda both: -len(both[1])):
        who = "" if len(methods) == len(rows) else f"{', '.join(methods)}: "
        took = "" if time is None else f", {format_seconds(time)}"
        times = "once" if each.count == 1 else f"{each.count} times"
        lines.append(
            f"{who}{each.collective} of {each.what}: {times} a step, {format_bytes(each.bytes)}, {format_bytes(each.sent)} over the link "
            f"of a rank{took}."
        )
    if links is not None:
        inner, outer = links
        where = (
            inner.name
            if ranks.gpus <= ranks.node
            else f"{inner.name} within machines of {ranks.node}, {outer.name} between"
        )
        lines.append(
            f"Times are computed from the stated speed of {where}, not measured: without latency, and without what a run hides behind "
            "arithmetic."
        )
    return lines


def format_seconds(value: float) -> str:
    """In a unit that leaves few digits.

    >>> format_seconds(0.0123), format_seconds(4.2e-5), format_seconds(1.5)
    ('12.3 ms', '42.0 us', '1.50 s')
    """
    if value >= 1:
        return f"{value:.2f} s"
    if value < 1e-6:
        return "under 1 us"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def verdict(plan: "Plan") -> list[str]:
    """What fits; if nothing does, the change with which something would, on a line to be copied. For printing without wrapping."""
    if plan.budget is None:
        return []
    budget, advice = format_bytes(plan.budget), plan.advice
    if advice is None:
        fitting = [row.method for row in plan.rows if row.fits]
        auto = f"; --method auto takes {fitting[0]}" if len(plan.rows) == len(registry.keys("gradient")) else ""
        return [f"{len(fitting)} of {len(plan.rows)} fit {budget}{auto}."] if len(plan.rows) > 1 else []
    if not advice.peak:
        return [f"Nothing fits {budget}; {advice.text}."]
    what = "the smallest change that fits" if advice.fits else "the least that is possible"
    return [
        f"Nothing fits {budget}; {what} ({format_bytes(advice.peak)}):",
        f"  --method {advice.method} {advice.flags}".rstrip(),
    ]


class _Fitting:
    """The table, with as many of its columns as there is room for."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.measure import Measurement
        from rich.text import Text

        dropped: tuple[str, ...] = ()
        for count in range(len(DROPPED) + 1):
            dropped = DROPPED[:count]
            found = table(self.plan, dropped)
            if Measurement.get(console, options.update(width=1000, max_width=1000), found).maximum <= options.max_width:
                break
        yield found
        if dropped:
            yield Text(f"No room here for {', '.join(reversed(dropped))}: widen the terminal, or take --json.")


def heading(plan: "Plan") -> str:
    """The settings in one line."""
    s = plan.settings
    words = [s.name, f"batch {s.batch}", f"seq {s.seq}", s.precision]
    if s.ranks is not None:
        cut = f" {s.ranks.shards}x{s.ranks.replicas}" if s.ranks.parallel == "hsdp" else ""
        words[1] = f"batch {s.batch * s.ranks.gpus} ({s.batch} a rank)"
        words.insert(1, f"{s.ranks.gpus} ranks by {s.ranks.parallel}{cut}")
    words += [f"accumulate {s.accumulate}"] if s.accumulate > 1 else []
    words += ["checkpointing"] if s.checkpointing else []
    words += ["release" + (f", {s.clip_mode} clipping" if s.clip_mode != "exact" else "")] if s.release else []
    if s.release and s.accumulate > 1:
        words += ["bases from the first micro-batch"] if s.bases.source == "first" else []
        words += [f"bases in {s.bases.parts} passes"] if s.bases.parts > 1 else []
    words += [f"budget {format_bytes(plan.budget)}"] if plan.budget is not None else []
    return ", ".join(words)


def table(plan: "Plan", without: Collection[str] = ()) -> "Table":
    """A line per method: the parts of its peak in one unit, the event at which it occurs, whether it fits."""
    from rich import box
    from rich.table import Table

    unit, size = _unit(plan)
    cut = any(row.gathered for row in plan.rows)
    parts = [name for name in PARTS if name not in without and (cut or name != "gathered")]

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    found.add_column(unit, no_wrap=True)
    for name in parts:
        found.add_column(name, justify="right", no_wrap=True, style="bold" if name == "peak" else None)
    found.add_column("at", no_wrap=True)
    if plan.budget is not None:
        found.add_column("fits", no_wrap=True)
    for row in plan.rows:
        sizes = (
            f"{getattr(row, name) / size:,.2f}" if size > 2**20 else f"{getattr(row, name) / size:,.1f}"
            for name in parts
        )
        fits = [] if plan.budget is None else ["[green]yes[/]" if row.fits else "[red]no[/]"]
        found.add_row(row.method, *sizes, row.event, *fits)
    return found


def _unit(plan: "Plan") -> tuple[str, int]:
    largest = max((row.peak for row in plan.rows), default=0)
    return ("GiB", 2**30) if largest >= 10 * 2**30 else ("MiB", 2**20)


def to_json(plan: "Plan") -> dict[str, Any]:
    """Plain JSON values."""
    s = plan.settings
    names = ("batch", "seq", "dtype", "precision", "checkpointing", "release", "accumulate", "clip_mode", "clip_parts")
    return {
        "model": s.name,
        **{name: getattr(s, name) for name in names},
        **(
            {}
            if s.ranks is None
            else {"batch": s.batch * s.ranks.gpus, "batch_of_rank": s.batch, "ranks": dataclasses.asdict(s.ranks)}
        ),
        **({} if s.links is None else {"links": [dataclasses.asdict(link) for link in s.links]}),
        "refresh_from": s.bases.source,
        "refresh_parts": s.bases.parts,
        "budget": plan.budget,
        "rows": [{**dataclasses.asdict(row), "options": _plain(row.options)} for row in plan.rows],
        "advice": dataclasses.asdict(plan.advice) if plan.advice else None,
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    simple = (str, int, float, bool, type(None), list, tuple)
    return {name: value if isinstance(value, simple) else str(value) for name, value in options.items()}
