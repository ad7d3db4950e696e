"""Exchange: whole matrices from the rows that ranks have, on their owners, and back: one all-to-all for one matrix of each owner.

Nothing is gathered on every rank. In a round each rank owns at most one matrix, so beside its own rows it holds one gradient, one weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tare.core.shard.layout import Layout


@dataclass(frozen=True)
class Part:
    """One matrix of a round: this rank's rows of it, the whole shape, and who owns it."""

    rows: Tensor
    shape: tuple[int, ...]
    layout: Layout
    owner: int


def gather(parts: Sequence[Part], group: Any, device: torch.device) -> Tensor | None:
    """Send each matrix's rows to its owner. Returns the whole of the one that this rank owns, or None.

    parts: at most one for each owner.
    """
    by_owner = {part.owner: part for part in parts}
    layout = parts[0].layout
    flat = [as_bytes(by_owner[rank].rows) if rank in by_owner else None for rank in range(layout.size)]
    mine = by_owner.get(layout.rank)
    sizes = [0] * layout.size
    if mine is not None:
        each = math.prod(mine.shape[1:]) * mine.rows.element_size()
        sizes = [count * each for count in mine.layout.counts]
    got = all_to_all(flat, sizes, group, device)
    return None if mine is None else got.view(mine.rows.dtype).view(mine.shape)


def scatter(parts: Sequence[Part], whole: Tensor | None, group: Any, device: torch.device) -> None:
    """Send the rows of the matrix that this rank owns to the ranks that have them, and take up those of the others', in place.

    Args:
        parts: as given to `gather`.
        whole: this rank's matrix after its step; None if it owns none.
    """
    layout = parts[0].layout
    flat: list[Tensor | None] = [None] * layout.size
    mine = next((part for part in parts if part.owner == layout.rank), None)
    if mine is not None:
        assert whole is not None
        flat = [as_bytes(whole[slice(*mine.layout.cut(rank))]) for rank in range(layout.size)]
    by_owner = {part.owner: part for part in parts}
    sizes = [
        by_owner[rank].rows.numel() * by_owner[rank].rows.element_size() if rank in by_owner else 0
        for rank in range(layout.size)
    ]
    got = all_to_all(flat, sizes, group, device)
    start = 0
    for rank, size in enumerate(sizes):
        if size:
            rows = by_owner[rank].rows
            piece = got[start : start + size]
            piece = piece.clone() if start % rows.element_size() else piece
            rows.copy_(piece.view(rows.dtype).view(rows.shape))
        start += size


def as_bytes(tensor: Tensor) -> Tensor:
    """As bytes, flat: no backend refuses those, and no bit is touched."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def all_to_all(sent: Sequence[Tensor | None], sizes: list[int], group: Any, device: torch.device) -> Tensor:
    """What all ranks send to this one, in their order. sent: bytes for each rank, None for nothing. sizes: of what each sends here."""
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    out = [empty if each is None else each for each in sent]
    got = torch.empty(
        sum(sizes), dtype=torch.uint8, device=device
    )  # rows in the order of their ranks: a matrix as it stands
    dist.all_to_all_single(got, torch.cat(out), sizes, [each.numel() for each in out], group=group)
    return got


def numbers_of_all(own: list[float], group: Any, device: torch.device) -> list[float]:
    """Everybody's numbers, in the order of the ranks; each may have any number of them."""
    size = dist.get_world_size(group)
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    counts[dist.get_rank(group)] = len(own)
    dist.all_reduce(counts, group=group)
    most = int(counts.max())
    if most == 0:
        return []
    mine = torch.zeros(most, dtype=torch.float64, device=device)
    mine[: len(own)] = torch.tensor(own, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(rows, mine, group=group)
    return [value for row, count in zip(rows, counts.tolist(), strict=True) for value in row[:count].tolist()]
