"""Entry: one parameter as the engine knows it."""

from dataclasses import dataclass
from typing import Any

from tare.core.leaf import Leaf
from tare.core.shard.places import Place
from tare.core.storage import Slot
from tare.core.transform import Transform


@dataclass
class Entry:
    """A leaf, what steps it, and its whole state; `place` says which part of both this rank has, where ranks share the leaf."""

    leaf: Leaf
    transform: Transform
    slots: dict[str, Slot]
    decay: Any
    key: str
    why: str
    group: dict[str, Any]
    phase: float = 0.0
    name_key: str = ""  # `key` before anything is added to it
    rotating: Transform | None = None  # where the leaf takes turns: what gives `transform` its phases
    place: Place | None = None  # None: all of it is here

    @property
    def phases(self) -> tuple[Transform, ...]:
        """Whatever may ever act on the leaf."""
        return (self.transform,) if self.rotating is None else (self.rotating.turn(True), self.rotating.turn(False))

    @property
    def projects(self) -> bool:
        """Whether micro-batches in release mode leave something smaller than the gradient."""
        return self.transform.accumulates and type(self.transform).compress is not Transform.compress

    @property
    def held(self) -> dict[str, Slot]:
        """The state that this rank keeps."""
        return self.slots if self.place is None else self.place.slots(self.slots)
