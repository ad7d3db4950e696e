"""train a language model within a memory budget

Pretrains a named size, or goes on training a transformers folder; with --task classify or choice, on rows of a table. Ctrl-C saves and
stops; --resume goes on, bit for bit. --nproc N trains in N processes (see --parallel), as torchrun --nproc-per-node N -m tare train does.
"""

import argparse
import os
import sys
import time
from dataclasses import asdict

from tare.cli import flags
from tare.cli.output import console, emit, only_json, resolve
from tare.core.errors import InputError

PARTING = 3.0  # seconds that who has nothing to say stays: torchrun ends all others as soon as one has gone


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    flags.add(parser)
    parser.add_argument("--nproc", metavar="N", help="train in N processes of this machine, by torchrun's own agent")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.nproc is not None:
        return _launch(args)
    config = resolve(args)
    from tare.cli.watch import watching
    from tare.report.compare import check_method, row_of, write_report
    from tare.report.rows import memory_table, table
    from tare.train.loop import train
    from tare.train.progress import scores_line
    from tare.train.seedlog import NAME
    from tare.train.workers import Elsewhere, join
    from tare.zeroth.exchange import WorkersFailed

    with only_json(args.json), join(config) as crew:
        try:
            with crew.together():
                check_method(config)
            with watching(config) as watch:
                result = train(config, on_event=watch)
        except Elsewhere:
            time.sleep(PARTING)
            os._exit(1)  # not through operations that wait for one that is gone; every file is closed
        except WorkersFailed as fault:
            print(f"tare: {fault}; go on from the last checkpoint with --resume", file=sys.stderr, flush=True)
            os._exit(1)
    if not crew.first:
        time.sleep(PARTING if result.interrupted else 0.0)
        return 130 if result.interrupted else 0
    if result.interrupted:
        raise KeyboardInterrupt(
            f"interrupted at step {result.steps}, saved; go on with: tare train --resume --out {result.out}"
        )
    row = row_of(result)
    report = write_report(row, result.config)
    if args.json:
        task = {"scores": result.scores, "zero_shot": result.zero_shot, "forwards": result.forwards}
        if result.workers > 1:
            task |= {"workers": result.workers, "sent": result.sent}
        emit({**row.to_json(), **task, "model": str(result.out / "model"), "config": asdict(result.config)})
        return 0
    out = console()
    out.print(table([row]))
    out.print()
    out.print(memory_table(row))
    out.print()
    if result.scores:
        before = f" (before: {scores_line(result.zero_shot)})" if result.zero_shot else ""
        out.print(f"task:   {scores_line(result.scores)}{before}", soft_wrap=True)
    if result.forwards:
        out.print(f"passes: {result.forwards:,} forward, {result.skipped:,} steps skipped", soft_wrap=True)
        out.print(f"seeds:  {result.out / NAME}", soft_wrap=True)
    if result.workers > 1:
        each = result.sent / max(1, result.steps)
        out.print(
            f"sent:   {result.sent:,} bytes by each of {result.workers} workers, {each:.0f} a step", soft_wrap=True
        )
    out.print(f"model:  {result.out / 'model'}", soft_wrap=True)
    out.print(f"report: {report}", soft_wrap=True)
    return 0


def _launch(args: argparse.Namespace) -> int:
    """The same command without `--nproc`, in so many processes."""
    if not args.nproc.isdecimal():
        raise InputError(f"--nproc: expected a number of processes, got {args.nproc!r}")
    resolve(args)  # what is wrong with the words is said once, before anything is started
    words: list[str] = ["train"]
    waiting = iter(args.words)
    for word in waiting:
        if word == "--nproc":
            next(waiting)
        elif not word.startswith("--nproc="):
            words.append(word)
    from tare.parallel.launch import launch

    return launch(int(args.nproc), words)
