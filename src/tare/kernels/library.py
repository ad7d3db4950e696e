"""The one loaded library of native kernels: its C interface, when it is built, and why there is none.

Built on the first call that needs it; tested against the plain twins before anything else sees it.
"""

import ctypes
import os
import threading
from pathlib import Path

from tare.kernels import blockwise, build, fourbit

SOURCE = Path(__file__).with_name("native.cpp")
_INTERFACE = 1


class Noise(ctypes.Structure):
    """How a bf16 weight is rounded: the hashed key, whether it counts (else to nearest), low word of the first index."""

    _fields_ = [("base", ctypes.c_uint32), ("on", ctypes.c_int), ("index", ctypes.c_uint32)]


class Step(ctypes.Structure):
    """The numbers of one step, as native.cpp lays them out."""

    _fields_ = [(x, ctypes.c_float) for x in ("beta1", "rest1", "beta2", "rest2", "decay", "alpha", "eps")] + [
        ("noise", Noise)
    ]


class Rates(ctypes.Structure):
    """A step whose moments are rounded stochastically as well."""

    _fields_ = [("step", Step), ("first", Noise), ("second", Noise)]


class Light(ctypes.Structure):
    """The numbers of one step of a rule of `native_light`, as light.hpp lays them out; up to four moments."""

    _fields_ = [
        *((f"{x}{i}", ctypes.c_float) for i in (1, 2, 3) for x in ("beta", "rest")),
        *((x, ctypes.c_float) for x in ("eps", "mix", "width", "factor", "decay", "alpha")),
        ("weight", Noise),
        ("moments", Noise * 4),
    ]


class Directions(ctypes.Structure):
    """The numbers of one write of random directions, as directions.hpp lays them out."""

    _fields_ = [*((x, ctypes.c_double) for x in ("decay", "alpha", "scale")), ("noise", Noise)]


_lock = threading.Lock()
_trial = threading.local()  # the library that this thread is testing; nobody else sees it before it has passed
_library: ctypes.CDLL | None = None
_reason: str | None = None  # None until the first attempt


def _declare(library: ctypes.CDLL) -> None:
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    step = ctypes.POINTER(Step)
    for name, arguments in {
        "tare_tables": [p, p, p, p],
        "tare_adamw": [p, i, p, i, p, p, p, p, n, i, i, step],
        "tare_lion": [p, i, p, i, p, p, n, i, i, step],
        "tare_write": [p, p, n, i, step],
        "tare_encode": [p, i, p, p, n, i, i, i],
        "tare_decode": [p, p, p, n, i, i, i],
        "tare_tables4": [p, p, p, p],
        "tare_adamw4": [p, i, p, i, p, p, p, p, n, i, i, step],
        "tare_lion4": [p, i, p, i, p, p, n, i, i, step],
        "tare_encode4": [p, i, p, p, n, i, i, i],
        "tare_adamw16": [p, i, p, p, i, p, p, i, n, i, ctypes.POINTER(Rates)],
        "tare_write_split": [p, p, p, n, i, step],
        "tare_light": [i, p, i, p, p, i, p, i, i, n, i, ctypes.POINTER(Light)],
        "tare_decode4": [p, p, p, n, i, i, i],
        "tare_squares": [p, i, n, n, i, p, i],
        "tare_project": [p, i, p, n, n, i, p, p, i],
        "tare_inner": [p, p, n, n, i, p, p, i],
        "tare_sinkhorn": [p, n, n, i, p, i],
        "tare_mirror": [p, n, i],
        "tare_groups_step": [p, p, p, p, n, i, i, i, step],
        "tare_groups_decode": [p, i, p, p, p, p, i, n, i, i],
        "tare_directions": [
            i,
            p,
            p,
            i,
            p,
            p,
            p,
            i,
            n,
            ctypes.c_uint32,
            i,
            ctypes.POINTER(Directions),
            p,
            ctypes.c_double,
        ],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None


def accept(library: ctypes.CDLL) -> str | None:
    """None when a freshly loaded library passes the self-test; else one line that says why not."""
    from tare.kernels import selftest  # it calls the kernels, which come back here for the library on trial

    try:
        if library.tare_interface() != _INTERFACE:
            return "the compiled library has another interface"
        _declare(library)
    except AttributeError as error:
        return f"the compiled library lacks {error}"
    tables = [
        (ctypes.c_float * 256)(*x(s)) for s in (False, True) for x in (blockwise.map_values, blockwise.map_thresholds)
    ]
    library.tare_tables(*tables)
    tables4 = [
        (ctypes.c_float * 16)(*x(s)) for s in (False, True) for x in (fourbit.map_values, fourbit.map_thresholds)
    ]
    library.tare_tables4(*tables4)
    _trial.library = library
    try:
        return selftest.objection()
    finally:
        _trial.library = None


def load() -> ctypes.CDLL | None:
    """The library, built on the first call; None when there is none or when it is turned off. Never raises."""
    global _library, _reason
    on_trial: ctypes.CDLL | None = getattr(_trial, "library", None)
    if on_trial is not None:
        return on_trial
    if os.environ.get("TARE_NATIVE", "1") == "0":
        return None
    if _reason is None:
        with _lock:
            if _reason is None:
                try:
                    _library = build.library(SOURCE, accept)
                    threads = "threads" if _library.tare_threaded() else "one thread"
                    _reason = f"C++ kernels in use ({_library.tare_lanes()} lanes, {threads})"
                except build.Unavailable as error:
                    _reason = f"plain torch kernels: {error}"
                except Exception as error:  # a kernel that cannot be had must never stop a run
                    _reason = f"plain torch kernels: {type(error).__name__}: {error}".splitlines()[0]
    return _library


def available() -> bool:
    """Whether native calls are taken. Compiles on the first call (about two seconds, once for a machine)."""
    return load() is not None


def reason() -> str:
    """One line for people: what runs, and if it is the plain twins, why. Compiles on the first call."""
    if os.environ.get("TARE_NATIVE", "1") == "0":
        return "plain torch kernels: TARE_NATIVE=0"
    load()
    return _reason or "plain torch kernels"
