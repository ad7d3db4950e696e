"""apply the seed log of a forward-only run to its base model, and write the trained model

LOG holds which directions were taken and how far. With the very weights that the run began from it gives the weights that it ended
with, bit for bit on the same kind of device. Nothing is written unless log and model fit.
"""

import argparse
import sys
import time
from pathlib import Path

from tare.cli import flags
from tare.cli.output import console, emit, only_json
from tare.core.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("log", metavar="LOG", nargs="?", help="the seed log of a run")
    group = parser.add_argument_group("replay")
    group.add_argument("--model", metavar="BASE", dest="base", help="the transformers folder that the run began from")
    group.add_argument("--out", metavar="DIR", dest="folder", help="where the trained model goes; new or empty")
    group.add_argument("--steps", metavar="N", dest="first", help="only the first N steps; all if left out")
    flags.add_one(group, "--device")
    for name in ("--quantize", "--adapter", "--seed"):
        flags.add_one(group, name)
    flags.add_switches(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    for name, value in (("LOG", args.log), ("--model", args.base), ("--out", args.folder)):
        if value is None:
            raise InputError(f"{name}: missing; tare replay LOG --model BASE --out DIR")
    if args.first is not None and not args.first.isdigit():
        raise InputError(f"--steps: expected a whole number, got {args.first!r}")
    from tare.train.configfile import build

    given = build(args.settings)
    began = time.monotonic()
    with only_json(args.json):
        from tare.train.quantize import Quantization
        from tare.train.replaying import replay_folder
        from tare.train.session import device_of

        quantize = None if given.model.quantize is None else Quantization.parse(given.model.quantize)

        done = replay_folder(
            Path(args.log).expanduser(), Path(args.base).expanduser(), Path(args.folder).expanduser(),
            steps=None if args.first is None else int(args.first), device=device_of(given.run.device), progress=_Line(), quantize=quantize,
            adapter=given.adapter, seed=given.run.seed,
        )  # fmt: skip
    document = {
        "log": str(args.log),
        "model": str(args.base),
        "out": str(done.out),
        "method": done.log.header["method"],
        "steps": done.steps,
        "log_bytes": done.log.bytes,
        "torn_bytes": done.log.torn,
        "exact": done.exact,
        "seconds": round(time.monotonic() - began, 3),
    }
    if done.log.torn:
        print(f"tare: warning: {args.log}: {done.log.torn} bytes of an unfinished step were left out", file=sys.stderr)
    if done.exact is False:
        print(
            "tare: warning: the result differs in bits from the trained model; replay on the kind of device that it was trained on",
            file=sys.stderr,
        )
    if args.json:
        emit(document)
    else:
        said = {True: ", bit for bit the trained model", False: ", not bit for bit the trained model", None: ""}[
            done.exact
        ]
        console().print(
            f"{done.steps:,} steps of {args.log} ({done.log.bytes:,} bytes) -> {done.out}{said}", soft_wrap=True
        )
    return 0


class _Line:
    """Progress on stderr: one line that changes, on a terminal only."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._last = 0.0

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if self._shown and (now - self._last > 0.1 or done == of):
            self._last = now
            print(f"\rreplaying: {done:,} of {of:,} steps", end="\n" if done == of else "", file=sys.stderr, flush=True)
