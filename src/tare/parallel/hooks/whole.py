"""Whole: gradients as they are, counted: what the other hooks are compared with."""

from typing import ClassVar

import torch
from torch import Tensor

from tare.parallel.hooks.base import GradBucket, Hook


class Whole(Hook):
    """The mean of all gradients by an all-reduce of each bucket, bit for bit what DDP does without a hook; it only counts bytes."""

    kind: ClassVar[str] = "whole"

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        return self.send_whole(bucket.buffer())

    def describe(self) -> str:
        return "whole gradients"
