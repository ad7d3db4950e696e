"""measure: `step` times the optimizer step against torch and others; `quality` trains with each method; `soak` trains for long

One JSON document holds every round or run; the tables in README and docs are made from such files.
"""

import argparse

from tare.core.errors import InputError

RUN_FLAGS = (
    "--model", "--tokenizer", "--data", "--eval-data", "--steps", "--batch", "--accumulate", "--seq", "--schedule", "--warmup",
    "--clip", "--seed", "--device", "--threads",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmarks, each with its arguments."""
    from tare.cli import flags
    from tare.cli.parser import Parser
    from tare.report import bench_quality, bench_step, soak

    class Part(Parser):
        """The parser of one benchmark; argparse makes it."""

        def __init__(self, prog: str, **rest: str) -> None:
            super().__init__(prog.removeprefix("tare "), rest.get("description", ""))

    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=Part)
    step = parts.add_parser("step", help="the optimizer step alone", description=_first_line(bench_step))
    bench_step.add_arguments(step)
    quality = parts.add_parser("quality", help="losses after equal tokens", description=_first_line(bench_quality))
    group = quality.add_argument_group("every run")
    for name in RUN_FLAGS:
        flags.add_one(group, name)
    bench_quality.add_arguments(quality)
    long = parts.add_parser("soak", help="a long run that must not grow", description=_first_line(soak))
    group = long.add_argument_group("the run")
    for name in (*RUN_FLAGS, "--method", "--lr", "--rank", "--release", "--checkpoint-every", "--eval-every"):
        flags.add_one(group, name)
    soak.add_arguments(long)
    for part in (step, quality, long):
        flags.add_switches(part)


def _first_line(module: object) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from tare.report import bench_quality, bench_step, soak

    if args.what == "quality":
        return bench_quality.run_parsed(args)
    if args.what == "soak":
        return soak.run_parsed(args)
    if args.settings:
        raise InputError(f"{args.settings[0].where}: no setting of tare bench step; see tare bench step --help")
    return bench_step.run_parsed(args)
