"""What commands share in reading settings and writing results: the resolved configuration, the console, one JSON document."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.core.errors import InputError, nearest
from tare.train.config import RunConfig
from tare.train.configfile import Given, build, read

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100  # where there is no terminal to ask


def resolve(args: argparse.Namespace, extra: list[Given] | None = None, saved: str = "config.yaml") -> RunConfig:
    """The configuration from `--config` and the flags.

    With `--resume` and no `--config` the configuration `saved` in the output folder is the base, so that
    `tare train --resume --out runs/a` is enough; flags win over it.
    """
    settings = [*(extra or []), *args.settings]
    try:
        given = build(settings)
        if getattr(args, "config", None):
            return build(read(args.config), settings)
        base = Path(given.run.out).expanduser() / saved
        if given.run.resume and base.is_file():
            return build(read(base), [*settings, Given("run.out", given.run.out, "--out")])
        if (
            given.run.resume
            and saved == "config.yaml"
            and base.parent.is_dir()
            and all(g.path.startswith("run.") for g in settings)
        ):
            raise InputError(
                f"run.resume: there is no run in {given.run.out}, at most one that ended before it began; start it with the words that it "
                "was started with, and --out; check run.out"
            )
    except InputError as error:
        raise InputError(_as_given(str(error), settings)) from None
    return given


def _as_given(message: str, settings: list[Given]) -> str:
    """What is wrong with a setting under the name by which it was given: `--budget` and not `run.budget`."""
    for given in settings:
        if given.where.startswith("--") and message.startswith(f"{given.path}:"):
            return given.where + message.removeprefix(given.path)
    return message


def console(file: Any = None) -> "Console":
    """A console on stdout (or `file`), 100 columns wide where it is no terminal."""
    from rich.console import Console

    found = Console(file=file, highlight=False)
    return found if found.is_terminal else Console(file=file, highlight=False, width=WIDTH)


@contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """While inside and if `wanted`, whatever is printed to stdout by anyone goes to stderr instead."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def emit(document: Any) -> None:
    """Prints one JSON document on stdout."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def method_list(text: str | None, where: str) -> list[str] | None:
    """The methods in a comma-separated list, each a registered key, none twice; None for None.

    Raises `InputError` that lists all methods if one is unknown.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{where}: expected a comma-separated list of methods, got {text!r}")
    for name in names:
        known_method(name, where)
        if names.count(name) > 1:
            raise InputError(f"{where}: {name!r} is named twice; keep one")
    return names


def known_method(name: str, where: str) -> None:
    """Raises `InputError`, with the nearest name and all names, unless the method is registered."""
    from tare.methods import registry

    keys = list(registry.keys())
    if name not in keys:
        raise InputError(f"{where}: unknown method {name!r}{nearest(name, keys)}; methods: {', '.join(keys)}")
