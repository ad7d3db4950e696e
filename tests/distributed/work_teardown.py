"""What a rank of `test_teardown` does: joins, steps a model that is cut or wrapped, and leaves, in peace or not."""

import os

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tare.methods import registry
from tare.parallel import group


def run(rank: int, port: int, how: str, end: str) -> None:
    """how: ddp or fsdp.

    end: both leave in `peace`; one has a `fault` between steps; one has a fault within its `step`, while the other waits in backward.
    """
    os.environ |= {
        "RANK": f"{rank}",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": f"{rank}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }
    torch.set_num_threads(1)
    with group.join("cpu") as crew:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        wrapped = fully_shard(model) if how == "fsdp" else DistributedDataParallel(model)
        optimizer = registry.build("galore", model, lr=1e-2, rank=2)
        for step in range(3):
            with crew.together():
                if end == "fault" and rank == 1 and step == 2:
                    raise ValueError("something went wrong")
            loss = wrapped(torch.ones(2, 5) * (rank + step)).square().mean()
            if end == "step" and rank == 1 and step == 2:
                raise ValueError("something went wrong")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
