"""The flags that commands share: each is a short name for one setting of the configuration.

Help texts, types and defaults come from the settings themselves, so a flag is one line here. Light to import: no torch.
"""

import argparse
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from tare.core.errors import InputError
from tare.train.config import RunConfig
from tare.train.configfile import SECTIONS, Given, flag
from tare.train.settings import kind_of

FLAGS: dict[str, str] = {
    "--model": "model.name",
    "--tokenizer": "model.tokenizer",
    "--quantize": "model.quantize",
    "--adapter": "adapter.kind",
    "--data": "data.source",
    "--eval-data": "data.eval_source",
    "--task": "task.name",
    "--template": "task.template",
    "--words": "task.words",
    "--objective": "task.objective",
    "--shots": "task.shots",
    "--method": "method.key",
    "--budget": "run.budget",
    "--steps": "train.steps",
    "--batch": "train.batch",
    "--accumulate": "train.accumulate",
    "--seq": "data.seq",
    "--lr": "method.lr",
    "--rank": "method.rank",
    "--weight-decay": "method.weight_decay",
    "--release": "method.release",
    "--checkpointing": "model.checkpointing",
    "--precision": "train.precision",
    "--schedule": "train.schedule",
    "--warmup": "train.warmup",
    "--clip": "train.clip",
    "--clip-mode": "train.clip_mode",
    "--clip-parts": "train.clip_parts",
    "--parallel": "train.parallel",
    "--shards": "train.shards",
    "--workers": "train.workers",
    "--refresh-from": "train.refresh_from",
    "--refresh-parts": "train.refresh_parts",
    "--seed": "run.seed",
    "--device": "run.device",
    "--threads": "run.threads",
    "--out": "run.out",
    "--resume": "run.resume",
    "--checkpoint-every": "run.checkpoint_every",
    "--checkpoint-async": "run.checkpoint_async",
    "--eval-every": "run.eval_every",
}
GROUPS = {
    "model and data": ("--model", "--tokenizer", "--data", "--eval-data", "--seq", "--batch", "--accumulate"),
    "task": ("--task", "--template", "--words", "--objective", "--shots"),
    "method": (
        "--method",
        "--lr",
        "--rank",
        "--weight-decay",
        "--warmup",
        "--schedule",
        "--clip",
        "--clip-mode",
        "--clip-parts",
        "--steps",
    ),
    "processes": ("--parallel", "--shards", "--workers"),
    "memory": (
        "--budget",
        "--precision",
        "--quantize",
        "--adapter",
        "--checkpointing",
        "--release",
        "--refresh-from",
        "--refresh-parts",
    ),
    "run": (
        "--out",
        "--resume",
        "--checkpoint-every",
        "--checkpoint-async",
        "--eval-every",
        "--seed",
        "--device",
        "--threads",
    ),
}


@dataclass(frozen=True)
class _Help:
    text: str
    metavar: str
    boolean: bool


@cache
def _help(path: str) -> _Help:
    """Help text, placeholder and kind of a setting."""
    title, name = path.split(".")
    section = SECTIONS[title]
    kind, _ = kind_of(section, name)
    text = section.__dataclass_fields__[name].metadata["help"]  # type: ignore[attr-defined]
    default = getattr(getattr(_DEFAULTS, title), name)
    if get_origin(kind) is Literal:
        metavar = "{" + ",".join(get_args(kind)) + "}"
    else:
        metavar = {int: "N", float: "X"}.get(kind, name.upper())
    shown = (
        "" if default is None or isinstance(default, bool) else f" [{default:g}]" if kind is float else f" [{default}]"
    )
    return _Help((text + shown).replace("%", "%%"), metavar, kind is bool)


_DEFAULTS = RunConfig()


def add(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Adds the shared flags, in groups, except those named; and the switches that every command has."""
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in without:
                add_one(group, name)
    add_switches(parser)
    parser.add_argument("--config", metavar="FILE", help="read settings from a YAML file; flags win over it")
    parser.epilog = (
        "Every setting can also be given as --section.field VALUE, e.g. --train.final_lr_ratio 0.05 or "
        "--method.options.scale 0.25."
    )


def add_one(group: Any, name: str) -> None:
    """Adds one shared flag. Its values are collected, so that two different ones are noticed."""
    about = _help(FLAGS[name])
    if about.boolean:
        group.add_argument(name, dest=FLAGS[name], action="append_const", const="true", help=about.text)
    else:
        group.add_argument(name, dest=FLAGS[name], action="append", metavar=about.metavar, help=about.text)


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and `--debug`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def take_dotted(argv: list[str]) -> tuple[list[str], list[Given]]:
    """Takes `--section.field VALUE` and `--section.field=VALUE` out of the arguments.

    A setting that is true or false may stand without a value: `--model.checkpointing`.
    """
    rest: list[str] = []
    given: list[Given] = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(word)
            continue
        path = name[2:]
        if path.startswith("storage."):  # short for the method's storage
            path = f"method.{path}"
        flag(path, "true", name)  # an unknown path is an error before a missing value is
        if not equals:
            if waiting and not waiting[0].startswith("--"):
                value = waiting.pop(0)
            elif path.count(".") == 1 and _help(path).boolean:
                value = "true"
            else:
                raise InputError(f"{name}: expected a value")
        given.append(flag(path, value, name))
    return rest, given


def collect(args: argparse.Namespace) -> list[Given]:
    """The settings given by short flags."""
    given = []
    for name, path in FLAGS.items():
        for text in getattr(args, path, None) or []:
            given.append(flag(path, text, name))
    return given
