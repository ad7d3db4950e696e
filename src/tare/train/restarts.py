"""torchrun starts all processes anew, with the same words, when one of them dies (`--max-restarts`): the run then goes on by itself.

Whether the run in the folder is that of this very launch stands in a file beside it: what another launch left is never taken for it.
"""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from tare.train.cache import write_atomic
from tare.train.config import RunConfig

NAME = "run.launch"


def launch() -> str | None:
    """Names the launcher of this process: torchrun's id, and its process with the time it began; None without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent, began = os.getppid(), ""
    with contextlib.suppress(OSError, IndexError):  # no Linux: the number of the process alone
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {parent} {began}\n"


def restarted() -> bool:
    """Whether torchrun has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0) > 0


def going_on(config: RunConfig) -> RunConfig:
    """The configuration with `run.resume` on where this is a restart and the run in the folder is of the same launch, and has begun."""
    if config.run.resume or not restarted():
        return config
    folder = Path(config.run.out).expanduser()
    try:
        same = (folder / NAME).read_text("utf-8") == launch() and (folder / "config.yaml").exists()
    except (OSError, UnicodeDecodeError):
        return config
    return replace(config, run=replace(config.run, resume=True)) if same else config


def mark(folder: Path) -> None:
    """Write into a run's folder who launched it; called before anything else is written there."""
    if (name := launch()) is not None:
        write_atomic(folder / NAME, name.encode())
    else:
        (folder / NAME).unlink(missing_ok=True)
