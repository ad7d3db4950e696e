"""measure: `tare bench step` times the optimizer step of every method against torch's fused AdamW and the peers installed

One JSON document holds every round; the tables in README and docs are made from such files.
"""

import argparse

from tare.core.errors import InputError, nearest

WHAT = ("step",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    from tare.report.bench_step import add_arguments

    parser.add_argument("what", metavar="WHAT", help="what is measured: step")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from tare.report.bench_step import run_parsed

    if args.what not in WHAT:
        raise InputError(f"WHAT: {args.what!r} is no benchmark{nearest(args.what, WHAT)}; known: {', '.join(WHAT)}")
    return run_parsed(args)
