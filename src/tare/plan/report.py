"""A plan for eyes (a `rich` table) and for programs (JSON)."""

import dataclasses
from typing import TYPE_CHECKING, Any

from tare.plan.budget import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from tare.plan.api import Plan


def table(plan: "Plan") -> "Table":
    """A line per method: the parts of its peak in one unit, the event at which it occurs, whether it fits."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    unit, scale = _unit(max((row.peak for row in plan.rows), default=0))
    grid = Table(title=title(plan), caption=caption(plan), box=SIMPLE_HEAD, pad_edge=False)
    grid.title_justify = grid.caption_justify = "left"
    grid.add_column("method", no_wrap=True)
    grid.add_column("rank", justify="right")
    for name in ("weights", "grads", "state", "activ.", "temp."):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column(f"peak {unit}", justify="right", no_wrap=True, style="bold")
    grid.add_column("at")
    if plan.budget is not None:
        grid.add_column("fits")
    for row in plan.rows:
        parts = (row.weights, row.gradients, row.state, row.activations, row.temporaries, row.peak)
        fits = [] if plan.budget is None else ["[green]yes[/]" if row.fits else "[red]no[/]"]
        rank = str(row.options.get("rank", "-"))
        cells = [f"{part / scale:.2f}" if part else "0" for part in parts]
        grid.add_row(row.method, rank, *cells, row.note or row.event, *fits)
    return grid


def _unit(size: int) -> tuple[str, int]:
    """The unit in which the largest figure has one to four digits before the point."""
    return ("GiB", 1024**3) if size >= 1024**3 else ("MiB", 1024**2)


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
    basis = "Parts are those at the moment of the peak. Tensors only: a CUDA context and fragmentation come on top."
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
