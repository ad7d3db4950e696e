"""Counts the bytes of every tensor storage alive, by category, on fake tensors and on real ones alike.

Why our own: `torch.distributed._tools.mem_tracker.MemTracker` gives the same totals, but it is private, keeps only one
peak, and takes 12.8 s for one LLaMA-7B step under fake tensors where this takes about one.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch._C import _get_dispatch_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tare.core.int8_weight import Int8Weight

Category = Literal["parameter", "gradient", "state", "input", "activation", "temporary", "gathered"]
# What LAPACK and sort allocate inside themselves, in elements of the input: measured on the CPU against the allocator, fp32 and
# fp64, 256 to 2048 rows (svd of m x n: its copy of the input; eigh of n x n: two; qr: 65 columns; sort: keys).
WORKSPACE = {
    "aten::_linalg_svd": lambda shape: math.prod(shape) + 16 * sum(shape[-2:]),
    "aten::_linalg_eigh": lambda shape: 2 * math.prod(shape) + 16 * shape[-1],
    "aten::linalg_qr": lambda shape: 65 * min(shape[-2:]),
    "aten::sort": lambda shape: math.prod(shape),
}
CATEGORIES: tuple[Category, ...] = ("parameter", "gradient", "state", "input", "activation", "temporary", "gathered")


_DEVICE = torch.ops.prim.device.default


def _faking() -> bool:
    return _get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@dataclass
class Peak:
    """The largest total seen in a phase, and what it was made of."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))

    def __getitem__(self, category: Category) -> int:
        return self.parts[category]


class MemoryTracker(TorchDispatchMode):
    """A mode under which every operator's outputs are counted from birth until their storage dies.

    A storage counts once however many views it has. What an operator allocates and frees inside itself is not seen, but for
    the table `WORKSPACE`. Enter it inside `FakeTensorMode` when tensors are fake; real ones that are made there for a while
    are tables that a process keeps once, and are not counted.

    >>> with MemoryTracker() as tracker, tracker.phase("forward", born="activation"):
    ...     kept = torch.ones(256) * 2  # the ones die, the product lives
    >>> tracker.peak("forward").total, tracker.current["activation"]
    (2048, 1024)
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = _faking()
        self.current: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self._alive: dict[int, tuple[int, Category, weakref.ref]] = {}
        self._born: Category = "temporary"
        self._phase = ""
        self._total = 0
        self._peaks: dict[tuple[str, bool], Peak] = {}
        self.settled = 0
        self._stretch: Peak | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every call for the sake of compiled code, of which there is none here

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return self._total

    def peak(self, phase: str, *, without_gradients: bool = False) -> Peak:
        """The peak of a phase; `without_gradients`: of the bytes that are not (finished) gradients."""
        return self._peaks.get((phase, without_gradients), Peak())

    def stretch(self, settled: int = 0) -> Peak | None:
        """The peak since the last call; another stretch begins. settled: bytes of gradients that are not counted from now on, as if
        they had left."""
        last, self.settled = self._stretch, self.settled + settled
        self._stretch = Peak(-1)
        self._note()
        return last

    @contextmanager
    def phase(self, name: str, born: Category = "temporary") -> Iterator[None]:
        """Book peaks under `name`; tensors born inside are of category `born` until `mark` says otherwise."""
        before = self._phase, self._born
        self._phase, self._born = name, born
        self._note()
        try:
            yield
        finally:
            self._phase, self._born = before

    def mark(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Count these tensors, also ones born outside the mode, under `category` from now on."""
        for tensor in tensors:
            self._count(tensor, category)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:  # every other call
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        if self._fake and not _faking():
            return result
        self._count_all(result)
        workspace = WORKSPACE.get(func._schema.name)
        if workspace:
            self._note(workspace(args[0].shape) * args[0].element_size())
        return result

    def _count_all(self, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            self._count(result, None)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf, None)

    def _count(self, tensor: torch.Tensor, category: Category | None) -> None:
        if isinstance(tensor, Int8Weight):
            for part in tensor.parts().values():
                self._count(part, category)
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is None:
            kind = category or self._born
            self._alive[key] = (size, kind, weakref.ref(storage, lambda _: self._forget(key)))
            self._add(kind, size)
        elif category not in (None, known[1]) or size != known[0]:
            kind = category or known[1]
            self._add(known[1], -known[0])
            self._alive[key] = (size, kind, known[2])
            self._add(kind, size)

    def _forget(self, key: int) -> None:
        size, kind, _ = self._alive.pop(key)
        self._add(kind, -size)

    def _add(self, category: Category, size: int) -> None:
        self.current[category] += size
        self._total += size
        if size > 0:
            self._note()

    def _note(self, workspace: int = 0) -> None:
        total = self._total + workspace
        for without, seen in ((False, total), (True, total - self.current["gradient"])):
            peak = self._peaks.get((self._phase, without))
            if peak is None or seen > peak.total:
                parts = dict(self.current, temporary=self.current["temporary"] + workspace)
                self._peaks[self._phase, without] = Peak(seen, parts)
        if self._stretch is not None and total - self.settled > self._stretch.total:
            parts = dict(self.current, temporary=self.current["temporary"] + workspace)
            parts["gradient"] -= self.settled
            self._stretch = Peak(total - self.settled, parts)
