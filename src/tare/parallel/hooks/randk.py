"""Rand-k: one number in many of each gradient, at places that all ranks draw alike: only values travel (MASHA, arXiv 2110.03313)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from tare.core.checks import check_whole
from tare.core.random import bits, make_key
from tare.parallel.hooks.base import GradBucket, Piece
from tare.parallel.hooks.sampled import Sampled, spoilt
from tare.parallel.hooks.wire import used_here


def places(key: int, numel: int, k: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """k of the numbers 0 .. numel - 1, rising, and the inverse of the probability of each; both [k] int64.

    The numbers are cut into k runs as equal as they can be, and one is drawn from each: every element has the chance k / numel
    that it has among all subsets of k (exactly, if k divides numel), in k draws instead of a sort.
    # differs from the paper: a uniform subset there. Mean and second moment of the compressor are the same.

    >>> places(7, 4, 4)[0].tolist(), places(7, 9, 3)[1].tolist()
    ([0, 1, 2, 3], [3, 3, 3])
    """
    edges = torch.arange(k + 1, dtype=torch.int64, device=device) * numel // k
    width = edges[1:] - edges[:-1]
    return edges[:-1] + (bits(key, 0, k, device) * width >> 32), width


class RandK(Sampled):
    """Sends a share of each gradient: the elements at places drawn from (seed, leaf, step), on all ranks the same; 4 bytes each in fp32.

    With error feedback C(x) is x at the places and 0 elsewhere, a contraction: E |x - C(x)|^2 = (1 - k/d) |x|^2. Without, it is
    multiplied by d/k, so that E C(x) = x, as in MASHA1 (Beznosikov, Richtarik, Diskin, Ryabinin & Gasnikov 2022); its variance is
    (d/k - 1) |x|^2.
    # differs from the paper: that is a method for variational inequalities, with anchors; here are its compressors alone, and
    errors are kept without the step size (what optimizer follows is not known here), which matters where the rate changes quickly.

    A gradient that is not finite anywhere on any rank gives NaN in its leaf on all ranks, and leaves the leaf's errors as they were.

    Args:
        fraction: k/d in (0, 1]; at 1 an all-reduce of everything.
        seed: of the places.
        error_feedback: see above; fp32 of the size of the gradients on each rank.
        min_compressed: leaves with fewer elements are sent whole.
        group: as for `Hook`.

    >>> RandK(fraction=0.01).describe()
    'Rand-k of 1 % with error feedback'
    """

    kind: ClassVar[str] = "randk"

    def __init__(
        self,
        fraction: float = 0.01,
        seed: int = 0,
        *,
        error_feedback: bool = True,
        min_compressed: int = 4096,
        group: Any = None,
    ):
        super().__init__(fraction, error_feedback, min_compressed, group)
        self.seed = check_whole("seed", seed, 0)

    def places(self, piece: Piece, k: int) -> tuple[Tensor, Tensor]:
        """Where the coming step looks at a leaf."""
        return places(make_key(self.seed, piece.name + "/randk", self.steps), piece.flat.numel(), k, piece.flat.device)

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        parts: list[Tensor] = []
        jobs: list[tuple[Piece, Tensor | None, Tensor, Tensor]] = []  # leaf, places, 1/probability, G + E
        for piece in self.pieces(bucket):
            k = self.count(piece.flat.numel())
            if k is None:
                jobs.append((piece, None, piece.flat, piece.flat))
                parts.append(piece.flat)
                continue
            index, width = self.places(piece, k)
            total = self.total(piece)
            jobs.append((piece, index, width, total))
            parts.append(spoilt(total[index].to(buffer.dtype), total))
        if all(index is None for _, index, _, _ in jobs):
            return self.send_whole(buffer)
        mine = torch.cat(parts)
        kept = mine.clone()  # `mean` divides in place

        @torch.no_grad()
        def spread(done: torch.futures.Future[Any]) -> Tensor:
            means = done.value()[0]
            used_here(means, kept)
            start = 0
            for (piece, index, width, total), part in zip(jobs, parts, strict=True):
                run = slice(start, start + part.numel())
                start = run.stop
                mean = means[run]
                if index is None:
                    piece.flat.copy_(mean)
                    continue
                used_here(index, width, total)
                if self.feedback is not None:
                    self.feedback.settle(piece, total, index, kept[run], mean.isfinite().all())
                else:
                    mean = mean * width
                piece.flat.zero_()
                piece.flat[index] = mean
            return buffer

        return self.wire.mean(mine).then(spread)

    def describe(self) -> str:
        how = "with error feedback" if self.feedback is not None else "unbiased"
        return f"Rand-k of {100 * self.fraction:g} % {how}"
