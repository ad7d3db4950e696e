"""The command `tare`: finds the subcommand, runs it, and turns what went wrong into one line and an exit code.

Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 3 does not fit the budget, 130 interrupted. Light to import: a
subcommand's module is imported when it is called, and imports torch only when it runs.
"""

import errno
import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from typing import TextIO

from tare.core.errors import DoesNotFit, InputError, nearest

DONE, FAULT, WRONG_INPUT, TOO_LARGE, INTERRUPTED = 0, 1, 2, 3, 130

COMMANDS = {
    "train": "train a language model within a memory budget",
    "compare": "train with several methods on the same data and compare them",
    "plan": "predict the memory that each method needs; which one fits",
    "eval": "loss and perplexity of a trained model",
    "doctor": "verify a run's folder; what can be resumed, and how",
    "convert": "a checkpoint as one folder of whole tensors, in pieces for ranks, or as a model",
    "replay": "apply the seed log of a forward-only run to its base model",
    "methods": "the methods: what each is, its paper, its state, its defaults",
    "bench": "measure the optimizer step against torch and other packages",
}
ALIASES = {"evaluate": "eval", "method": "methods"}

HELP = """usage: tare COMMAND [OPTIONS]

Train language models within a memory budget that you name.

commands:
{commands}

examples:
  tare compare --methods adamw,galore,apollo-mini
  tare train --model llama-9m --data stdlib --method apollo-mini --budget 2GiB
  tare plan llama-7b --budget 24GiB --batch 1 --seq 2048

tare COMMAND --help lists the options of a command; tare --version prints the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    _quiet_libraries(debug)
    try:
        return _dispatch(argv)
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else DONE
    except InputError as error:
        code = TOO_LARGE if isinstance(error, DoesNotFit) else WRONG_INPUT
        return _end(error, code if _said_by_the_first(error) else _fail(str(error), code, debug))
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", INTERRUPTED, debug)
    except BrokenPipeError:  # e.g. `tare methods | head -1`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        return _end(error, _fault(error, debug))


def _dispatch(argv: list[str]) -> int:
    """Runs the subcommand named by the first argument."""
    first = argv[0] if argv else "--help"
    if first in ("--help", "-h", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<9} {summary}" for name, summary in COMMANDS.items())), end="")
        return DONE
    if first in ("--version", "-V"):
        print(f"tare {_version()}")
        return DONE
    name = ALIASES.get(first, first)
    if name not in COMMANDS:
        what = "option" if first.startswith("-") else "command"
        raise InputError(f"{first}: unknown {what}{nearest(first, list(COMMANDS))}; commands: {', '.join(COMMANDS)}")
    from tare.cli.parser import Parser

    module = importlib.import_module(f"tare.cli.{name}")
    parser = Parser(name, (module.__doc__ or "").partition("\n")[0])
    module.configure(parser)
    return int(module.run(parser.read(argv[1:])))


def _end(error: Exception, code: int) -> int:
    """The exit code; where the fault is that of one of several workers, who wait for it in operations, the process ends with it at once."""
    if getattr(error, "of_worker", False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _said_by_the_first(error: Exception) -> bool:
    """Whether this is one of several workers (torchrun), all given the same wrong words; `train` marks the faults of single ones."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if rank == "0" or size == "1" or getattr(error, "of_worker", False):
        return False
    time.sleep(1.0)  # torchrun ends the first, too, as soon as this one has gone
    return True


def _fail(message: str, code: int, debug: bool) -> int:
    """Reports one line on stderr, after the traceback if that was asked for."""
    if debug:
        traceback.print_exc()
    print(f"tare: {' '.join(message.split())}", file=sys.stderr)
    return code


def _fault(error: Exception, debug: bool) -> int:
    """Reports an error that is not an `InputError`: memory and disk have their own words, the rest is our fault."""
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or "out of memory" in first or "can't allocate memory" in first:
        return _fail(
            f"out of memory: {first}; set --budget so that it is checked first, or see tare plan", FAULT, debug
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}", WRONG_INPUT, debug)
    hint = "" if debug else "; run again with --debug for the traceback"
    return _fail(f"fault: {type(error).__name__}: {first}{hint}", FAULT, debug)


def _quiet_libraries(debug: bool) -> None:
    """Keeps the libraries' own notes off the terminal; our warnings become one line each."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "WARNING" if debug else "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    if not debug:
        warnings.showwarning = _warn
        for name in ("torchao", "torch.utils._pytree"):  # what transformers imports along, if it is installed
            logging.getLogger(name).setLevel(logging.ERROR)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning as one line if the user can act on it."""
    if issubclass(category, UserWarning) and f"{os.sep}tare{os.sep}" in filename:
        print(f"tare: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tare")
    except PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
