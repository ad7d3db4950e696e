"""predict the peak memory of training a model with each method, and say which one fits a budget

Nothing of the model's size is allocated. Settings that are not given are those of tare train. Exit code 3: nothing fits.
"""

import argparse

from tare.cli import flags
from tare.cli.output import console, emit, method_list, only_json, resolve
from tare.cli.waiting import waiting
from tare.core.errors import InputError
from tare.plan.shapes import check_name
from tare.train.configfile import flag

DONE, TOO_LARGE = 0, 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "target", metavar="MODEL", nargs="?", help="a named size, e.g. llama-7b, or a transformers folder"
    )
    parser.add_argument("--methods", metavar="KEY,KEY,...", help="the methods to plan for; all if left out")
    group = parser.add_argument_group("settings")
    for name in (
        "--model",
        "--budget",
        "--batch",
        "--accumulate",
        "--seq",
        "--rank",
        "--precision",
        "--quantize",
        "--adapter",
    ):
        flags.add_one(group, name)
    for name in ("--checkpointing", "--release", "--refresh-from", "--refresh-parts"):
        flags.add_one(group, name)
    for name in ("--clip-mode", "--clip-parts", "--method"):
        flags.add_one(group, name)
    many = parser.add_argument_group(
        "many GPUs",
        "Lines are those of the rank that needs most; --batch is of all ranks together, by default one for each.",
    )
    many.add_argument("--gpus", metavar="N", type=whole, help="processes, one to each GPU")
    for name in ("--parallel", "--shards"):
        flags.add_one(many, name)
    many.add_argument(
        "--link",
        metavar="SPEED",
        help="what joins the GPUs, e.g. nvlink4 or 50GB/s (each GPU and direction), or two with a comma, within and between machines; then "
        "communication is timed on paper",
    )
    many.add_argument("--gpus-per-node", metavar="N", type=whole, default=8, help="GPUs of one machine [8]")
    parser.add_argument(
        "--config", metavar="FILE", help="take the settings of a run from a YAML file; flags win over it"
    )
    flags.add_switches(parser)


def whole(text: str) -> int:
    """A whole number; what it may be is checked where it is used."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    model = [flag("model.name", args.target, "MODEL")] if args.target is not None else []
    config = resolve(args, model)
    if not model and not args.config and not any(given.path == "model.name" for given in args.settings):
        raise InputError("MODEL: missing; give a named size such as llama-7b, or a transformers folder")
    if args.methods is not None and any(given.path == "method.key" for given in args.settings):
        raise InputError("--methods: conflicts with --method; give one of them")
    check_name(config.model.name)
    methods = method_list(args.methods, "--methods")
    if methods is None and config.method.key != "auto":
        methods = method_list(config.method.key, "--method")
    hint = "the first time takes longest; what is found out is kept"
    with only_json(args.json), waiting(f"planning {config.model.name}", hint) as tell:
        from tare.plan.api import plan
        from tare.plan.report import show, verdict
        from tare.train import adapters
        from tare.train.quantize import Quantization, check_methods, planned

        method, work = config.method, None
        check_methods(config.model.quantize, methods)
        if config.model.quantize is not None:
            work = planned(None, Quantization.parse(config.model.quantize), config.train.batch, config.data.seq)
        adapters.check(config)
        work = adapters.planned(work, config)
        one_each = (
            args.gpus is not None and args.config is None and "train.batch" not in {s.path for s in args.settings}
        )
        given = {"lr": method.lr, "rank": method.rank, "weight_decay": method.weight_decay, **method.options}
        result = plan(
            config.model.name,
            progress=tell,
            budget=config.run.budget,
            batch=None if one_each else config.train.batch,
            seq=config.data.seq,
            methods=methods,
            checkpointing=config.model.checkpointing,
            release=method.release,
            accumulate=config.train.accumulate,
            clip_mode=config.train.clip_mode,
            clip_parts=config.train.clip_parts,
            refresh_from=config.train.refresh_from,
            refresh_parts=config.train.refresh_parts,
            precision=config.train.precision,
            storage=method.storage or None,
            hyper={name: value for name, value in given.items() if value is not None},
            work=work,
            gpus=args.gpus,
            parallel=config.train.parallel,
            shards=config.train.shards,
            sync=config.train.sync,
            link=args.link,
            gpus_per_node=args.gpus_per_node,
        )
    if args.json:
        emit(result.to_json())
    else:
        out = console()
        out.print(show(result))
        for line in verdict(result):
            out.print(line, style="bold", soft_wrap=True)
    return TOO_LARGE if result.budget is not None and not any(row.fits for row in result.rows) else DONE
