"""What a run tells while it goes: events as plain dataclasses, and a renderer for the terminal.

`train(config, on_event=...)` calls one function with each event; `RichProgress` is such a function. It writes to stderr only: a
live line on a terminal, else a plain line now and then.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tare.plan.budget import format_bytes


@dataclass(frozen=True)
class Event:
    """Something happened in a run."""


@dataclass(frozen=True)
class Note(Event):
    """Something worth a line."""

    text: str


@dataclass(frozen=True)
class Working(Event):
    """What is being done before the first step, told again and again as it goes on."""

    text: str


@dataclass(frozen=True)
class Warned(Event):
    """Something that the user should look at; the run goes on."""

    text: str


@dataclass(frozen=True)
class Started(Event):
    """All is built. `step`: finished steps (after a resume more than 0); `predicted`: bytes by category, if planned."""

    model: str
    method: str
    parameters: int
    step: int
    steps: int
    state_bytes: int
    out: Path
    predicted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step. `memory`: highest bytes so far; `predicted`: the planned peak, or None. `forwards`: forward passes so far of
    a method without gradients; `skipped`: steps so far that were not finite.

    `seconds_left` is None during the first steps, which are measured and so tell little about the others.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float
    memory: int
    predicted: int | None
    seconds_left: float | None
    forwards: int | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Skipped(Event):
    """A step whose loss or gradient was not finite: nothing was changed by it. `streak`: how many in a row."""

    step: int
    reason: str
    streak: int
    limit: int


@dataclass(frozen=True)
class Evaluated(Event):
    """The loss on held-out tokens after `step` steps; of a task, on held-out examples, with `scores` (accuracy, f1) and no perplexity."""

    step: int
    loss: float
    perplexity: float | None
    tokens: int
    scores: dict[str, float] = field(default_factory=dict)
    examples: int = 0


@dataclass(frozen=True)
class Measured(Event):
    """Memory of whole steps as measured, beside what was predicted; bytes by category, `peak` among them."""

    step: int
    measured: dict[str, int]
    predicted: dict[str, int]


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint or the final model is on the disk."""

    step: int
    path: Path


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The silent listener."""


class RichProgress:
    """Shows a run on stderr; use it as a context manager and hand it to `train`.

    Args:
        console: where to write; default: stderr.
        every: seconds between plain lines where there is no terminal.
        label: stands before each line, e.g. the method in a comparison.
    """

    def __init__(self, console: Console | None = None, every: float = 10.0, label: str = "") -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.every, self.label = every, f"{label}: " if label else ""
        self._live: Live | None = None
        self._last = -float("inf")

    def __enter__(self) -> "RichProgress":
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._passing(step_line(event), event.step in (1, event.steps))
        elif isinstance(event, Working):
            self._passing(event.text)
        elif text := describe(event):
            self._print(text, "yellow" if isinstance(event, Warned | Skipped) else "")

    def _passing(self, text: str, always: bool = False) -> None:
        """Text that the next one replaces: on a terminal in place, else as a line if the last one is old enough."""
        now = time.monotonic()
        if self._live is not None:
            self._live.update(Text(self.label + text, no_wrap=True, overflow="ellipsis"))
        elif always or now - self._last >= self.every:
            self._last = now
            self._print(text)

    def _print(self, text: str, style: str = "") -> None:
        # soft_wrap: a log file is not as narrow as the terminal that rich assumes where there is none
        self.console.print(Text(self.label + text, style=style), soft_wrap=True)


def step_line(event: StepDone) -> str:
    """One step as one line of text.

    >>> step_line(StepDone(5, 20, 6.25, 1e-3, 0.5, 1280, 900.0, 1 << 20, 2 << 20, 75.0))
    'step 5/20  loss 6.250  900 tokens/s  memory 1.00 MiB / 2.00 MiB predicted  lr 1.00e-03  1m15s left'
    """
    planned = f" / {format_bytes(event.predicted)} predicted" if event.predicted else ""
    left = f"  {duration(event.seconds_left)} left" if event.seconds_left is not None else ""
    passes = f"  {event.forwards:,} forward passes" if event.forwards is not None else ""
    skipped = f"  {event.skipped} skipped" if event.skipped else ""
    return (
        f"step {event.step}/{event.steps}  loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s  "
        f"memory {format_bytes(event.memory)}{planned}  lr {event.lr:.2e}{passes}{skipped}{left}"
    )


def describe(event: Event) -> str:
    """Any other event as a line of text; empty if it needs none."""
    if isinstance(event, Note | Warned):
        return event.text
    if isinstance(event, Started):
        where = f", from step {event.step}" if event.step else ""
        return (
            f"training {event.model} ({event.parameters:,} parameters) with {event.method} "
            f"({format_bytes(event.state_bytes)} of state) for {event.steps} steps{where} in {event.out}"
        )
    if isinstance(event, Skipped):
        return f"step {event.step}: {event.reason}: skipped ({event.streak} in a row, the run stops at {event.limit})"
    if isinstance(event, Evaluated) and event.scores:
        return (
            f"step {event.step}{' (zero-shot)' if event.step == 0 else ''}: evaluation loss {event.loss:.4f}, "
            f"{scores_line(event.scores)} over {event.examples:,} examples"
        )
    if isinstance(event, Evaluated):
        return f"step {event.step}: evaluation loss {event.loss:.4f}, perplexity {event.perplexity:.2f}"
    if isinstance(event, Measured):
        return f"memory, predicted / measured: {compare(event.predicted, event.measured)}"
    return f"saved {event.path}" if isinstance(event, Saved) and event.path.name == "model" else ""


def scores_line(scores: dict[str, float]) -> str:
    """Scores of a task in words.

    >>> scores_line({"accuracy": 0.9163, "f1": 0.91})
    'accuracy 91.6 %, F1 0.910'
    """
    shown = {"accuracy": lambda x: f"accuracy {100 * x:.1f} %", "f1": lambda x: f"F1 {x:.3f}"}
    return ", ".join(shown[name](value) for name, value in scores.items())


def compare(predicted: dict[str, int], measured: dict[str, int]) -> str:
    """Categories side by side. What comes and goes within a step is measured as a whole, `rest`, and predicted in parts.

    >>> compare({"weights": 4096, "activations": 1024, "peak": 5120}, {"weights": 4096, "rest": 2048, "peak": 6144})
    'weights 4.00 KiB / 4.00 KiB, rest 1.00 KiB (activations 1.00 KiB) / 2.00 KiB, peak 5.00 KiB / 6.00 KiB'
    """
    parts = {key: size for key, size in predicted.items() if key not in measured}
    shown = {key: format_bytes(size) for key, size in predicted.items()}
    if parts:
        names = ", ".join(f"{key} {format_bytes(size)}" for key, size in parts.items() if size)
        shown["rest"] = f"{format_bytes(sum(parts.values()))} ({names})"
    return ", ".join(f"{key} {shown.get(key, '-')} / {format_bytes(size)}" for key, size in measured.items())


def duration(seconds: float) -> str:
    """A time span in words.

    >>> duration(8), duration(75), duration(7322)
    ('8s', '1m15s', '2h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
