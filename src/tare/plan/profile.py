"""What was found out about one micro-batch: the moments at which memory is highest, and the stretches between them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tare.plan.tracker import Peak


@dataclass(frozen=True)
class Moment:
    """Bytes beyond weights and optimizer state at one moment of a step."""

    activations: int = 0  # kept by the forward pass, and the batch itself
    gradients: int = 0  # finished ones
    temporaries: int = 0  # made in backward: recomputed activations, gradients on their way
    gathered: int = 0  # where weights are sharded: those that are whole, and the buffers of what ranks send each other

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.gradients + self.temporaries + self.gathered

    def plus(self, *, gradients: int = 0, temporaries: int = 0, gathered: int = 0) -> "Moment":
        """The same moment with more."""
        return Moment(
            self.activations, self.gradients + gradients, self.temporaries + temporaries, self.gathered + gathered
        )

    @classmethod
    def of(cls, peak: Peak) -> "Moment":
        """What a tracker saw."""
        return cls(peak["activation"] + peak["input"], peak["gradient"], peak["temporary"], peak["gathered"])


def highest(moments: "list[Moment]") -> Moment:
    """The one with the largest total; nothing of none."""
    return max(moments, key=lambda moment: moment.total, default=Moment())


@dataclass(frozen=True)
class LeafMoment:
    """The moment in backward at which a parameter's gradient is finished, with all earlier gradients gone (release)."""

    name: str
    others: Moment  # this gradient counts among the temporaries
    gradient: int


@dataclass(frozen=True)
class Stretch:
    """What lies between two moments at which a unit of the model begins or ends.

    phase: of the step. begins: how it begins: the phase itself ("phase"), a unit begins ("enter") or ends ("leave") in it, or all is
    over ("end", a stretch without length).
    unit: its number in the order of the model; -1 for the model around them. start: the moment at which it begins; highest: its
    highest. Gradients are those of units that have not ended: the others are not counted.
    """

    phase: Literal["forward", "backward", "evaluation"]
    begins: Literal["phase", "enter", "leave", "end"]
    unit: int
    start: Moment
    highest: Moment


@dataclass(frozen=True)
class StepProfile:
    """Peaks of one micro-batch. Weights (with buffers) are constant; optimizer state is not in here."""

    weights: int
    gradients: int  # of all parameters together
    forward: Moment  # at the end of forward, nearly always
    backward: Moment  # gradients accumulating
    released: Moment  # the same if every gradient vanished as soon as it was finished
    evaluation: Moment  # forward without grad
    leaves: tuple[LeafMoment, ...]
    stretches: tuple[Stretch, ...] = field(default=())  # of forward and backward, one after the other


def decode(data: dict[str, Any]) -> StepProfile:
    """A profile from the plain values that `dataclasses.asdict` made of it; raises where they are damaged."""
    moments = {key: Moment(**data[key]) for key in ("forward", "backward", "released", "evaluation")}
    leaves = tuple(LeafMoment(x["name"], Moment(**x["others"]), x["gradient"]) for x in data["leaves"])
    stretches = tuple(
        Stretch(x["phase"], x["begins"], x["unit"], Moment(**x["start"]), Moment(**x["highest"]))
        for x in data["stretches"]
    )
    if not all(isinstance(n, int) and n >= 0 for m in moments.values() for n in (m.activations, m.total)):
        raise ValueError("damaged cache entry")
    return StepProfile(data["weights"], data["gradients"], **moments, leaves=leaves, stretches=stretches)
