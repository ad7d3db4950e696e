"""Ranks: how many processes a run has, and how weights lie over them."""

from dataclasses import dataclass
from typing import Literal

from tare.core.checks import check_choice, check_whole
from tare.core.errors import InputError

Parallel = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, one to a GPU.

    Args:
        gpus: how many.
        parallel: `ddp`: the model is whole on each; `fsdp`: its weights, gradients and state are cut among all (FSDP2); `hsdp`: they are
            cut within groups of `shards`, and the groups hold the same.
        shards: a divisor of `gpus`; with hsdp only.
        node: GPUs of one machine.
        each: gradients are reduced after every micro-batch, not once a step; None: as in a run, once a step under DDP alone.
    """

    gpus: int = 1
    parallel: Parallel = "ddp"
    shards: int | None = None
    node: int = 8
    each: bool | None = None

    def __post_init__(self) -> None:
        check_whole("gpus", self.gpus)
        check_whole("gpus_per_node", self.node)
        check_choice("parallel", self.parallel, ("ddp", "fsdp", "hsdp"))
        able = ", ".join(str(n) for n in range(1, self.gpus + 1) if self.gpus % n == 0)
        if self.shards is None:
            if self.parallel == "hsdp":
                raise InputError(
                    f"shards: missing; hsdp cuts weights among so many GPUs and repeats that; use one of {able}"
                )
            return
        check_whole("shards", self.shards)
        if self.parallel != "hsdp":
            raise InputError(f"shards: goes with hsdp, not with {self.parallel}; leave it out, or use --parallel hsdp")
        if self.gpus % self.shards:
            raise InputError(f"shards: {self.shards} does not divide {self.gpus} GPUs; use one of {able}")

    @property
    def sharded(self) -> bool:
        """Whether weights are cut, be it among one."""
        return self.parallel != "ddp"

    @property
    def cut(self) -> int:
        """Among how many ranks weights are cut; 1 under DDP."""
        return (self.shards or self.gpus) if self.sharded else 1

    @property
    def replicas(self) -> int:
        """How many groups hold the same."""
        return self.gpus // self.cut

    @property
    def often(self) -> bool:
        """Whether gradients are reduced after every micro-batch."""
        return self.sharded if self.each is None else self.each

    def share(self, batch: int) -> int:
        """Sequences of a rank, of a batch of all ranks together.

        Raises:
            InputError: fewer than ranks, or not a multiple of them.
        """
        if batch < self.gpus:
            raise InputError(
                f"batch {batch} is smaller than {self.gpus} ranks, each of which needs a sequence: use --batch {self.gpus} or more"
            )
        if batch % self.gpus:
            near = batch - batch % self.gpus
            raise InputError(
                f"batch {batch} does not divide among {self.gpus} ranks: use --batch {near} or {near + self.gpus}"
            )
        return batch // self.gpus
