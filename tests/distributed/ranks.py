"""Ranks: real processes in one gloo group, kept alive for many small checks, since starting one costs more than most of them.

`ranks.run("work_x", "function", key=value)` calls `work_x.function(rank, size, key=value)` on all ranks and returns their results.
"""

import gc
import importlib
import os
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from processes import CONTEXT

HERE = Path(__file__).parent


class RankFailed(AssertionError):
    """A rank raised, died, or did not answer; the message has its traceback."""


class Ranks:
    """`size` processes. They start at the first `run`, and anew after one in which a rank failed."""

    def __init__(self, size: int, patience: float = 240.0):
        self.size, self.patience = size, patience
        self._started: list[tuple[Any, Connection]] = []

    def run(self, module: str, function: str, **arguments: Any) -> list[Any]:
        """What the function returned on each rank. Raises `RankFailed`."""
        if not self._started:
            self._start()
        for _, pipe in self._started:
            pipe.send((module, function, arguments))
        found: list[Any] = [None] * self.size
        waiting, faults, end = set(range(self.size)), [], time.monotonic() + self.patience
        while waiting and time.monotonic() < end:
            for rank in sorted(waiting):
                process, pipe = self._started[rank]
                try:
                    if not pipe.poll(0.02):
                        if process.is_alive():
                            continue
                        raise EOFError
                    good, value = pipe.recv()
                except (EOFError, ConnectionError):
                    good, value = False, "the process is gone"
                waiting.discard(rank)
                if good:
                    found[rank] = value
                else:
                    faults.append(f"rank {rank}: {value}")
                    end = min(end, time.monotonic() + 5.0)  # the others may wait for it for ever
        if faults or waiting:
            self.close(kill=True)
            silent = [f"rank {rank}: no answer" for rank in sorted(waiting)]
            raise RankFailed("\n".join([*faults, *silent]))
        return found

    def _start(self) -> None:
        handle, store = tempfile.mkstemp(prefix="tare-ranks-")
        os.close(handle)
        os.unlink(store)
        for rank in range(self.size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, self.size, store, there, sys.path), daemon=True)
            process.start()
            there.close()
            self._started.append((process, here))

    def close(self, kill: bool = False) -> None:
        """End the processes."""
        for process, pipe in self._started:
            if kill:
                process.kill()
            else:
                pipe.send(None)
        codes = []
        for process, pipe in self._started:
            process.join(20)
            codes.append(process.exitcode)
            if process.is_alive():
                process.kill()
            pipe.close()
        self._started = []
        assert kill or codes == [0] * len(codes), f"ranks ended with {codes}"


def _serve(rank: int, size: int, store: str, pipe: Connection, path: list[str]) -> None:
    sys.path[:] = [str(HERE), *path]
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (asked := pipe.recv()) is not None:
        module, function, arguments = asked
        try:
            answer = (True, getattr(importlib.import_module(module), function)(rank, size, **arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        gc.collect()  # a DDP or FSDP2 model that is still alive aborts the process at its end
        pipe.send(answer)
    dist.barrier()
    dist.destroy_process_group()
