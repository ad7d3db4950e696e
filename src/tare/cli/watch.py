"""Progress on stderr while a command trains: what will be done and needed first, then one live line."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tare.train.config import RunConfig

if TYPE_CHECKING:
    from tare.train.progress import Event

PATIENCE = 5.0  # seconds


@contextmanager
def watching(config: RunConfig) -> "Iterator[Callable[[Event], None]]":
    """Gives the listener to hand to `train` or `compare`.

    Where stderr is no terminal, work before the first step is told of only when it takes a while: so the one line that
    says why a run cannot start stands alone.
    """
    from tare.cli.output import console
    from tare.report.compare import MethodBegins
    from tare.train.progress import Note, RichProgress, Started, Working

    with RichProgress(console(sys.stderr)) as show:
        began = time.monotonic()

        def listen(event: "Event") -> None:
            if isinstance(event, MethodBegins):
                show.label = f"{event.method} ({event.number}/{event.count}): "
                return
            quiet = not show.console.is_terminal and time.monotonic() - began < PATIENCE
            if isinstance(event, Working) and quiet:
                return
            if isinstance(event, Started):
                for line in summary(config, event.predicted):
                    show(Note(line))
            show(event)

        yield listen


def summary(config: RunConfig, predicted: dict[str, int]) -> list[str]:
    """What a run will do and need, in two lines."""
    from tare.plan.budget import format_bytes, parse_bytes
    from tare.report.rows import CATEGORIES

    train, data = config.train, config.data
    micro = f"{train.accumulate} x {train.batch}" if train.accumulate > 1 else f"{train.batch}"
    extras = [train.precision] + ["checkpointing"] * config.model.checkpointing + ["release"] * config.method.release
    lines = [f"data {data.source}, {micro} sequences of {data.seq} tokens per step, {', '.join(extras)}"]
    if "peak" in predicted:
        parts = ", ".join(f"{name} {format_bytes(predicted[name])}" for name in CATEGORIES if predicted.get(name))
        budget = "no budget given"
        if config.run.budget is not None:
            limit = parse_bytes(config.run.budget)
            budget = f"{100 * predicted['peak'] / limit:.0f} % of the budget {format_bytes(limit)}"
        lines.append(f"plan: peak {format_bytes(predicted['peak'])}, {budget} ({parts})")
    return lines
