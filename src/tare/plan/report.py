"""A plan for eyes (a `rich` table: one unit for all sizes, the event of the peak, what fits) and for programs (JSON)."""

import dataclasses
from typing import TYPE_CHECKING, Any

from tare.plan.budget import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from tare.plan.api import Plan

PARTS = ("weights", "gradients", "state", "activations", "temporaries", "peak")


def show(plan: "Plan") -> "RenderableType":
    """The table with its heading, what stands against single methods, and the advice if nothing fits."""
    from rich.console import Group
    from rich.text import Text

    unit, _ = _unit(plan)
    lines: list[RenderableType] = [Text(heading(plan), style="bold"), Text(), table(plan), Text()]
    lines += [Text(f"{row.method}: {row.note}") for row in plan.rows if row.note]
    lines += [Text(f"{remark}.") for remark in dict.fromkeys(row.remark for row in plan.rows) if remark]
    lines.append(
        Text(f"{unit} of tensors at the moment of the peak; state is exact. A device's own needs come on top.")
    )
    if plan.advice is not None:
        assert plan.budget is not None
        lines.append(Text(f"Nothing fits {format_bytes(plan.budget)}; {plan.advice.text}.", style="bold"))
    return Group(*lines)


def heading(plan: "Plan") -> str:
    """The settings in one line."""
    s = plan.settings
    words = [s.name, f"batch {s.batch}", f"seq {s.seq}", s.precision]
    words += [f"accumulate {s.accumulate}"] if s.accumulate > 1 else []
    words += ["checkpointing"] if s.checkpointing else []
    words += ["release" + (f", {s.clip_mode} clipping" if s.clip_mode != "exact" else "")] if s.release else []
    words += [f"budget {format_bytes(plan.budget)}"] if plan.budget is not None else []
    return ", ".join(words)


def table(plan: "Plan") -> "Table":
    """A line per method: the parts of its peak in one unit, the event at which it occurs, whether it fits."""
    from rich import box
    from rich.table import Table

    unit, size = _unit(plan)

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    found.add_column(unit, no_wrap=True)
    for name in PARTS:
        found.add_column(name, justify="right", no_wrap=True, style="bold" if name == "peak" else None)
    found.add_column("at", no_wrap=True)
    if plan.budget is not None:
        found.add_column("fits", no_wrap=True)
    for row in plan.rows:
        sizes = (
            f"{getattr(row, name) / size:,.2f}" if size > 2**20 else f"{getattr(row, name) / size:,.1f}"
            for name in PARTS
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
    names = ("batch", "seq", "dtype", "precision", "checkpointing", "release", "accumulate", "clip_mode")
    return {
        "model": s.name,
        **{name: getattr(s, name) for name in names},
        "budget": plan.budget,
        "rows": [{**dataclasses.asdict(row), "options": _plain(row.options)} for row in plan.rows],
        "advice": dataclasses.asdict(plan.advice) if plan.advice else None,
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    simple = (str, int, float, bool, type(None), list, tuple)
    return {name: value if isinstance(value, simple) else str(value) for name, value in options.items()}
