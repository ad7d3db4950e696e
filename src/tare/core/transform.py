"""Transform: a rule, or a wrapper around one; what it declares (state specs) and what it is told at each step.

A transform is a frozen dataclass of hyperparameters. It never holds tensors: state lives in the optimizer, described by `StateSpec`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tare.core.leaf import Leaf
from tare.core.random import make_key

if TYPE_CHECKING:
    from tare.core.blocks import Rotation
    from tare.core.delta import Delta
    from tare.core.kept import Kept
    from tare.core.shard.apart import Apart
    from tare.core.state import State
    from tare.core.storage import Slot

Kind = Literal["moment", "basis", "exact", "count"]
Sharding = Literal["elementwise", "rows", "columns", "matrix"]
Decay = Literal["before", "after", "prox", "l2"]  # see Recipe


@dataclass(frozen=True)
class StateSpec:
    """One named piece of state, symbolically.

    kind: `moment` (may be quantised by the storage policy), `basis` (kept by the basis policy), `exact` (never
    quantised) or `count` (a Python int, no bytes). signed: False for second moments, which picks the 8-bit map.
    init: the value it starts from. seedable: a basis that can be drawn again from its key. form: overrules the storage
    policy with one of its forms (`affine8`, `affine4`), for state whose storage is the method's own choice.
    transposed: affine groups run over the transposed matrix (Q-GaLore's code keeps a right basis as [r, s]).
    """

    shape: tuple[int, ...]
    kind: Kind = "moment"
    signed: bool = True
    dtype: torch.dtype | None = None
    init: float = 0.0
    seedable: bool = False
    form: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Step:
    """What a transform is told about one step of one leaf.

    count: 1-based number of this update of the leaf. key: the leaf's name for randomness. phase: the leaf's share
    in [0, 1) of a staggered period. weight: the parameter itself, to read only. options: its parameter group.
    kept: how the weight is kept where that is more than `weight` shows. past: the gradients of former steps, for rules that recall.
    """

    lr: float
    count: int
    leaf: Leaf
    weight: Tensor
    key: str = ""
    seed: int = 0
    phase: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: "Kept | None" = None
    past: "Former | None" = None

    def random_key(self, number: int, purpose: str = "") -> int:
        """Key of the counter-based generator for draw `number` of this leaf."""
        return make_key(self.seed, self.key + ("/" + purpose if purpose else ""), number)

    def betas(self, default: tuple[float, float]) -> tuple[float, float]:
        """The group's betas, which schedulers may change, or the rule's own."""
        given = self.options.get("betas", default)
        return float(given[0]), float(given[1])

    def since(self, count: int) -> "Step":
        """The same step, counted from a reset."""
        return replace(self, count=count)


class Former(Protocol):
    """The gradients of a leaf at former steps of the run, put together again when they are asked for."""

    latest: int  # number of the last one; -1 where there is none

    def __call__(self, start: int, stop: int, since: int = 0, most: int | None = None) -> Iterator[Tensor]:
        """Elements start .. stop - 1, flat, oldest first: of steps from number `since` on, and of the last `most` of them."""
        ...

    def older(self, most: int | None) -> tuple[int, float]:
        """How many steps lie before the last `most`, and what is kept of their mean squares."""
        ...


@dataclass
class Work:
    """One leaf's whole job in one step, as the fast paths see it."""

    weight: Tensor
    grad: Tensor
    state: "State"
    step: Step
    weight_decay: float
    decay: Decay
    maximize: bool
    compressed: Tensor | None = None
    noise: int | None = None  # key of stochastic rounding of the weight; None rounds to nearest
    kept: "Kept | None" = None  # how the weight is kept where it is not just a tensor

    @property
    def shrink(self) -> float:
        """The factor of decoupled weight decay: 1 - lr wd; its proximal form 1 / (1 + lr wd); none where it is coupled."""
        amount = self.step.lr * self.weight_decay
        if self.decay == "prox":
            return 1.0 / (1.0 + amount)
        return 1.0 if self.decay == "l2" else 1.0 - amount

    @property
    def gain(self) -> float:
        """lr, or lr times the decay when that comes after the update: one factor for one pass."""
        return self.step.lr * self.late_shrink

    @property
    def late_shrink(self) -> float:
        """The part of the decay that multiplies the update too: all of it when it comes after, else none."""
        return self.shrink if self.decay in ("after", "prox") else 1.0

    @property
    def coupled(self) -> bool:
        """Whether decay enters through the gradient, G + wd W: then the rule has to see that sum."""
        return self.decay == "l2" and self.weight_decay != 0.0


class Transform:
    """Base of all rules and wrappers.

    `sharding` says how much of the leaf one update must see; `elementwise` lets the engine work in chunks.
    """

    sharding: ClassVar[Sharding] = "elementwise"
    rate: float = 1.0  # its own multiple of the group's learning rate
    fuses: ClassVar[tuple[str, ...]] = (
        "stochastic",
    )  # forms of weights, plain ones apart, that `update_many` can write
    workspace: float = (
        1.0  # matrices of the leaf's size (fp32) that an ordinary step may need beside weight, gradient and state
    )
    accumulates: ClassVar[bool] = False  # whether `compress` exists: small exact accumulation between micro-batches
    drawn: bool = False  # whether what a due step computes is drawn from a key, so that it needs no gradient
    recalls: int | None = 0  # gradients of former steps that it wants to be told again (`Step.past`); None: all of them
    proportional: float | None = None  # U = this x G and no state, where that is all: then nobody needs G itself
    reads_weight: bool = False  # whether U depends on W beside the gradient
    together: ClassVar[bool] = False  # whether leaves that are stepped together share numbers: then see `listen_many`
    rests: ClassVar[bool] = False  # whether a leaf under it is left alone: neither stepped nor decayed nor counted
    rotation: "Rotation | None" = None  # leaves under an equal one take turns in being active: see `core.blocks`

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        """The state this transform keeps for `leaf`. Read by planner, engine, checkpoint and sharding."""
        raise NotImplementedError

    def update(self, grad: Tensor, state: "State", step: Step, compressed: Tensor | None = None) -> "Delta":
        """The direction U of this step; the engine writes W <- beta W - alpha U."""
        raise NotImplementedError

    def consume(self, grad: Tensor, state: "State", step: Step) -> "Delta":
        """`update` for a gradient that nobody reads afterwards (a projected one): U may take its memory."""
        return self.update(grad, state, step)

    def update_many(self, batch: list[Work]) -> list[Work]:
        """Step what a fused kernel can take, weights included; return the rest for `update`."""
        return batch

    def listen_many(self, batch: list[Work]) -> list[float]:
        """Of a transform with `together`: take in the gradients of a step, and say what others must know of each leaf."""
        raise NotImplementedError

    def update_told(self, batch: list[Work], own: list[float], everyone: list[float]) -> None:
        """Then step these leaves. own: what `listen_many` found of them. everyone: the same of all leaves, wherever they are stepped."""
        raise NotImplementedError

    def apart(self, leaf: Leaf, slots: "dict[str, Slot]") -> "Apart | None":
        """How a leaf whose rows lie on several ranks is stepped from what each says of its rows; None where it must come together."""
        return None

    def resolve(self, leaf: Leaf) -> tuple["Transform", str]:
        """The transform that really acts on `leaf`, and why."""
        return self, ""

    def check(self, leaf: Leaf, storage: Any) -> None:
        """Raise InputError where this transform cannot act on `leaf` with this storage."""

    def compress(self, grad: Tensor, state: "State", step: Step) -> Tensor | None:
        """The gradient in the form that may be summed over micro-batches; None when this step needs it whole: it is due."""
        return None

    def due(self, state: "State", step: Step) -> bool:
        """Whether this step first computes something, such as a basis, without which its gradients cannot be summed small."""
        return False

    def prepare(self, grad: Tensor, state: "State", step: Step, whole: bool) -> None:
        """Do that now, once, ahead of the step. A gradient that cannot give it changes nothing, and the step stays due.

        whole: whether `grad` is that of the step, or only of the first of its micro-batches.
        """

    def shared(self, leaf: Leaf) -> dict[str, int]:
        """Bytes of constants kept once for all leaves, by name (a table of cosines): not state, but memory."""
        return {}

    def turn(self, active: bool) -> "Transform":
        """What acts on a leaf that takes turns, while it is its turn or not."""
        return self

    def describe(self) -> str:
        """A few words for tables."""
        return type(self).__name__.lower()

    def rank_for(self, leaf: Leaf) -> int | None:
        """The rank used on `leaf`, where there is one."""
        return None
