"""verify a run's folder: what is whole, what is damaged, and how the run can go on

Reads every byte of the checkpoints in RUN and compares it with their checksums; looks at configuration, log, seed log, lock and model.
Changes nothing. Exit code 0: nothing is damaged. 1: something is, and the run can go on. 2: RUN is no run, or nothing can be resumed.
"""

import argparse
from pathlib import Path

from tare.cli import flags
from tare.cli.output import console, emit, only_json
from tare.core.errors import InputError

MARKS = {"whole": "[green]whole[/]", "left": "[yellow]left over[/]", "damaged": "[red]damaged[/]", "note": "note"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="the folder of a run (--out of tare train)")
    flags.add_switches(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.run is None:
        raise InputError("RUN: missing; tare doctor RUN, where RUN is the folder of a run")
    with only_json(args.json):
        from tare.train.doctor import examine

        report = examine(Path(args.run).expanduser())
    if args.json:
        emit(report.to_json())
        return report.code
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in report.findings:
        table.add_row(finding.what or args.run, MARKS[finding.level], finding.text)
    out = console()
    out.print(table)
    out.print()
    out.print(f"{args.run}: {report.verdict}", soft_wrap=True, markup=False)
    if report.command is not None:
        what = "more:   " if report.finished else "resume: "
        later = f" (when {report.process} has ended)" if report.process else ""
        out.print(f"{what}{report.command}{later}", soft_wrap=True, markup=False)
    return report.code
