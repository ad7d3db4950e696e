"""A command line inside this process: what it printed, how it ended, what it left."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tare.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def call(*argv: str) -> Outcome:
    """Runs `tare` with the arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """`main` sets environment variables and the warning hook for its process; tests share one."""
    environment, hook = dict(os.environ), warnings.showwarning
    yield
    os.environ.clear()
    os.environ.update(environment)
    warnings.showwarning = hook


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all tests of the command, so that the corpus is tokenized once."""
    place = tmp_path_factory.mktemp("cache")
    before = os.environ.get("TARE_CACHE")
    os.environ["TARE_CACHE"] = str(place)
    yield place
    os.environ.pop("TARE_CACHE")
    if before is not None:
        os.environ["TARE_CACHE"] = before


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text to train on: a few documents with structure that can be learned."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        lines = (f"{number} times {other} is {number * other}." for other in range(200))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
