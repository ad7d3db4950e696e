"""How `tare bench step` measures: interleaved rounds, ratios within a round, allocator events, refreshes apart, a whole staggered period.

One ratio from one run says nothing on a shared machine: the bar is run before and after every step that is compared with it, and
samples during which other processes took the cores are repeated for a while.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tare.plan.measure import StepMeter
from tare.report.bench_rows import Contender

DISTURBED = 0.15  # share of our threads' time taken by others above which a sample is repeated
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


class Witness:
    """How much of this process' threads' time other processes took since it was made, on Linux; else always 0.

    0 where the cores that are left over were enough for them, 1 where they took as much time as all our threads have.
    """

    def __init__(self) -> None:
        self._machine, self._own, self._wall = _machine_seconds(), time.process_time(), time.perf_counter()

    def disturbance(self) -> float:
        elapsed = time.perf_counter() - self._wall
        others = (_machine_seconds() - self._machine - (time.process_time() - self._own)) / max(elapsed, 1e-9)
        threads = torch.get_num_threads()
        return max(0.0, others - max(0, (os.cpu_count() or 1) - threads)) / threads


def _machine_seconds() -> float:
    """CPU seconds that all processes have used since boot, and those that a hypervisor took."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return time.process_time()
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting


class Patience:
    """Seconds left for repeating samples that other processes disturbed. Which to repeat never depends on its time."""

    def __init__(self, seconds: float) -> None:
        self.left, self.repeated, self.kept = seconds, 0, 0

    def again(self, disturbance: float, seconds: float) -> bool:
        """Whether a sample that took so long is to be thrown away. Waits a little before the next."""
        if disturbance <= DISTURBED:
            return False
        if self.left <= 0:
            self.kept += 1
            return False
        pause = 0.25
        time.sleep(pause)
        self.left -= seconds + pause
        self.repeated += 1
        return True

    def sample(self, *steps: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> list[float]:
        """Milliseconds of each step, made one after another; repeated while disturbed and patience lasts."""
        while True:
            prepare()
            witness = Witness()
            found = [milliseconds(step) for step in steps]
            if not self.again(witness.disturbance(), sum(found) / 1e3):
                return found

    def to_json(self) -> dict[str, float]:
        return {"limit": DISTURBED, "repeated": self.repeated, "kept": self.kept}


def rounds(
    bar: Contender, others: list[Contender], count: int, patience: Patience, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Times of every contender in `count` rounds; each of its steps stands between two of the bar.

    The order rotates from round to round, so that nobody always follows the same neighbour. The first entry is the bar's.
    """
    found: dict[int, dict[str, Any]] = {id(c): {"ms": [], "bar_ms": []} for c in others}
    bars: list[float] = []
    with no_collector():
        for number in range(count):
            note(f"round {number + 1} of {count}")
            turn = number % max(1, len(others))
            for contender in others[turn:] + others[:turn]:
                before, own, after = patience.sample(bar.step, contender.step, bar.step)
                bars += [before, after]
                found[id(contender)]["ms"].append(own)
                found[id(contender)]["bar_ms"].append((before + after) / 2)
            if not others:
                bars += patience.sample(bar.step)
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


def refresh(bar: Contender, contender: Contender, period: int, count: int, patience: Patience) -> dict[str, Any]:
    """What a refresh of all matrices in one step costs: refresh step, ordinary step and bar, `count` times."""
    found: dict[str, list[float]] = {"refresh_ms": [], "bar_ms": [], "plain_ms": []}
    with no_collector():
        periods = iter(range(1, 1 << 30))

        def begin() -> None:
            contender.jump(next(periods) * period)  # the next update begins a period

        for _ in range(count):
            steps = (contender.step, bar.step, contender.step)
            for name, value in zip(found, patience.sample(*steps, prepare=begin), strict=True):
                found[name].append(value)
    extra = [(a - b) for a, b in zip(found["refresh_ms"], found["plain_ms"], strict=True)]
    amortised = [x / period / b for x, b in zip(extra, found["bar_ms"], strict=True)]
    spike = [a / b for a, b in zip(found["refresh_ms"], found["plain_ms"], strict=True)]
    return {**found, "extra_ms": spread(extra), "amortised_ratio": spread(amortised), "spike": spread(spike)}


def staggered(bar: Contender, contender: Contender, period: int) -> dict[str, Any]:
    """Every step of one period, with the bar between as a witness of the machine's own spikes."""
    own, bars = [], []
    witness = Witness()
    with no_collector():
        for _ in range(period):
            own.append(milliseconds(contender.step))
            bars.append(milliseconds(bar.step))
    found = {"first_ms": contender.first_ms, "steps_ms": own, "bar_ms": bars, "disturbance": witness.disturbance()}
    return {**found, **_worst(own), "bar": _worst(bars)}


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
