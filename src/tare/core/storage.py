"""Storage: how state and weights are kept between steps, apart from the arithmetic, which is fp32 (fp64 for fp64 parameters).

Any policy goes with any method. A `Slot` is the decision for one named piece of state of one leaf; its bytes are exact.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tare.core.errors import InputError, nearest
from tare.core.leaf import Leaf
from tare.core.transform import StateSpec

MomentForm = Literal["fp32", "bf16", "int8", "bf16_legacy"]
BasisForm = Literal["fp32", "bf16", "seed"]
WeightForm = Literal["plain", "stochastic"]


@dataclass(frozen=True)
class Storage:
    """The policy.

    Args:
        moment: `fp32`; `bf16` (rounded stochastically, so that second moments decay); `int8` block-wise dynamic map
            (Dettmers 2022, arXiv 2110.02861); `bf16_legacy` does the *arithmetic* in bf16 as the published
            pretraining scripts do: second moments with beta2 = 0.999 never decay there. Only to reproduce tables.
        basis: `fp32`, `bf16`, or `seed` (random bases only: drawn again at every step instead of kept).
        weight: `plain`, or `stochastic` rounding of 16-bit weights.
        block: elements that share one absmax (256 since bitsandbytes 0.44; the paper: 2048).
        min_quantized: tensors with fewer elements keep fp32 moments (4096 in bitsandbytes).
    """

    moment: MomentForm = "fp32"
    basis: BasisForm = "fp32"
    weight: WeightForm = "plain"
    block: int = 256
    min_quantized: int = 4096

    def __post_init__(self) -> None:
        for name, allowed in (("moment", MomentForm), ("basis", BasisForm), ("weight", WeightForm)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                hint = nearest(str(value), get_args(allowed))
                raise InputError(f"storage.{name}: {value!r} is not one of {', '.join(get_args(allowed))}{hint}")
        for name, least in (("block", 1), ("min_quantized", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"storage.{name}: expected a whole number >= {least}, got {value!r}")

    def slot(self, leaf: Leaf, name: str, spec: StateSpec) -> "Slot":
        """How `name` of `leaf` is kept."""
        dtype = spec.dtype or leaf.compute_dtype
        if spec.kind == "count":
            return Slot(name, spec, "count", dtype)
        if spec.kind == "moment":
            if self.moment == "bf16_legacy":
                return Slot(name, spec, "plain", torch.bfloat16)
            if self.moment == "bf16":
                return Slot(name, spec, "bf16", torch.bfloat16)
            if self.moment == "int8" and math.prod(spec.shape) >= self.min_quantized:
                return Slot(name, spec, "int8", torch.uint8, self.block)
        if spec.kind == "basis":
            if self.basis == "seed":
                if not spec.seedable:
                    raise InputError(
                        f"storage.basis: 'seed' needs a random basis, but {leaf.name or 'the leaf'} computes its "
                        "basis from the gradient; use 'fp32' or 'bf16'"
                    )
                return Slot(name, spec, "seed", dtype)
            if self.basis == "bf16" or self.moment == "bf16_legacy":
                return Slot(name, spec, "plain", torch.bfloat16)
        return Slot(name, spec, "plain", dtype)

    def slots(self, leaf: Leaf, specs: dict[str, StateSpec]) -> dict[str, "Slot"]:
        return {name: self.slot(leaf, name, spec) for name, spec in specs.items()}

    @classmethod
    def of(cls, value: "Storage | dict[str, Any] | None") -> "Storage":
        """A policy from itself, from a mapping of its fields, or the default."""
        if value is None:
            return cls()
        if isinstance(value, Storage):
            return value
        unknown = set(value) - set(cls.__dataclass_fields__)
        if unknown:
            word = sorted(unknown)[0]
            allowed = list(cls.__dataclass_fields__)
            raise InputError(f"storage: unknown field {word!r}; known: {', '.join(allowed)}{nearest(word, allowed)}")
        return cls(**value)


@dataclass(frozen=True)
class Slot:
    """One piece of state as it is kept: `plain`, `bf16`, `int8` (two tensors), `seed` (nothing) or `count` (an int)."""

    name: str
    spec: StateSpec
    form: Literal["plain", "bf16", "int8", "seed", "count"]
    dtype: torch.dtype
    block: int = 256

    def parts(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name in `state[p]`, shape, dtype) of every tensor kept."""
        if self.form == "int8":
            yield f"{self.name}_codes", self.spec.shape, torch.uint8
            yield f"{self.name}_absmax", (-(-math.prod(self.spec.shape) // self.block),), torch.float32
        elif self.form in ("plain", "bf16"):
            yield self.name, self.spec.shape, self.dtype

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.parts())
