"""Turns: the engine's side of rotating blocks. A leaf's state exists while its block is on, is freed when the block goes off, and is
fresh when it comes on, also if it was on before.

The count of finished updates stands in the parameter groups and `active` in every leaf's state, so a checkpoint says all there is
to know. Knows no method: a transform takes part by having a `rotation` (see `core.blocks`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tare.core.accounting import Row
from tare.core.blocks import ALWAYS, Rotation
from tare.core.errors import CheckpointError, InputError
from tare.core.orders import Turn
from tare.core.shard import sharding
from tare.core.storage import LOW, MASTER, Slot, Storage
from tare.core.transform import StateSpec, Transform, Work

if TYPE_CHECKING:
    from tare.core.optimizer import Entry

UPDATES = "updates"  # in every parameter group: finished updates of the whole optimizer
ACTIVE = "active"  # in the state of a leaf that takes turns: 1 while its block is on
# Parameters that some optimizer has switched off, so that the next one does not take them for frozen.
_RESTING: WeakIdKeyDictionary = WeakIdKeyDictionary()


def wake(p: Tensor) -> None:
    """Give a parameter its gradients back if an optimizer that took turns has left it without."""
    if _RESTING.pop(p, None):
        p.requires_grad_(True)


@dataclass
class Wheel:
    """The leaves of one rotation: the block of each, and what is on."""

    rotation: Rotation
    block: dict[Tensor, str | None] = field(default_factory=dict)
    on: tuple[str, ...] = ()
    number: int = 0  # of the turn that is on

    def blocks(self, leaves: Iterable[Tensor]) -> dict[str, list[Tensor]]:
        """Block -> those of its leaves that are given, in the model's order."""
        found: dict[str, list[Tensor]] = {}
        for p in leaves:
            name = self.block[p]
            if name not in (None, ALWAYS):
                found.setdefault(name, []).append(p)
        return found

    def is_on(self, p: Tensor, on: Iterable[str] | None = None) -> bool:
        name = self.block[p]
        return name is not None and (name == ALWAYS or name in (self.on if on is None else on))


class Turns:
    """The rotations of one optimizer, and their clock.

    Args:
        entries: the optimizer's; transform and slots of a leaf are replaced when its block goes on or off.
        groups: its parameter groups.
        storage: how state is kept.
    """

    def __init__(self, entries: dict[Tensor, "Entry"], groups: list[dict[str, Any]], storage: Storage):
        self._entries, self._groups, self._storage = entries, groups, storage
        self.wheels: list[Wheel] = []
        self.off: set[Tensor] = set()  # what we have switched off, and nobody else
        self._moved = False

    # -- what is what ----------------------------------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Finished updates of the whole optimizer."""
        return max(int(group.get(UPDATES, 0)) for group in self._groups)

    @property
    def seed(self) -> int:
        return int(self._groups[0]["seed"])

    def member(self, p: Tensor) -> bool:
        """Whether it takes part now: it does not while the user keeps it frozen."""
        return p.requires_grad or p in self.off

    def phase(self, p: Tensor, active: bool) -> tuple[Transform, dict[str, Slot]]:
        """The transform and the state of a leaf whose block is on, or off."""
        entry, wheel = self._entries[p], self._wheel(p)
        transform = self._rotating(entry).turn(active)
        specs = {ACTIVE: StateSpec((), "count", init=int(active)), **wheel.rotation.order.spec()}
        if wheel.block[p] is None:
            specs = {ACTIVE: specs[ACTIVE]}
        slots = self._storage.slots(entry.leaf, {**transform.spec(entry.leaf), **specs})
        if transform.rests:
            slots.pop(MASTER, None)
        return transform, slots

    def slots(self, p: Tensor, raw: Mapping[str, Any]) -> dict[str, Slot]:
        """The state that a saved leaf should have, by what it says of itself."""
        return self.phase(p, bool(raw.get(ACTIVE, self._wheel(p).is_on(p))))[1]

    @staticmethod
    def _rotating(entry: "Entry") -> Transform:
        assert entry.rotating is not None
        return entry.rotating

    def _wheel(self, p: Tensor) -> Wheel:
        return next(wheel for wheel in self.wheels if p in wheel.block)

    # -- arranging -------------------------------------------------------------------------------------------------

    def arrange(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """(Re)form the blocks after leaves have come. New ones join the turn that is on; before the first update it is chosen
        anew."""
        now = self.updates
        for group in self._groups:
            group[UPDATES] = now
        old = {p: wheel for wheel in self.wheels for p in wheel.block}
        wheels: list[Wheel] = []
        for p, entry in self._entries.items():
            if entry.rotating is None:
                continue
            rotation = entry.rotating.rotation
            assert rotation is not None
            wheel = next((w for w in wheels if w.rotation == rotation), None)
            if wheel is None:
                before = next((w for w in self.wheels if w.rotation == rotation), Wheel(rotation))
                wheel = Wheel(rotation, {}, before.on, before.number)
                wheels.append(wheel)
            wheel.block[p] = None
        for wheel in wheels:
            names = wheel.rotation.blocks.names([self._entries[p].leaf for p in wheel.block])
            wheel.block = dict(zip(wheel.block, names, strict=True))
        self.wheels = wheels
        for wheel in wheels:
            if now == 0 or not any(wheel.is_on(p) for p in wheel.block):
                wheel.on, wheel.number = self._choose(wheel, state), wheel.rotation.number(now)
                changed = [p for p in wheel.block if self._differs(wheel, p)]
            else:
                changed = [p for p in wheel.block if p not in old]
            self._renew(wheel, changed, state)

    def _differs(self, wheel: Wheel, p: Tensor) -> bool:
        """Whether what the engine has for a leaf is not what the wheel says."""
        entry = self._entries[p]
        known = entry.slots.get(ACTIVE)
        return known is None or bool(known.spec.init) != wheel.is_on(p)

    def _choose(self, wheel: Wheel, state: Mapping[Tensor, Mapping[str, Any]]) -> tuple[str, ...]:
        """The blocks for the turn that begins after the updates so far."""
        rotation, updates = wheel.rotation, self.updates
        blocks = wheel.blocks(p for p in wheel.block if self.member(p))
        names = tuple(blocks)
        scores: tuple[float | None, ...] = ()
        if rotation.order.scored and updates:
            kept = [[state[p] for p in leaves if p in state] for leaves in blocks.values()]
            scores = tuple(rotation.order.score(name, own) for name, own in zip(names, kept, strict=True))
        count = rotation.on(len(names))
        turn = Turn(names, count, rotation.number(updates), updates, self.seed, scores)
        chosen = rotation.order.select(turn) if names else []
        if not all(0 <= b < len(names) for b in chosen):
            raise InputError(f"order: it chose blocks {chosen}, but there are {len(names)}, counted from 0")
        return tuple(dict.fromkeys(names[b] for b in chosen))

    def _renew(self, wheel: Wheel, leaves: Iterable[Tensor], state: dict[Tensor, dict[str, Any]]) -> None:
        """Give these leaves what their block's being on or off means. All that goes is freed before anything comes."""
        carried: dict[Tensor, dict[str, Any]] = {}
        leaves = list(leaves)
        for p in leaves:
            entry = self._entries[p]
            entry.transform, entry.slots = self.phase(p, wheel.is_on(p))
            entry.key = self._key(wheel, p)
            if p in state:
                old = state.pop(p)
                # A part of the weight itself, and what is known of its gradient.
                lasting = {LOW, *wheel.rotation.order.spec()}
                if not self._rotating(entry).turn(False).rests:
                    lasting.add(MASTER)
                carried[p] = {name: old[name] for name in lasting if name in old and name in entry.slots}
                old.clear()
        for p, kept in carried.items():
            state[p] = {**sharding.fresh(self._entries[p], p), **kept}

    def _key(self, wheel: Wheel, p: Tensor) -> str:
        """The name by which a leaf draws random numbers: its count starts anew with every turn, its numbers must not."""
        lasts = wheel.block[p] == ALWAYS and not wheel.rotation.reset_always
        return self._entries[p].name_key + (f"@{wheel.number}" if wheel.number and not lasts else "")

    # -- turning ---------------------------------------------------------------------------------------------------

    def observe(self, work: Work, p: Tensor) -> None:
        """A leaf is about to be stepped."""
        self.moved()
        wheel = next((wheel for wheel in self.wheels if p in wheel.block), None)
        if wheel is not None and wheel.rotation.order.scored and wheel.block[p] is not None and work.compressed is None:
            wheel.rotation.order.observe(work.grad, work.state.raw)

    def moved(self) -> None:
        """A leaf is about to be stepped, here or on another rank."""
        self._moved = True

    def advance(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """The end of an update, at which a turn may begin. Nothing happens where no leaf was stepped."""
        if not self._moved:
            return
        self._moved = False
        now = self.updates + 1
        for group in self._groups:
            group[UPDATES] = now
        turned = False
        for wheel in self.wheels:
            if wheel.rotation.number(now) != wheel.number:
                wheel.on, wheel.number = self._choose(wheel, state), wheel.rotation.number(now)
                again = wheel.rotation.reset_always
                self._renew(wheel, [p for p in wheel.block if again or wheel.block[p] != ALWAYS], state)
                turned = True
        if turned:
            self.gate()

    def gate(self) -> None:
        """Switch gradients on and off as the blocks are, where rotations say so. Hooks on a leaf outlast this."""
        for wheel in self.wheels:
            for p in wheel.block if wheel.rotation.gate else ():
                if p.is_meta:  # a model on paper serves many optimizers
                    continue
                if wheel.is_on(p):
                    if p in self.off:
                        self._switch_on(p)
                elif p.requires_grad:
                    p.requires_grad_(False)
                    p.grad = None
                    self.off.add(p)
                    _RESTING[p] = True

    def _switch_on(self, p: Tensor) -> None:
        p.requires_grad_(True)
        self.off.discard(p)
        _RESTING.pop(p, None)

    def open(self) -> None:
        """Give every leaf its gradients back: the optimizer is done."""
        for p in list(self.off):
            self._switch_on(p)

    # -- loading ---------------------------------------------------------------------------------------------------

    def check(self, loaded: Mapping[Tensor, Mapping[str, Any]], updates: int) -> None:
        """Raise CheckpointError where saved state lacks the blocks that are on: what it lost would start from zero unseen."""
        for wheel in self.wheels:
            blocks = wheel.blocks(p for p in wheel.block if p in loaded)
            lost = [p for p in wheel.block if p not in loaded and self.member(p)]
            expected = wheel.rotation.on(len(wheel.blocks(wheel.block)))
            found = any(loaded[p].get(ACTIVE) for leaves in blocks.values() for p in leaves)
            if updates and loaded and lost and expected and not found:
                raise CheckpointError(
                    f"load_state_dict: no block of leaves is on in this state, and {self._entries[lost[0]].leaf.name!r} is not in "
                    "it; tools that save only what has requires_grad lose it, so save and load optimizer.state_dict() itself"
                )

    def recall(self, loaded: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Take up the turn of a loaded state: which blocks are on is what their leaves' states say."""
        self._moved = False
        for wheel in self.wheels:
            on = [
                n
                for n, leaves in wheel.blocks(wheel.block).items()
                if any(loaded.get(p, {}).get(ACTIVE) for p in leaves)
            ]
            if not on and not any(p in loaded for p in wheel.block):
                continue
            wheel.on, wheel.number = tuple(on), wheel.rotation.number(self.updates)
            for p in wheel.block:
                entry = self._entries[p]
                entry.transform, entry.slots = self.phase(p, wheel.is_on(p))
                entry.key = self._key(wheel, p)

    # -- accounts --------------------------------------------------------------------------------------------------

    def worst(self, listed: list[Tensor]) -> dict[Tensor, Row]:
        """The accounts of the listed leaves that take turns, at the turn with the most state."""
        rows: dict[Tensor, Row] = {}
        for wheel in self.wheels:
            own = [p for p in listed if p in wheel.block]
            phases = {p: [self._row(wheel, p, active) for active in (False, True)] for p in own}
            extra = {
                name: sum(phases[p][1].bytes - phases[p][0].bytes for p in leaves)
                for name, leaves in wheel.blocks(own).items()
            }
            on = self._heaviest(wheel, extra)
            rows.update({p: phases[p][wheel.is_on(p, on)] for p in own})
        return rows

    def _row(self, wheel: Wheel, p: Tensor, active: bool) -> Row:
        entry = self._entries[p]
        transform, slots = self.phase(p, active)
        why = {None: "never trained", ALWAYS: "always on"}.get(wheel.block[p], "on" if active else "off")
        kept = slots if entry.place is None else entry.place.slots(slots)
        return Row(entry.leaf, transform, kept, f"{why}; {entry.why}" if entry.why else why)

    def _heaviest(self, wheel: Wheel, weights: Mapping[str, int], first: str | None = None) -> list[str]:
        """The selection of the largest total weight that ever comes, among those with block `first` if given."""
        names = tuple(weights)
        count = wheel.rotation.on(len(names))
        ways = wheel.rotation.order.selections(names, count) if names else []
        if ways is None:
            ranked = sorted(names, key=lambda name: (name != first, -weights[name]))
            return ranked[:count]
        sets = [list(dict.fromkeys(names[b] for b in way)) for way in ways]
        sets = [way for way in sets if first is None or first in way] or sets
        return max(sets, key=lambda way: sum(weights[name] for name in way), default=[])

    def trained(self) -> list[list[Tensor]]:
        """Where gradients are gated: the leaves that have them at the turns that may need most memory, which are the one with the
        largest gradients and the one that keeps most activations, because its block is nearest to the input. Else nothing."""
        found: list[list[Tensor]] = []
        for wheel in self.wheels:
            if not wheel.rotation.gate:
                continue
            gated = {p for other in self.wheels if other.rotation.gate for p in other.block}
            rest = [p for p, e in self._entries.items() if p not in gated and (p.requires_grad or p in self.off)]
            blocks = wheel.blocks(wheel.block)
            sizes = {name: sum(p.numel() * p.element_size() for p in leaves) for name, leaves in blocks.items()}
            ways = [self._heaviest(wheel, sizes, first) for first in (None, next(iter(blocks), None))]
            for way in ways:
                leaves = {p for p in wheel.block if wheel.is_on(p, way)}.union(rest)
                listed = [p for p in self._entries if p in leaves]
                if not any(len(listed) == len(other) and set(listed) == set(other) for other in found):
                    found.append(listed)
        return found

    def describe(self) -> list[str]:
        """A line for each rotation."""
        lines = []
        for wheel in self.wheels:
            blocks = wheel.blocks(wheel.block)
            count, rotation = wheel.rotation.on(len(blocks)), wheel.rotation
            now = ", ".join(wheel.on[:4]) + (", ..." if len(wheel.on) > 4 else "")
            lines.append(
                f"turns: {count} of {len(blocks)} blocks hold state at a time, for {rotation.period} updates, order "
                f"{rotation.order.describe()}; the table shows the turn with most state; on now: {now or 'none'}"
            )
        return lines
