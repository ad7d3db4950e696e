"""A plan for eyes (a `rich` table) and for programs (JSON)."""

import dataclasses
from typing import TYPE_CHECKING, Any

from tare.plan.budget import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from tare.plan.api import Plan


def table(plan: "Plan") -> "Table":
    """A line per method: the parts of its peak, the event at which it occurs, whether it fits."""
    from rich.table import Table

    grid = Table(title=title(plan), title_justify="left", caption=caption(plan), caption_justify="left")
    grid.add_column("method", no_wrap=True)
    for name in ("weights", "gradients", "state", "activations", "temporaries", "peak"):
        grid.add_column(name, justify="right", no_wrap=True, style="bold" if name == "peak" else "")
    grid.add_column("at")
    if plan.budget is not None:
        grid.add_column("fits", justify="center")
    grid.add_column("rank", justify="right")
    for row in plan.rows:
        parts = (row.weights, row.gradients, row.state, row.activations, row.temporaries, row.peak)
        fits = [] if plan.budget is None else ["[green]yes[/]" if row.fits else f"[red]no[/] {row.note}".rstrip()]
        rank = str(row.options.get("rank", "-"))
        grid.add_row(row.method, *(format_bytes(part) for part in parts), row.event, *fits, rank)
    return grid


def title(plan: "Plan") -> str:
    """The settings in one line."""
    s = plan.settings
    words = [s.name, f"batch {s.batch}", f"seq {s.seq}", s.precision]
    words += [f"accumulate {s.accumulate}"] if s.accumulate > 1 else []
    words += ["checkpointing"] if s.checkpointing else []
    words += ["release"] if s.release else []
    words += [f"budget {format_bytes(plan.budget)}"] if plan.budget is not None else []
    return ", ".join(words)


def caption(plan: "Plan") -> str:
    """What the figures are, and what to change if nothing fits."""
    basis = "The parts are those at the peak, by the event in which it occurs; bytes of tensors."
    return basis if plan.advice is None else f"Nothing fits; {plan.advice.text}.\n{basis}"


def to_json(plan: "Plan") -> dict[str, Any]:
    """Plain JSON values."""
    s = plan.settings
    names = ("batch", "seq", "dtype", "precision", "checkpointing", "release", "accumulate")
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
