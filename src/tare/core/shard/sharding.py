"""Sharding: the optimizer's side of parameters that `fully_shard` has cut. Knows no method: it asks a transform what it must see.

Communication of a step: none for leaves stepped where they lie; small sums for those that can be taken apart (`apart`); for the rest
gradient and weight to the owner, and the weight back, (N - 1) / N of each over the links: a round for each matrix of the rank that owns
most of them, three all-to-alls a round.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.core.shard.apart_steps import ApartSteps
from tare.core.shard.layout import Mesh, local
from tare.core.shard.owned import Engine, Owned, step_together, step_whole
from tare.core.shard.places import Place, owned_by, steps_where_it_lies
from tare.core.state import State, allocate
from tare.core.storage import Storage
from tare.core.transform import Work

if TYPE_CHECKING:
    from tare.core.optimizer import Entry


class Sharding:
    """The places of one optimizer's leaves, and the rounds of its steps."""

    def __init__(self) -> None:
        self._loads: dict[Any, list[int]] = {}
        self._apart = ApartSteps()

    # -- places ----------------------------------------------------------------------------------------------------

    def settle(self, fresh: dict[Tensor, "Entry"], storage: Storage) -> None:
        """Give leaves that are cut their places. fresh: those that have none."""
        owned: dict[Any, list[tuple[Entry, Mesh]]] = defaultdict(list)
        for p, entry in fresh.items():
            mesh = Mesh.of(entry.leaf.name, p)
            if isinstance(local(p), Int8Weight):
                raise InputError(f"{entry.leaf.name}: int8 weights cannot be cut by fully_shard; keep them as floats")
            rotation = entry.rotating.rotation if entry.rotating is not None else None
            if rotation is not None and rotation.order.scored:
                raise InputError(
                    f"{entry.leaf.name}: the order {rotation.order.describe()} compares gradients of whole leaves, which fully_shard "
                    "cuts; use another order, or DDP"
                )
            kept = [storage.slots(entry.leaf, transform.spec(entry.leaf)) for transform in entry.phases]
            if all(steps_where_it_lies(entry.phases, slots, entry.leaf, mesh.layout.size) for slots in kept):
                entry.place = Place(mesh)
            else:
                owned[mesh.group].append((entry, mesh))
        for group, listed in owned.items():
            loads = self._loads.setdefault(group, [0] * listed[0][1].layout.size)
            owners = owned_by([entry.leaf for entry, _ in listed], len(loads), loads)
            for (entry, mesh), owner in zip(listed, owners, strict=True):
                entry.place = Place(mesh, owner)

    @staticmethod
    def check_release(entries: Iterable["Entry"]) -> None:
        """Raise InputError for a leaf that cannot be stepped inside backward, because it is whole only where its owner is."""
        for entry in entries:
            if entry.place is not None and not entry.place.lies:
                raise InputError(
                    f"release: {entry.leaf.name} is stepped whole ({entry.transform.describe()}), and fully_shard cuts it: its rows come "
                    "together only when all leaves step; use release=False, or a method that steps element by element"
                )

    @staticmethod
    def describe(entries: Iterable["Entry"]) -> list[str]:
        """A line for tables, where any leaf is cut."""
        places = [entry.place for entry in entries if entry.place is not None]
        if not places:
            return []
        owned = [place for place in places if not place.lies]
        mine = sum(place.mine for place in owned)
        ranks = places[0].mesh.layout.size
        return [
            f"cut by fully_shard among {ranks} ranks: {len(places) - len(owned)} leaves are stepped where their rows lie, "
            f"{len(owned)} on their owners, {mine} of them here; bytes are this rank's"
        ]

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(
        self,
        ready: Sequence[tuple[Tensor, dict[str, Any], "Entry"]],
        company: Mapping[int, list[Work]],
        engine: Engine,
    ) -> None:
        """Step leaves that have owners. All ranks call this with the same leaves.

        Args:
            ready: parameter, group and entry of each.
            company: by the id of a transform with `together`: leaves that every rank has whole, and that share numbers with these.
            engine: the optimizer.
        """
        by_group: dict[Any, list[Owned]] = defaultdict(list)
        for p, group, entry in ready:
            by_group[_place(entry).mesh.group].append(Owned.of(p, group, entry))
        for ranks, listed in by_group.items():
            together: dict[int, list[Owned]] = defaultdict(list)
            alone: list[Owned] = []
            for each in listed:
                (together[id(each.entry.transform)] if each.entry.transform.together else alone).append(each)
            self._apart.step([each for each in alone if each.apart is not None], ranks, engine)
            left = [each for each in alone if not each.done]
            self._apart.forget(each.p for each in left)
            step_whole(left, ranks, engine)
            for number, coupled in together.items():
                step_together(coupled, company.get(number, []), ranks, engine)

    def forget(self) -> None:
        """State has been loaded: what ranks hold beside it is no longer what owners think."""
        self._apart.forget()


def _place(entry: "Entry") -> Place:
    assert entry.place is not None
    return entry.place


def fresh(entry: "Entry", p: Tensor) -> dict[str, Any]:
    """The state of a leaf at its beginning, as much of it as this rank keeps."""
    if entry.place is None:
        return allocate(entry.slots, p.device)
    return entry.place.wrap(allocate(entry.place.slots(entry.slots), p.device), entry.slots)


class Pieces(dict[str, Any]):
    """State of a leaf stepped where it lies, as a rule sees it: this rank's pieces; numbers are written through."""

    def __init__(self, raw: dict[str, Any]):
        super().__init__({name: local(value) for name, value in raw.items()})
        self._raw = raw

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        assert not isinstance(value, Tensor), "state tensors are changed in place"
        self._raw[name] = value


def view(entry: "Entry", raw: dict[str, Any], key: int) -> State:
    """The state of a leaf that this rank steps, its pieces or all of it."""
    if entry.place is None or not entry.place.lies:
        return State(raw, entry.slots, key=key)
    return State(Pieces(raw), entry.place.slots(entry.slots), key=key)
