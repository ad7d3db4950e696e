"""The Triton kernels on a GPU: equal to their twins, time, and share of the copy bandwidth measured beside them.

    python bench/gpu.py [--elements 268435456] [--out bench/results/gpu-kernels.json]

Every kernel is run interleaved with a copy of as many bytes as it moves, so the share does not depend on the moment; medians of rounds.
Without a CUDA device it says so and ends with code 2. The equality checks are `tests/kernels/triton_cases.py`, run here first.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tare.kernels import blockwise, fourbit
from tare.kernels.triton import dense, dispatch, eightbit, products
from tare.kernels.triton import fourbit as fourbit_kernels
from tare.report.provenance import commit, device

FP32, BF16 = torch.float32, torch.bfloat16
RATES: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "decay": 0.9999, "alpha": 1e-4}
DEVICE, MATRIX = "cuda", (4096, 11008)  # a 7B model's largest linear layer
CASES = Path(__file__).parents[1] / "tests" / "kernels" / "triton_cases.py"


@dataclass
class Row:
    """One kernel: what to call, the bytes that it must move at least, the flops of its products."""

    name: str
    call: Callable[[], Any]
    bytes: int
    elements: int
    flops: int = 0


def states(codec: Any, n: int, *signs: bool) -> list[Tensor]:
    """Encoded zeros; nothing of size n is made on the host."""
    found = []
    for signed in signs:
        zero = codec.zero_code(signed) if codec is blockwise else codec.zero_byte(signed)
        width = n if codec is blockwise else -(-n // 2)
        found += [torch.full((width,), zero, dtype=torch.uint8, device=DEVICE)]
        found += [torch.zeros(blockwise.absmax_numel(n, codec.BLOCK), device=DEVICE)]
    return found


def moved(*tensors: tuple[Tensor, int]) -> int:
    """Bytes of tensors read and written so many times."""
    return sum(t.numel() * t.element_size() * times for t, times in tensors)


def rows(n: int) -> list[Row]:
    """All kernels on n elements, weights and gradients in bf16 and in fp32; products on one 7B-sized matrix."""
    found: list[Row] = []
    for dtype in (BF16, FP32):
        name, key = str(dtype).removeprefix("torch."), 3 if dtype is BF16 else None
        w, g = torch.zeros(n, dtype=dtype, device=DEVICE), torch.randn(n, device=DEVICE).to(dtype)
        for label, codec, step in (
            ("adamw-8bit", blockwise, eightbit.adamw8bit_), ("adamw-4bit", fourbit, fourbit_kernels.adamw4bit_)
        ):  # fmt: skip
            s = states(codec, n, True, False)
            total = moved((w, 2), (g, 1), *((x, 2) for x in s))
            found.append(Row(f"{label} {name}", _bind(step, w, g, *s, **RATES, eps=1e-8, key=key), total, n))
        s = states(blockwise, n, True)
        call = _bind(eightbit.lion8bit_, w, g, *s, **RATES, key=key)
        found.append(Row(f"lion-8bit {name}", call, moved((w, 2), (g, 1), *((x, 2) for x in s)), n))
        for moment, keys in ((FP32, None), (BF16, (1, 2))):
            m, v = (torch.zeros(n, dtype=moment, device=DEVICE) for _ in range(2))
            call = _bind(dense.adamw16_, w, g, m, v, **RATES, eps=1e-8, key=key, keys=keys)
            label = f"adamw {name}, moments {str(moment).removeprefix('torch.')}"
            found.append(Row(label, call, moved((w, 2), (g, 1), (m, 2), (v, 2)), n))
        low = torch.zeros(n, dtype=torch.int8, device=DEVICE) if dtype is BF16 else None
        call = _bind(dense.write_, w, g, decay=0.999, alpha=1e-3, key=key)
        found.append(Row(f"write {name}" + ("" if key is None else ", stochastic"), call, moved((w, 2), (g, 1)), n))
        if low is not None:
            call = _bind(dense.write_, w, g, decay=0.999, alpha=1e-3, low=low)
            found.append(Row("write split24", call, moved((w, 2), (g, 1), (low, 2)), n))
        a, b = w[: n // 4096 * 4096].view(-1, 4096), g[: n // 4096 * 4096].view(-1, 4096)
        for label, phi in (("row", torch.ones(len(a), 1)), ("column", torch.ones(1, 4096)), ("one", torch.ones(()))):
            call = _bind(dense.write_scaled_, a, b, phi.to(DEVICE), decay=1.0, alpha=1e-3, key=key)
            found.append(Row(f"write scaled by {label} {name}", call, moved((a, 2), (b, 1)), a.numel()))
        for r in (128, 1024):
            weight, grad = (x[: math.prod(MATRIX)].view(MATRIX) for x in (w, g))
            basis, small = (torch.randn(s, device=DEVICE).to(dtype) for s in ((MATRIX[0], r), (r, MATRIX[1])))
            flops, out = 2 * r * weight.numel(), r * MATRIX[1] * 4
            call = _bind(products.lift_, weight, basis, small, decay=1.0, alpha=1e-3, key=key)
            total = moved((weight, 2), (basis, 1), (small, 1))
            found.append(Row(f"lift r{r} {name}", call, total, weight.numel(), flops))
            call = _bind(products.project, grad, basis, "left")
            found.append(Row(f"project r{r} {name}", call, moved((grad, 1), (basis, 1)) + out, weight.numel(), flops))
    return found


def _bind(function: Callable[..., Any], *tensors: Any, **how: Any) -> Callable[[], Any]:
    def call() -> Any:
        done = function(*tensors, **how)
        assert done is not False
        assert done is not None
        return done

    return call


def timed(call: Callable[[], Any], repeat: int) -> float:
    """Milliseconds a call, between two events on the device."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeat


def launches(call: Callable[[], Any]) -> int:
    """Kernels on the device in one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as window:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in window.key_averages() if str(event.device_type).endswith("CUDA"))


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Time, bytes a second, and the share of a copy of the same number of bytes, interleaved."""
    source = torch.empty(max(1, row.bytes // 2), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)  # noqa: E731
    for call in (row.call, copy):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row.call()
    torch.cuda.synchronize()
    temporaries = torch.cuda.max_memory_allocated() - before
    taken, ratios = [], []
    for _ in range(rounds):
        ours, theirs = timed(row.call, 5), timed(copy, 5)
        taken.append(ours)
        ratios.append(theirs / ours)
    ms = statistics.median(taken)
    return {
        "kernel": row.name, "elements": row.elements, "bytes_per_element": round(row.bytes / row.elements, 3),
        "ms": ms, "gigabytes_per_second": row.bytes / ms / 1e6, "teraflops": row.flops / ms / 1e9,
        "share_of_copy": statistics.median(ratios), "share_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "launches": launches(row.call), "temporary_bytes": temporaries,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=1 << 28)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--out", default="bench/results/gpu-kernels.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device; the kernels are checked in the interpreter by the tests", file=sys.stderr)
        return 2
    checks = "not run"
    if not args.skip_checks:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", str(CASES)]
        done = subprocess.run(command, capture_output=True, text=True)
        checks = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
        print(checks, file=sys.stderr)
    results = []
    for row in rows(args.elements):
        if args.only in row.name:
            results.append(measure(row, args.rounds))
            r = results[-1]
            print(
                f"{r['kernel']:40s} {r['ms']:8.3f} ms  {r['gigabytes_per_second']:7.0f} GB/s  "
                f"{100 * r['share_of_copy']:5.1f} % of copy  {r['launches']} launches", file=sys.stderr,
            )  # fmt: skip
    sha, changed = commit()
    facts = {
        "command": f"python bench/gpu.py --elements {args.elements} --rounds {args.rounds}", "commit": sha,
        "uncommitted_changes": changed, "date": time.strftime("%Y-%m-%d"), "device": device(),
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "kernels": dispatch.reason(), "checks": checks,
        "rows": results,
    }  # fmt: skip
    Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
