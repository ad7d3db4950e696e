"""Compile one C++ file (and the headers of this folder) into a shared library for the CPU at hand, and keep it in a cache folder.

The folder is `$TARE_CACHE/native`, or `~/.cache/tare/native`. A library's name is the hash of all that decides its content.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

# -fno-math-errno lets a square root be one instruction; products and sums must not be contracted (see native.cpp).
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-w", "-shared", "-fPIC")
CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ())  # the first that compiles, loads and is accepted
COMPILERS = ("g++", "c++", "clang++")
TIMEOUT = 120.0  # seconds; it takes about two


class Unavailable(Exception):
    """No library could be had; the message is one line."""


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    root = os.environ.get("TARE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "tare") / "native"


def find_compiler() -> str:
    """Path of `$CXX` if set, else of the first of g++, c++, clang++ on the path.

    Raises:
        Unavailable: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    raise Unavailable(f"no C++ compiler found (looked for {wanted or ', '.join(COMPILERS)})")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace", check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{Path(command[0]).name} failed: {_line(error)}") from error
    if done.returncode != 0:
        raise Unavailable(f"{Path(command[0]).name} failed: {_line(done.stderr or done.returncode)}")
    return done.stdout


def _line(text: object) -> str:
    """The first telling line of a message."""
    lines = [x.strip() for x in str(text).splitlines() if x.strip()]
    return next((x for x in lines if "error" in x.lower()), lines[0] if lines else "no message")[:200]


def cpu_description() -> str:
    """Model and instruction sets of this CPU: a library built for another one could stop with an illegal instruction."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    kept = ("flags", "Features", "model name", "CPU part", "CPU implementer")
    return platform.machine() + "\n" + "\n".join(sorted({x for x in lines if x.startswith(kept)}))


def _load(path: Path, accept: Callable[[ctypes.CDLL], str | None]) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"cannot load the compiled library: {_line(error)}") from error
    objection = accept(library)
    if objection is not None:
        raise Unavailable(objection)
    return library


def _build(command: list[str], target: Path, accept: Callable[[ctypes.CDLL], str | None]) -> ctypes.CDLL:
    """Compile beside the target, test, rename: whoever looks finds no file or a whole and tested one, however many build at once.

    It is loaded under the temporary name, because the loader hands out what it already has under a name that it knows.
    """
    handle, temporary = tempfile.mkstemp(suffix=".so", prefix=".building-", dir=target.parent)
    os.close(handle)
    try:
        _run([*command, "-o", temporary])
        library = _load(Path(temporary), accept)
        os.replace(temporary, target)
        return library
    finally:
        Path(temporary).unlink(missing_ok=True)


def library(source: Path, accept: Callable[[ctypes.CDLL], str | None]) -> ctypes.CDLL:
    """The compiled and accepted library of one source file; from the cache when it is there.

    With threads (-fopenmp) and for this CPU if that compiles, loads and is accepted, else with less. A cached file that cannot be
    used is built again.

    Args:
        source: one C++ file; it may include the headers of this folder.
        accept: looks at the loaded library; None if it is good, else one line that says why not.

    Returns:
        The library.

    Raises:
        Unavailable: no compiler, or nothing that it made is good; the message is one line.
    """
    compiler = find_compiler()
    version = _run([compiler, "--version"])
    headers = sorted(Path(__file__).parent.glob("*.hpp"))
    text = b"".join(hashlib.sha256(x.read_bytes()).digest() for x in (source, *headers))
    first_reason = ""
    for extra in CHOICES:
        parts = (text, version.encode(), cpu_description().encode(), " ".join((*FLAGS, *extra)).encode())
        name = (
            f"{source.stem}-{hashlib.sha256(b''.join(hashlib.sha256(x).digest() for x in parts)).hexdigest()[:24]}.so"
        )
        try:
            return _from_cache([compiler, *FLAGS, *extra, f"-I{Path(__file__).parent}", str(source)], name, accept)
        except Unavailable as error:
            first_reason = first_reason or str(error)
    raise Unavailable(first_reason)


def _from_cache(command: list[str], name: str, accept: Callable[[ctypes.CDLL], str | None]) -> ctypes.CDLL:
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = folder / name
        if target.exists():
            try:
                return _load(target, accept)
            except Unavailable:
                target.unlink(missing_ok=True)
        return _build(command, target, accept)
    except (OSError, RuntimeError):  # no home, or not writable: build for this process alone
        with tempfile.TemporaryDirectory(prefix="tare-native-") as private:
            return _build(command, Path(private) / name, accept)
