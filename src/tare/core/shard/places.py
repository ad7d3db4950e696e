"""Places: where each leaf is stepped. By pure functions of leaves, state and the number of ranks, so that a planner can ask them too.

A leaf whose rule works element by element is stepped where its rows lie, without communication. One that must be seen whole has an owner:
one rank, to which gradient and weight come for the length of its step, and which alone keeps its state.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from tare.core.leaf import Leaf
from tare.core.shard.layout import Layout, Mesh, local
from tare.core.storage import Slot
from tare.core.transform import Transform

LASTING = ("active",)  # counts that every rank keeps of a leaf, beside `step`: whether its block is on


def steps_where_it_lies(transforms: Iterable[Transform], slots: Mapping[str, Slot], leaf: Leaf, size: int) -> bool:
    """Whether each rank can step its own rows of a leaf, and keep their state as pieces of the whole one, bit for bit.

    Args:
        transforms: whatever may ever act on the leaf.
        slots: its whole state.
        leaf: the whole leaf.
        size: ranks.
    """
    layout = Layout(leaf.shape[0], size, 0) if leaf.shape else None
    cut = ("elementwise", "rows") if len(leaf.shape) > 1 else ("elementwise",)  # a vector is one row
    by_rows = all(transform.sharding in cut for transform in transforms)
    return by_rows and layout is not None and all(_cuts(slot, leaf, layout) for slot in slots.values())


def _cuts(slot: Slot, leaf: Leaf, layout: Layout) -> bool:
    """Whether a piece of state can be cut where the leaf's rows are."""
    if slot.form == "count":
        return True
    if slot.spec.shape != leaf.shape or slot.affine or slot.form == "seed":
        return False
    if not all(slot.holds_rows(*layout.cut(rank)) for rank in range(layout.size)):
        return False
    for _, shape, _ in slot.parts():  # packed codes and scales are flat: so many to a row, and cut at the same rows
        per, rest = divmod(shape[0], max(layout.rows, 1))
        flat = Layout(shape[0], layout.size, 0)
        if rest or any(flat.cut(r) != tuple(per * row for row in layout.cut(r)) for r in range(layout.size)):
            return False
    return True


def owned_by(leaves: Sequence[Leaf], size: int, loads: list[int] | None = None) -> list[int]:
    """The owner of each leaf: the largest first, each to the rank that has least; ties to the lowest.

    Args:
        leaves: those that need one.
        size: ranks.
        loads: elements that each rank owns already; brought up to date.

    >>> from tare.core.leaf import Leaf
    >>> import torch
    >>> owned_by([Leaf(str(n), (n, 1), torch.float32, "linear") for n in (2, 9, 4, 4)], 2)
    [1, 0, 1, 1]
    """
    loads = [0] * size if loads is None else loads
    found = [0] * len(leaves)
    for at in sorted(range(len(leaves)), key=lambda at: (-leaves[at].numel, leaves[at].name)):
        found[at] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[found[at]] += leaves[at].numel
    return found


class HasOwner(Protocol):
    """A leaf, or what stands for one."""

    @property
    def owner(self) -> int: ...


L = TypeVar("L", bound=HasOwner)


def rounds(listed: Sequence[L]) -> list[list[L]]:
    """Leaves by rounds: at most one of each owner at a time, in the order of the leaves."""
    by_owner: dict[int, list[L]] = defaultdict(list)
    for each in listed:
        by_owner[each.owner].append(each)
    most = max(map(len, by_owner.values()), default=0)
    return [[own[number] for own in by_owner.values() if number < len(own)] for number in range(most)]


@dataclass(frozen=True)
class Place:
    """Where one leaf is stepped. owner: the rank, in the group that the leaf is cut among, or None: each rank its own rows."""

    mesh: Mesh
    owner: int | None = None

    @property
    def lies(self) -> bool:
        """Whether it is stepped where it lies."""
        return self.owner is None

    @property
    def mine(self) -> bool:
        """Whether this rank steps the whole leaf."""
        return self.owner == self.mesh.layout.rank

    def leaf(self, leaf: Leaf) -> Leaf:
        """The leaf as this rank steps it."""
        return replace(leaf, shape=self.mesh.own_shape) if self.lies else leaf

    def slots(self, slots: Mapping[str, Slot]) -> dict[str, Slot]:
        """What this rank keeps of a leaf's state."""
        if self.lies:
            return {name: self._piece(slot) for name, slot in slots.items()}
        return {name: slot for name, slot in slots.items() if self.mine or name in LASTING}

    def _piece(self, slot: Slot) -> Slot:
        if slot.form == "count":
            return slot
        return replace(slot, spec=replace(slot.spec, shape=(self.mesh.own_shape[0], *slot.spec.shape[1:])))

    def wrap(self, raw: dict[str, Any], slots: Mapping[str, Slot]) -> dict[str, Any]:
        """This rank's state as it is kept: DTensors that lie like the leaf, where the leaf is stepped where it lies."""
        if not self.lies:
            return raw
        shapes = {name: shape for slot in slots.values() for name, shape, _ in slot.parts()}
        return {
            name: self.mesh.wrap(value, shapes[name]) if isinstance(value, Tensor) else value
            for name, value in raw.items()
        }

    def take(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank keeps of a state that may be whole: its own pieces; all, as owner; else the counts that last."""
        if self.lies:
            return {name: self._own(value) for name, value in raw.items()}
        return {name: value for name, value in raw.items() if self.mine or name in ("step", *LASTING)}

    def _own(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or local(value) is not value:
            return value
        return self.mesh.wrap(self.mesh.cut(value), tuple(value.shape))
