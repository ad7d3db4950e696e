"""Where the processes of one start meet: a store whose keys no earlier start has written.

torchrun keeps one store for all its restarts (seen in torch 2.13; pytorch#135712 tells of it), so that workers which are started
again find the addresses of dead ones there and connect to nobody. How often an agent has restarted does not help: on several nodes each
counts for itself. So the first worker names the start anew, and the others know the name is fresh once it has answered them.
"""

import os
import time
import uuid
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from tare.core.errors import InputError

POLL = 0.02  # seconds between looks


def meeting(patience: timedelta) -> dict[str, Any]:
    """What `init_process_group` is to be given so that the workers of this start find each other: nothing, or store, rank and size.

    Raises `InputError` where some do not come within `patience`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}  # the first worker makes a store of its own
    shared, rank, size = next(dist.rendezvous("env://", timeout=patience))
    return {"store": dist.PrefixStore(named(shared, rank, size, patience), shared), "rank": rank, "world_size": size}


def named(store: Any, rank: int, size: int, patience: timedelta) -> str:
    """A name for this start on which all its workers agree, whatever earlier ones left in the store. Raises `InputError`.

    The first proposes; each other says under the proposal who it is, by a word that nobody has used; the first lists these words. A
    proposal with a list in which one's word is missing is an old one.
    """
    end = time.monotonic() + patience.total_seconds()
    own = uuid.uuid4().hex

    def wait(what: str) -> None:
        if time.monotonic() > end:
            waited = f"{patience.total_seconds():.0f} s"
            raise InputError(
                f"torchrun: worker {rank} has waited {waited} for {what}; see why it does not start, or start fewer"
            )
        time.sleep(POLL)

    if rank == 0:
        store.set("tare/start", own)
        words = []
        for other in range(1, size):
            while not store.check([f"tare/{own}/{other}"]):
                wait(f"worker {other}")
            words.append(store.get(f"tare/{own}/{other}").decode())
        store.set(f"tare/{own}/all", " ".join(words))
        return f"tare/{own}"
    tried: set[str] = set()
    while True:
        name = store.get("tare/start").decode() if store.check(["tare/start"]) else None
        if name is not None:
            if name not in tried:
                tried.add(name)
                store.set(f"tare/{name}/{rank}", own)
            if store.check([f"tare/{name}/all"]) and own in store.get(f"tare/{name}/all").decode().split():
                return f"tare/{name}"
        wait("worker 0")
