"""How `tare bench step` measures: interleaved rounds, ratios within a round, allocator events, refreshes apart, a whole staggered period.

One ratio from one run says nothing on a shared machine: the bar is run before and after every step that is compared with it, and
samples during which other processes took the cores are repeated for a while.
"""

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tare.core.weights import plain_parts
from tare.plan.measure import StepMeter
from tare.report.bench_rows import Contender

Clock = Callable[[Callable[[], object]], float]
DISTURBED = 0.15  # share of our threads' time taken by others above which a sample is repeated
WARM_UP = 3  # steps before anything is timed: first touch of state, compilers, first bases


def milliseconds(step: Callable[[], object]) -> float:
    """Wall time on the CPU."""
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def cuda_milliseconds(step: Callable[[], object]) -> float:
    """Time between two events on the GPU's stream; what the CPU needs to launch counts where the GPU waits for it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def clock(device: torch.device) -> Clock:
    """How steps are timed on a device."""
    return cuda_milliseconds if device.type == "cuda" else milliseconds


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


class TooSlow(Exception):
    """A step takes longer than a row may."""


def warm_up(contender: Contender, timed: Clock = milliseconds, slowest: float = math.inf) -> None:
    """The first steps. Raises `TooSlow` when the second, which compiles nothing and computes no basis, takes `slowest` seconds, or the
    first ten times that."""
    before = graphs()
    contender.first_ms = timed(contender.step)
    if contender.first_ms > 1e4 * slowest:
        raise TooSlow(f"the first step takes {contender.first_ms / 1e3:.0f} s; --slowest is {slowest:g}")
    for number in range(WARM_UP - 1):
        taken = timed(contender.step)
        if number == 0 and taken > 1e3 * slowest:
            raise TooSlow(f"a step takes {taken / 1e3:.0f} s; --slowest is {slowest:g}")
    contender.graphs = graphs() - before


def graphs() -> int:
    """Graphs that `torch.compile` has made in this process so far, recompilations included."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"].get("unique_graphs", 0)) if dynamo else 0


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

    def __init__(self, seconds: float, timed: Clock = milliseconds) -> None:
        self.left, self.repeated, self.kept, self.timed = seconds, 0, 0, timed

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
            found = [self.timed(step) for step in steps]
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
    found: dict[int, dict[str, Any]] = {id(c): {"ms": [], "bar_ms": [], "recompilations": 0} for c in others}
    bars: list[float] = []
    with no_collector():
        for number in range(count):
            note(f"round {number + 1} of {count}")
            turn = number % max(1, len(others))
            for contender in others[turn:] + others[:turn]:
                compiled = graphs()
                before, own, after = patience.sample(bar.step, contender.step, bar.step)
                found[id(contender)]["recompilations"] += graphs() - compiled
                contender.restore()
                bars += [before, after]
                found[id(contender)]["ms"].append(own)
                found[id(contender)]["bar_ms"].append((before + after) / 2)
            if not others:
                bars += patience.sample(bar.step)
    rows: list[dict[str, Any]] = [{"ms": bars, "bar_ms": bars, "recompilations": 0}, *(found[id(c)] for c in others)]
    for row in rows:
        finish(row)
    return rows


def finish(row: dict[str, Any]) -> None:
    """Fill in what follows from the samples."""
    row["ratios"] = [a / b for a, b in zip(row["ms"], row["bar_ms"], strict=True)]
    row["ratio"] = spread(row["ratios"])
    row["ms_median"] = statistics.median(row["ms"])


def temporaries(model: nn.Module, contender: Contender) -> int:
    """The most bytes that one step holds beyond what exists before it, by the allocator's own events."""
    optimizer = contender.optimizer if contender.spec.kind == "tare" else None
    own = [part for p in contender.weights() for part in plain_parts("", p.detach()).values()]
    with StepMeter(model, optimizer, extra=own) as meter:
        contender.step()
    return meter.peak - meter.baseline


def refresh(bar: Contender, contender: Contender, period: int, count: int, patience: Patience) -> dict[str, Any]:
    """What a refresh of all matrices in one step costs: refresh step, ordinary step and bar, `count` times.

    `refreshed`: whether the leaves noted one; False where the step number does not bring it about.
    """
    found: dict[str, Any] = {"refresh_ms": [], "bar_ms": [], "plain_ms": []}
    counted = contender.refreshed()
    with no_collector():
        periods = iter(range(1000, 1 << 30))  # later than any that was

        def begin() -> None:
            contender.jump(next(periods) * period)  # the next update begins a period

        for _ in range(count):
            steps = (contender.step, bar.step, contender.step)
            for name, value in zip(tuple(found), patience.sample(*steps, prepare=begin), strict=True):
                found[name].append(value)
    extra = [(a - b) for a, b in zip(found["refresh_ms"], found["plain_ms"], strict=True)]
    amortised = [x / period / b for x, b in zip(extra, found["bar_ms"], strict=True)]
    spike = [a / b for a, b in zip(found["refresh_ms"], found["plain_ms"], strict=True)]
    found["refreshed"] = counted is None or contender.refreshed() != counted
    return {**found, "extra_ms": spread(extra), "amortised_ratio": spread(amortised), "spike": spread(spike)}


def staggered(bar: Contender, contender: Contender, steps: int, timed: Clock = milliseconds) -> dict[str, Any]:
    """Consecutive steps, a period of them if there is time, with the bar between as a witness of the machine's own spikes."""
    own, bars = [], []
    witness = Witness()
    with no_collector():
        for _ in range(steps):
            own.append(timed(contender.step))
            bars.append(timed(bar.step))
    found = {"first_ms": contender.first_ms, "steps_ms": own, "bar_ms": bars, "disturbance": witness.disturbance()}
    return {**found, **_worst(own), "bar": _worst(bars)}


def median_of(contender: Contender, count: int, timed: Clock) -> float:
    """Milliseconds of an ordinary step, roughly."""
    return statistics.median(timed(contender.step) for _ in range(count))


def _worst(values: list[float]) -> dict[str, float]:
    median = statistics.median(values)
    return {
        "median_ms": median,
        "mean_ms": statistics.fmean(values),
        "worst_ms": max(values),
        "worst_over_median": max(values) / median,
        "steps_over_twice_median": sum(value > 2 * median for value in values),
    }


def bandwidth(device: torch.device | None = None, mebibytes: int | None = None) -> dict[str, float]:
    """GB/s of a plain copy (8 bytes an element) and of an update in place (also 8), median of seven, this thread count."""
    where = device or torch.device("cpu")
    size = mebibytes or (1024 if where.type == "cuda" else 256)
    source = torch.ones(size << 18, device=where)
    target = torch.zeros_like(source)
    found = {}
    for name, work in {"copy": lambda: target.copy_(source), "in_place": lambda: target.mul_(1.0)}.items():
        work()
        found[name] = 8 * source.numel() / statistics.median(clock(where)(work) for _ in range(7)) / 1e6
    return found


def products(m: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of the product that projects a gradient, [m, n] times [n, r], by the library that our own steps use."""
    from tare.kernels import gemm

    left, right = torch.ones(m, n, dtype=dtype, device=device), torch.ones(n, r, dtype=dtype, device=device)
    out = torch.empty(m, r, dtype=dtype, device=device)
    with gemm.fast_matmul():
        work = lambda: torch.mm(left, right, out=out)  # noqa: E731
        work()
        taken = statistics.median(clock(device)(work) for _ in range(9))
    return 2 * m * n * r / taken / 1e6
