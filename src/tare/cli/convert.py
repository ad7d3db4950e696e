"""write a checkpoint in another form: whole tensors in one folder, pieces for ranks, or a model

SOURCE is a run, whose newest intact checkpoint is taken, or one checkpoint (RUN/checkpoints/step-N). Resuming needs no conversion: every
kind of run reads both forms. --to single writes DIR/step-N with whole tensors, --to sharded the same in pieces by rows, --to model a
transformers folder with the tokenizer.
"""

import argparse
from pathlib import Path

from tare.cli import flags
from tare.cli.output import console, emit, only_json
from tare.core.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a run's folder, or one of its checkpoints")
    group = parser.add_argument_group("convert")
    group.add_argument("--to", metavar="FORM", help="single, sharded or model")
    group.add_argument("--out", metavar="DIR", dest="folder", help="where it goes; new or empty")
    group.add_argument(
        "--ranks", metavar="N", default="2", help="sharded: how many pieces (2); any number of ranks can read them"
    )
    flags.add_switches(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    for name, value in (("SOURCE", args.source), ("--to", args.to), ("--out", args.folder)):
        if value is None:
            raise InputError(f"{name}: missing; tare convert SOURCE --to single|sharded|model --out DIR")
    if not args.ranks.isdigit():
        raise InputError(f"--ranks: expected a whole number, got {args.ranks!r}")
    with only_json(args.json):
        from tare.train.convert import convert

        done = convert(Path(args.source).expanduser(), args.to, Path(args.folder).expanduser(), int(args.ranks))
    if args.json:
        emit(
            {
                "source": str(done.source),
                "out": str(done.out),
                "to": args.to,
                "step": done.step,
                "skipped": list(done.skipped),
            }
        )
        return 0
    out = console()
    for text in done.skipped:
        out.print(f"passed over: {text}", soft_wrap=True, markup=False)
    out.print(f"step {done.step:,} of {done.source} -> {done.out}", soft_wrap=True, markup=False)
    return 0
