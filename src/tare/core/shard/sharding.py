"""Sharding: the optimizer's side of parameters that `fully_shard` has cut. Knows no method: it asks a transform what it must see.

Communication of a step: none for leaves stepped where they lie; for one with an owner its gradient and weight to the owner, and the
weight back, (N - 1) / N of each over the links: a round for each matrix of the rank that owns most of them, three all-to-alls a round.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.core.shard.exchange import Part, gather, numbers_of_all, scatter
from tare.core.shard.layout import Mesh, local
from tare.core.shard.places import Place, owned_by, steps_where_it_lies
from tare.core.state import State, allocate
from tare.core.storage import Storage
from tare.core.transform import Transform, Work

if TYPE_CHECKING:
    from tare.core.optimizer import Entry

MakeWork = Callable[[Tensor, "Entry", dict[str, Any], Tensor, Tensor], Work]  # p, entry, group, weight, gradient


class Sharding:
    """The places of one optimizer's leaves, and the rounds of its steps."""

    def __init__(self) -> None:
        self._loads: dict[Any, list[int]] = {}

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
        make: MakeWork,
        apply: Callable[[Transform, list[Work]], None],
        gradient: Callable[[Tensor], Tensor],
        count: Callable[[Tensor], None],
    ) -> None:
        """Step leaves that have owners. All ranks call this with the same leaves.

        Args:
            ready: parameter, group and entry of each.
            company: by the id of a transform with `together`: leaves that every rank has whole, and that share numbers with these.
            make: the work of a leaf from its whole weight and gradient.
            apply: steps whole leaves.
            gradient: of a parameter.
            count: counts a step that another rank has taken.
        """
        by_group: dict[Any, list[_Owned]] = defaultdict(list)
        for p, group, entry in ready:
            assert entry.place is not None
            assert entry.place.owner is not None
            by_group[entry.place.mesh.group].append(_Owned(p, group, entry, entry.place, entry.place.owner))
        for group, listed in by_group.items():
            together: dict[int, list[_Owned]] = defaultdict(list)
            alone: list[_Owned] = []
            for each in listed:
                (together[id(each.entry.transform)] if each.entry.transform.together else alone).append(each)
            for some in _rounds(alone):
                weight, grad = _collect(some, group, gradient)
                mine = _mine(some)
                if mine is not None:
                    assert weight is not None
                    assert grad is not None
                    apply(mine.entry.transform, [make(mine.p, mine.entry, mine.group, weight, grad)])
                _give_back(some, weight, group, count)
            for number, coupled in together.items():
                _step_together(coupled, company.get(number, []), group, make, gradient, count)


@dataclass
class _Owned:
    p: Tensor
    group: dict[str, Any]
    entry: "Entry"
    place: Place
    owner: int
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = local(self.p.detach())

    def part(self, rows: Tensor) -> Part:
        return Part(rows, self.place.mesh.shape, self.place.mesh.layout, self.owner)


def _rounds(listed: Sequence[_Owned]) -> list[list[_Owned]]:
    """At most one leaf of each owner at a time, in the order of the leaves."""
    by_owner: dict[int, list[_Owned]] = defaultdict(list)
    for each in listed:
        by_owner[each.owner].append(each)
    most = max(map(len, by_owner.values()), default=0)
    return [[own[number] for own in by_owner.values() if number < len(own)] for number in range(most)]


def _mine(some: Sequence[_Owned]) -> _Owned | None:
    return next((each for each in some if each.place.mine), None)


def _collect(
    some: Sequence[_Owned], group: object, gradient: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and gradient of the leaf that this rank owns."""
    device = some[0].rows.device
    weight = gather([each.part(each.rows) for each in some], group, device)
    grad = gather([each.part(local(gradient(each.p))) for each in some], group, device)
    return weight, grad


def _give_back(some: Sequence[_Owned], weight: Tensor | None, group: object, count: Callable[[Tensor], None]) -> None:
    scatter([each.part(each.rows) for each in some], weight, group, some[0].rows.device)
    for each in some:
        if not each.place.mine:
            count(each.p)


def _step_together(
    listed: Sequence[_Owned], company: list[Work], group: object, make: MakeWork,
    gradient: Callable[[Tensor], Tensor], count: Callable[[Tensor], None],
) -> None:  # fmt: skip
    """Leaves that share numbers: each owner holds its own ones until everybody's numbers are known."""
    transform: Transform = listed[0].entry.transform
    rounds = _rounds(listed)
    weights, works = [], []
    for some in rounds:
        weight, grad = _collect(some, group, gradient)
        weights.append(weight)
        if (mine := _mine(some)) is not None:
            assert weight is not None
            assert grad is not None
            works.append(make(mine.p, mine.entry, mine.group, weight, grad))
    own, beside = transform.listen_many(works), transform.listen_many(company)
    everyone = [*numbers_of_all(own, group, listed[0].rows.device), *beside]
    transform.update_told(works, own, everyone)
    transform.update_told(company, beside, everyone)
    for some, weight in zip(rounds, weights, strict=True):
        _give_back(some, weight, group, count)


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
