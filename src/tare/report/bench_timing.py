"""How `tare bench step` measures: interleaved rounds, ratios within a round, allocator events, refreshes apart, a whole staggered period.

One ratio from one run says nothing on a shared machine: the bar is run before and after every step that is compared with it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tare.plan.measure import StepMeter
from tare.report.bench_rows import Contender

WARM_UP = 3  # steps before anything is timed: first touch of state, compilers, first bases


def milliseconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"q1": values[0], "median": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


@contextmanager
def no_collector() -> Iterator[None]:
    """Python's garbage collector out of the way."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def warm_up(contender: Contender) -> None:
    contender.first_ms = milliseconds(contender.step)
    for _ in range(WARM_UP - 1):
        contender.step()


def rounds(bar: Contender, others: list[Contender], count: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times of every contender in `count` rounds; each of its steps stands between two of the bar.

    The order rotates from round to round, so that nobody always follows the same neighbour. The first entry is the bar's.
    """
    found: dict[int, dict[str, Any]] = {id(c): {"ms": [], "bar_ms": []} for c in others}
    bars: list[float] = []
    with no_collector():
        for number in range(count):
            note(f"round {number + 1} of {count}")
            turn = number % max(1, len(others))
            before = milliseconds(bar.step)
            bars.append(before)
            for contender in others[turn:] + others[:turn]:
                own = milliseconds(contender.step)
                after = milliseconds(bar.step)
                bars.append(after)
                found[id(contender)]["ms"].append(own)
                found[id(contender)]["bar_ms"].append((before + after) / 2)
                before = after
    rows: list[dict[str, Any]] = [{"ms": bars, "bar_ms": bars}, *(found[id(c)] for c in others)]
    for row in rows:
        row["ratios"] = [a / b for a, b in zip(row["ms"], row["bar_ms"], strict=True)]
        row["ratio"] = spread(row["ratios"])
        row["ms_median"] = statistics.median(row["ms"])
    return rows


def temporaries(model: nn.Module, contender: Contender) -> int:
    """The most bytes that one step holds beyond what exists before it, by the allocator's own events."""
    optimizer = contender.optimizer if contender.spec.kind == "tare" else None
    with StepMeter(model, optimizer) as meter:
        contender.step()
    return meter.peak - meter.baseline


def refresh(bar: Contender, contender: Contender, period: int, count: int) -> dict[str, Any]:
    """What a refresh of all matrices in one step costs: refresh step, ordinary step and bar, `count` times."""
    found: dict[str, list[float]] = {"refresh_ms": [], "plain_ms": [], "bar_ms": []}
    with no_collector():
        for number in range(1, count + 1):
            contender.jump(number * period)  # the next update begins a period
            found["refresh_ms"].append(milliseconds(contender.step))
            found["bar_ms"].append(milliseconds(bar.step))
            found["plain_ms"].append(milliseconds(contender.step))
    extra = [(a - b) for a, b in zip(found["refresh_ms"], found["plain_ms"], strict=True)]
    amortised = [x / period / b for x, b in zip(extra, found["bar_ms"], strict=True)]
    spike = [a / b for a, b in zip(found["refresh_ms"], found["plain_ms"], strict=True)]
    return {**found, "extra_ms": spread(extra), "amortised_ratio": spread(amortised), "spike": spread(spike)}


def staggered(bar: Contender, contender: Contender, period: int) -> dict[str, Any]:
    """Every step of one period, with the bar between as a witness of the machine's own spikes."""
    own, bars = [], []
    with no_collector():
        for _ in range(period):
            own.append(milliseconds(contender.step))
            bars.append(milliseconds(bar.step))
    return {"first_ms": contender.first_ms, "steps_ms": own, "bar_ms": bars, **_worst(own), "bar": _worst(bars)}


def _worst(values: list[float]) -> dict[str, float]:
    median = statistics.median(values)
    return {
        "median_ms": median,
        "mean_ms": statistics.fmean(values),
        "worst_ms": max(values),
        "worst_over_median": max(values) / median,
        "steps_over_twice_median": sum(value > 2 * median for value in values),
    }


def bandwidth(mebibytes: int = 256) -> dict[str, float]:
    """GB/s of a plain copy (8 bytes an element) and of an update in place (also 8), median of seven, this thread count."""
    source = torch.ones(mebibytes << 18)
    target = torch.zeros_like(source)
    found = {}
    for name, work in {"copy": lambda: target.copy_(source), "in_place": lambda: target.mul_(1.0)}.items():
        work()
        found[name] = 8 * source.numel() / statistics.median(milliseconds(work) for _ in range(7)) / 1e6
    return found
