"""Top-k: the largest numbers of each gradient, with their places; ranks choose apart (MASHA, arXiv 2110.03313; Stich et al. 2018)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.parallel.hooks.base import GradBucket, Piece
from tare.parallel.hooks.sampled import Sampled, spoilt
from tare.parallel.hooks.wire import used_here


class TopK(Sampled):
    """Sends the k largest elements in size of G + E of each leaf with their numbers: 8 bytes each in fp32, 6 in bf16, gathered by all.

    A contraction at every step: |x - C(x)|^2 <= (1 - k/d) |x|^2. Every rank sends what is large there; the result is the mean of
    what all sent, with up to W k elements that are not zero. All-gather grows with the ranks: (W - 1) 8 k bytes from each are
    W k/d of what whole gradients take, where `RandK` sends k/d of it.

    A gradient that is not finite anywhere on any rank gives NaN in its leaf on all ranks, and leaves the leaf's errors as they were.

    Args:
        fraction: k/d in (0, 1]; at 1 an all-reduce of everything.
        error_feedback: as for `RandK`. Without it what is never large is never sent (for comparisons).
        min_compressed: leaves with fewer elements are sent whole.
        group: as for `Hook`.

    >>> TopK(fraction=0.005).describe()
    'Top-k of 0.5 % with error feedback'
    """

    kind: ClassVar[str] = "topk"

    def __init__(
        self, fraction: float = 0.01, *, error_feedback: bool = True, min_compressed: int = 4096, group: Any = None
    ):
        super().__init__(fraction, error_feedback, min_compressed, group)

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        whole: list[Piece] = []
        jobs: list[tuple[Piece, Tensor, Tensor]] = []  # leaf, own places, G + E
        values: list[Tensor] = []
        for piece in self.pieces(bucket):
            k = self.count(piece.flat.numel())
            if k is None:
                whole.append(piece)
                continue
            if piece.flat.numel() >= 2**31:
                raise InputError(
                    f"TopK: {piece.name} has {piece.flat.numel():,} elements, and places are int32; use RandK"
                )
            total = self.total(piece)
            index = total.abs().topk(k, sorted=False).indices
            jobs.append((piece, index, total))
            values.append(spoilt(total[index].to(buffer.dtype), total))
        if not jobs:
            return self.send_whole(buffer)
        plain = self.wire.mean(torch.cat([piece.flat for piece in whole])) if whole else None
        mine = torch.cat(values)  # [K]
        numbers = torch.cat([index for _, index, _ in jobs]).to(torch.int32)
        done, rows = self.wire.gather(torch.cat([mine.view(torch.uint8), numbers.view(torch.uint8)]))

        @torch.no_grad()
        def spread(_: torch.futures.Future[Any]) -> Tensor:
            used_here(rows, mine)
            size = len(rows)
            theirs = rows[:, : mine.nbytes].contiguous().view(buffer.dtype)  # [W, K]
            where = rows[:, mine.nbytes :].contiguous().view(torch.int32)
            start = 0
            for piece, index, total in jobs:
                used_here(index, total)
                run = slice(start, start + index.numel())
                start = run.stop
                if self.feedback is not None:
                    self.feedback.settle(piece, total, index, mine[run], theirs[:, run].isfinite().all())
                piece.flat.zero_()
                for rank in range(size):  # one after another: the same sum on all ranks
                    piece.flat.index_add_(0, where[rank, run], theirs[rank, run] / size)
            if plain is not None:
                mean, start = plain.wait()[0], 0
                used_here(mean)
                for piece in whole:
                    piece.flat.copy_(mean[start : start + piece.flat.numel()])
                    start += piece.flat.numel()
            return buffer

        return done.then(spread)

    def describe(self) -> str:
        how = "with" if self.feedback is not None else "without"
        return f"Top-k of {100 * self.fraction:g} % {how} error feedback"
