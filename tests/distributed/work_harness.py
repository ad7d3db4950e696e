"""What the ranks do for `test_ranks`."""

import torch
from torch import distributed as dist


def total(rank: int, size: int, start: int) -> float:
    mine = torch.tensor([float(rank + start)])
    dist.all_reduce(mine)
    return float(mine)


def fail(rank: int, size: int, who: int) -> int:
    if rank == who:
        raise ValueError("this one fails")
    dist.barrier()
    return rank
