"""Which matrix library our own fp32 products on the CPU go to: a probe at first use, and a scope that applies its result.

On some CPUs (AMD with AVX-512, measured) torch's "medium" precision sends fp32 products to a library that is twice as fast and still
computes in fp32. On CPUs with bf16 tile units the same setting computes in bf16. So it is tried, timed and checked, never assumed.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

SPEEDUP = 1.15  # below this a change of library is not worth a changed rounding
ERROR = 2e-6  # relative, against fp64; fp32 libraries give 2e-7 to 4e-7 on this shape, bf16 about 4e-3
ROUNDS = 7
ENOUGH = 0.03  # seconds after which three rounds must do: on a crowded machine one product can take ten times its time
SHAPE = (512, 512, 128)  # m, k, n: a projection of a small layer; 67 MFLOP, under a millisecond


class _Medium:
    """Sets the precision on entry and restores what it found on exit. Several may be open at once, in one thread."""

    def __init__(self) -> None:
        self._before = "highest"

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_float32_matmul_precision(self._before)


_lock = threading.Lock()
_fast: bool | None = None  # None until probed
_line = ""
_accurate = False  # whether the probe found the faster library as good, if perhaps not faster


def _time(product: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started


def _numbers(rows: int, columns: int, multiplier: int) -> Tensor:
    """Fixed numbers in [-1, 1) of 16 bits each, twice what bf16 holds, without touching any random generator."""
    t = torch.arange(rows * columns, dtype=torch.int32, device="cpu")
    return (
        t.mul_(multiplier)
        .bitwise_right_shift_(8)
        .bitwise_and_(0xFFFF)
        .to(torch.float32)
        .div_(32768)
        .sub_(1)
        .view(rows, columns)
    )


def _probe() -> tuple[bool, bool, str]:
    """Whether "medium" is faster and as good, whether it is as good, and one line. The precision is left as it was."""
    before = torch.get_float32_matmul_precision()  # raises if torch's newer per-library settings are in use
    m, k, n = SHAPE
    a, b = _numbers(m, k, 1664525), _numbers(k, n, 22695477)
    few = a[:: m // 32]  # rows enough to see an error of 1e-3 against 1e-7
    exact = few.double() @ b.double()
    times: dict[str, list[float]] = {"highest": [], "medium": []}
    error = 0.0
    try:
        for setting in times:  # the first product of a library sets it up
            torch.set_float32_matmul_precision(setting)
            found = a @ b
            if setting == "medium":
                error = ((found[:: m // 32].double() - exact).norm() / exact.norm()).item()
        if not error < ERROR:
            return (
                False,
                False,
                f"fp32 products by torch's default library (the alternative has relative error {error:.0e})",
            )
        started = time.perf_counter()
        for done in range(ROUNDS):  # interleaved, because the machine's speed drifts
            if done >= 3 and time.perf_counter() - started > ENOUGH:
                break
            for setting, taken in times.items():
                torch.set_float32_matmul_precision(setting)
                taken.append(_time(lambda: a @ b))
    finally:
        torch.set_float32_matmul_precision(before)
    ratio = statistics.median(times["highest"]) / statistics.median(times["medium"])
    if ratio < SPEEDUP:
        return False, True, f"fp32 products by torch's default library (the alternative is {ratio:.2f} times as fast)"
    return (
        True,
        True,
        f"fp32 products by the faster library ({ratio:.2f} times the default's speed, relative error {error:.0e})",
    )


def _decide() -> bool:
    global _fast, _line, _accurate
    if os.environ.get("TARE_GEMM", "auto") == "plain":
        return False
    if _fast is None:
        if _get_current_dispatch_mode() is not None or torch.compiler.is_compiling():
            return False  # fake tensors and tracers: nothing is computed, and nothing can be timed; ask again later
        with _lock, torch.no_grad():
            if _fast is None:
                try:
                    fast, _accurate, _line = _probe()
                except Exception as failure:  # a probe must never stop a run
                    why = str(failure).partition("\n")[0] or type(failure).__name__
                    fast, _line = False, f"fp32 products by torch's default library ({why})"
                _fast = fast
    return _fast


def fast_matmul() -> AbstractContextManager[None]:
    """A scope in which fp32 products on the CPU run in the fastest library that keeps fp32 accuracy.

    The first call (outside fake tensors) probes for about 20 ms. `TARE_GEMM=plain` in the environment turns it off. The setting is one
    for the whole process, so keep the scope to the products themselves.

    >>> with fast_matmul():
    ...     product = torch.eye(2) @ torch.ones(2, 1)
    """
    if torch.cuda.is_initialized():  # the setting is the process's, and on a GPU it would make fp32 products TF32
        return nullcontext()
    return _Medium() if _decide() else nullcontext()


def decided() -> bool:
    """Whether the faster library is in use. Probes if nothing has yet."""
    return _decide()


def pin(fast: bool) -> bool:
    """Choose again what another process chose, since timing may settle it otherwise: a resumed run keeps its bits.

    Returns:
        Whether that choice now holds; a library that is not accurate here is never taken.
    """
    global _fast
    if _decide() != fast and (_fast or _accurate):
        _fast = fast
    return _decide() == fast


def describe() -> str:
    """One line for people: which library our products use, and why. Probes if nothing has yet."""
    if os.environ.get("TARE_GEMM", "auto") == "plain":
        return "fp32 products by torch's default library (TARE_GEMM=plain)"
    _decide()
    return _line or "fp32 products by torch's default library (not probed yet)"
