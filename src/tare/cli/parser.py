"""Argument parsing on `argparse`, with our own errors: one line that names the argument and the nearest known one."""

import argparse
import re
import shutil
from typing import NoReturn

from tare.cli import flags
from tare.core.errors import InputError, nearest

_MISSING = re.compile(r"argument (\S+?)(/.*)?: expected .*argument")
_EXPLICIT = re.compile(r"argument (\S+?)(/.*)?: ignored explicit argument (.*)")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `InputError` instead of printing its usage, and abbreviates nothing."""

    def __init__(self, command: str, summary: str) -> None:
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        super().__init__(
            prog=f"tare {command}",
            description=summary,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=width),
        )
        self._optionals.title = "general"

    def error(self, message: str) -> NoReturn:
        if match := _MISSING.match(message):
            raise InputError(f"{match[1]}: expected a value; see {self.prog} --help")
        if match := _EXPLICIT.match(message):
            raise InputError(f"{match[1]}: takes no value, got {match[3]}")
        raise InputError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def read(self, argv: list[str]) -> argparse.Namespace:
        """The parsed arguments, with every setting that was given in `settings`, and all words as they stood in `words`.

        Raises `InputError` for anything unknown.
        """
        rest, dotted = flags.take_dotted(argv)
        args, unknown = self.parse_known_args(rest)
        for word in unknown:
            if word.startswith("-"):
                name = word.partition("=")[0]
                known = [*self._option_string_actions, *(f"--{path}" for path in flags.FLAGS.values())]
                raise InputError(f"{name}: unknown option{nearest(name, known)}; see {self.prog} --help")
        if unknown:
            raise InputError(f"{unknown[0]!r}: unexpected argument; see {self.prog} --help")
        args.words = list(argv)
        args.settings = [*flags.collect(args), *dotted]
        return args
