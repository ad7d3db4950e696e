"""PowerSGD, as torch has it, under the names of this library, with its bytes counted and its state as plain tensors."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from tare.core.checks import check_number, check_whole
from tare.core.errors import CheckpointError, InputError
from tare.parallel.hooks.base import GradBucket, Hook

_BUCKETS = ("error", "p", "q")


class PowerSGD(Hook):
    """Low-rank gradients with error feedback (Vogels, Karimireddy & Jaggi 2019, arXiv 1905.13727), by
    `torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook`; see there for the algorithm.

    A matrix [m, n] travels as P [m, r] and Q [n, r]: r (m + n) numbers, in two all-reduces; what is no matrix, or would hardly shrink,
    travels whole.

    Limits, all of torch's hook: fp16 and bf16 gradients are factorised in fp16 and bf16; errors take part of a NaN, so that a step that
    is not finite spoils what is kept; state belongs to buckets and not to leaves, and DDP forms its buckets anew after the first
    backward of a process. So the first step of a resumed run is sent whole, and a resumed run is not bit for bit the one that was
    not interrupted; and the state fits only a model wrapped with the same `bucket_cap_mb`. On CPUs one bucket is exchanged after another.

    Args:
        rank: r. torch's default is 1; 1 to 4 are usual, up to 32 for transformers.
        start: steps that are sent whole before it begins, at least 2; torch's default is 1000, about a tenth of a run is advised.
        min_rate: matrices that would not shrink by this factor are sent whole; torch's default is 2.
        error_feedback: whether what was not sent is added to the next gradient.
        warm_start: whether Q of the last step is where the next one begins.
        seed: of the first Q.
        eps: added to the norms of columns in the orthogonalisation. torch's default is 0, which divides by zero where a gradient is.
        group: as for `Hook`.

    >>> PowerSGD(rank=4, start=100).describe()
    'PowerSGD of rank 4'
    """

    kind: ClassVar[str] = "powersgd"

    def __init__(
        self, rank: int = 1, start: int = 1000, *, min_rate: float = 2.0, error_feedback: bool = True, warm_start: bool = True,
        seed: int = 0, eps: float = 1e-8, group: Any = None,
    ):  # fmt: skip
        super().__init__(group)
        if not dist.is_available():
            raise InputError("PowerSGD: this torch has no torch.distributed; use a build that has")
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as theirs  # brings numpy's generators

        self.rank, self.start = check_whole("rank", rank), check_whole("start", start, 2)
        self.seed = check_whole("seed", seed, 0)
        self._reduce = theirs.powerSGD_hook
        self._state = theirs.PowerSGDState(
            group,
            matrix_approximation_rank=self.rank,
            start_powerSGD_iter=self.start,
            min_compression_rate=check_number("min_rate", min_rate),
            use_error_feedback=bool(error_feedback),
            warm_start=bool(warm_start),
            orthogonalization_epsilon=check_number("eps", eps, 0.0, inclusive=True),
            random_seed=self.seed,
        )
        self._settled = False  # whether DDP has formed its final buckets in this process
        self._leaves: dict[int, list[str]] = {}  # of each bucket that was compressed

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        state, buffer = self._state, bucket.buffer()
        if not self._settled and state.iter >= self.start:
            self._settled = bucket.is_last()
            return self.send_whole(buffer)
        self._settled = self._settled or bucket.is_last()
        if state.iter < self.start:
            state.maybe_increase_iter(bucket)
            return self.send_whole(buffer)
        index, names = bucket.index(), [piece.name for piece in self.pieces(bucket)]
        known = self._leaves.setdefault(index, names)
        if known != names:
            raise CheckpointError(
                f"PowerSGD: bucket {index} has {len(names)} leaves from {names[0]} on, and in the saved state {len(known)} from "
                f"{known[0]} on; wrap the model as it was (bucket_cap_mb), or go on without the hook's state"
            )
        before = state.total_numel_after_compression
        found: torch.futures.Future[Tensor] = self._reduce(state, bucket)
        self.wire.summed((state.total_numel_after_compression - before) * buffer.itemsize)
        self.wire.now.calls += 2  # what is whole, P, Q
        if buffer.device.type == "cpu":
            # torch waits for P and Q inside callbacks; gloo has two threads for those, and two buckets would wait for each other
            found.wait()
        return found

    def describe(self) -> str:
        return f"PowerSGD of rank {self.rank}"

    # -- state ---------------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        state = self._state
        drawn = state.rng.get_state(legacy=False)
        found: dict[str, Any] = {
            "iter": state.iter,
            "rng": torch.from_numpy(drawn["state"]["key"].astype("int64")),
            "rng_position": int(drawn["state"]["pos"]),
        }
        for name, tensors in self._by_name().items():
            found.update({f"{name}.{index}": tensor for index, tensor in tensors.items()})
        return {**found, **{f"leaves.{index}": list(names) for index, names in self._leaves.items()}}

    def _by_name(self) -> dict[str, dict[int, Tensor]]:
        state = self._state
        return dict(zip(_BUCKETS, (state.error_dict, state.p_memory_dict, state.q_memory_dict), strict=True))

    def load_own(self, state: dict[str, Any]) -> None:
        mine = self._state
        for tensors in self._by_name().values():
            tensors.clear()
        self._leaves = {}
        device = next(iter(self._names)).device if self._names else torch.device("cpu")
        for key, value in state.items():
            name, _, index = key.partition(".")
            if name in _BUCKETS and index.isdigit():
                self._by_name()[name][int(index)] = value.to(device, copy=True)
            elif name == "leaves":
                self._leaves[int(index)] = list(value)
        mine.iter = int(state["iter"])
        drawn = mine.rng.get_state(legacy=False)
        drawn["state"] = {"key": state["rng"].cpu().numpy().astype("uint32"), "pos": int(state["rng_position"])}
        mine.rng.set_state(drawn)
