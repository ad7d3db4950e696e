"""Launch: `--nproc N` of the command, by torchrun's own agent: N processes on this machine, one rendezvous, signals handed on."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from tare.core.errors import InputError

FAREWELL = 600  # seconds that the processes have to save after a signal, before they are killed
INTERRUPTED = 130


def launch(count: int, words: Sequence[str]) -> int:
    """Run `python -m tare WORDS` in `count` processes, and return the exit code of the first that fails; 0 if none does.

    SIGINT and SIGTERM go to all of them: they save and end together, and the code is 130.

    Raises:
        InputError: inside torchrun, or not at least one process.
    """
    if count < 1:
        raise InputError(f"--nproc: expected a number of processes of at least 1, got {count}")
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        raise InputError("--nproc: this is a process of torchrun already; leave it out, or start without torchrun")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    # else each would take all cores; the user's own setting stands
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=FAREWELL,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "tare", *words)
    except ChildFailedError as fault:
        codes = [failure.exitcode for failure in fault.failures.values()]
        return next((code for code in codes if code > 1), 1) if max(codes) > 0 else 128 - min(codes)
    except SignalException:
        return INTERRUPTED
    return 0
