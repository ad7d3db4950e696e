"""train with several methods on the same data, tokens and seed, and put the results side by side

Each method runs in its own folder below the output folder; report.html there shows losses and memory.
"""

import argparse
import os
from pathlib import Path

from tare.cli import flags
from tare.cli.output import console, emit, method_list, only_json, resolve
from tare.core.errors import InputError

DEFAULT = "adamw,galore,apollo-mini"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--methods", metavar="KEY,KEY,...", help=f"what is compared [{DEFAULT}]")
    flags.add(parser, without=("--method",))


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = resolve(args, saved="compare.yaml")
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        raise InputError(
            "compare: runs in one process; start it without torchrun (tare train can be shared by workers)"
        )
    if any(given.path == "method.key" for given in args.settings):
        raise InputError("--method.key: a comparison takes --methods KEY,KEY,...")
    from tare.cli.watch import watching
    from tare.report.compare import compare, started
    from tare.report.rows import table

    begun = started(Path(config.run.out).expanduser()) if config.run.resume else None
    asked = args.methods if args.methods is not None else ",".join(begun) if begun else DEFAULT
    methods = method_list(asked, "--methods") or []
    with only_json(args.json), watching(config) as watch:
        comparison = compare(config, methods, watch)
    if args.json:
        emit(comparison.to_json())
    elif comparison.rows:
        out = console()
        out.print(table(comparison.rows))
        out.print()
        for row in comparison.rows:
            if row.note:
                out.print(f"{row.method}: {row.note}", soft_wrap=True)
        out.print(f"report: {comparison.out / 'report.html'}", soft_wrap=True)
        out.print(f"models: {comparison.out}/<method>/model", soft_wrap=True)
    if comparison.interrupted:
        raise KeyboardInterrupt("interrupted; run the same command again with --resume to go on")
    return 0
