"""Storage: how state and weights are kept between steps, apart from the arithmetic, which is fp32 (fp64 for fp64 parameters).

Any policy goes with any method. A `Slot` is the decision for one named piece of state of one leaf; its bytes are exact.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tare.core.errors import InputError, nearest
from tare.core.leaf import Leaf, check_role
from tare.core.transform import StateSpec
from tare.kernels import blockwise, fourbit, nibbles

MomentForm = Literal["fp32", "bf16", "int8", "int4", "bf16_legacy"]
BasisForm = Literal["fp32", "bf16", "int8", "int4", "seed"]
WeightForm = Literal["plain", "stochastic", "split24", "int8", "master"]


LOW = "weight_low"  # name in the state of the correction of a split weight
MASTER = "weight_master"  # and of the fp32 copy of a 16-bit one


@dataclass(frozen=True)
class Storage:
    """The policy.

    Args:
        moment: `fp32`; `bf16` (rounded stochastically, so that second moments decay); `int8` block-wise dynamic map
            (Dettmers 2022, arXiv 2110.02861); `int4` two codes a byte, a map of three decades for first moments and one
            without a zero for second ones (Li 2023, arXiv 2309.01507); `bf16_legacy` does the *arithmetic* in bf16 as the published
            pretraining scripts do: second moments with beta2 = 0.999 never decay there. Only to reproduce tables.
        basis: `fp32`, `bf16`, `int8` or `int4` (affine groups, Q-GaLore, arXiv 2407.08296), or `seed` (random bases only:
            drawn again at every step instead of kept).
        weight: `plain`; `stochastic` rounding of 16-bit weights; `split24`: a bf16 weight with an 8-bit correction in the state,
            stepped in fp32 and kept in 24 bits (rounded stochastically below), so that small steps add up as in an fp32
            master copy, at 3 bytes; `int8`: of
            the weights that `tare.quantize_weights_` has made int8, stepped in fp32 and encoded with stochastic rounding
            (Q-GaLore, arXiv 2407.08296), while bf16 ones beside them are rounded stochastically; `master`: an fp32 copy of
            every 16-bit weight in the state, 4 bytes more: for methods that hold state for a few leaves at a time.
        block: elements that share one absmax; None means 256 for `int8` (bitsandbytes since 0.44; the paper: 2048) and
            128 for `int4` (the paper), which needs an even number. Blocks follow memory order; see `Slot.row_period` for
            where a tensor may be cut between rows without cutting a block.
        group: elements of a quantised basis that share scale and zero (256 in Q-GaLore); even for `int4`.
        min_quantized: tensors with fewer elements keep fp32 moments (4096 in bitsandbytes).
        keep: roles whose moments stay in the dtype of the arithmetic whatever `moment` says, such as ("embedding",), the
            stable embedding of Dettmers 2022.
    """

    moment: MomentForm = "fp32"
    basis: BasisForm = "fp32"
    weight: WeightForm = "plain"
    block: int | None = None
    min_quantized: int = 4096
    keep: tuple[str, ...] = ()
    group: int = 256

    def __post_init__(self) -> None:
        for name, allowed in (("moment", MomentForm), ("basis", BasisForm), ("weight", WeightForm)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                hint = nearest(str(value), get_args(allowed))
                raise InputError(f"storage.{name}: {value!r} is not one of {', '.join(get_args(allowed))}{hint}")
        roles = (self.keep,) if isinstance(self.keep, str) else self.keep
        object.__setattr__(self, "keep", tuple(check_role(role) for role in roles))
        for name, least in (("block", 1), ("min_quantized", 0), ("group", 1)):
            value = getattr(self, name)
            if name == "block" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"storage.{name}: expected a whole number >= {least}, got {value!r}")

        for name, form in (("block", self.moment), ("group", self.basis)):
            if form == "int4" and (getattr(self, name) or 2) % 2:
                raise InputError(
                    f"storage.{name}: 4-bit codes go two a byte, which needs an even number, got {getattr(self, name)}"
                )

    @property
    def moment_block(self) -> int:
        """Elements to a block of quantised moments, the default filled in."""
        if self.block is not None:
            return self.block
        return fourbit.BLOCK if self.moment == "int4" else blockwise.BLOCK

    def slot(self, leaf: Leaf, name: str, spec: StateSpec) -> "Slot":
        """How `name` of `leaf` is kept."""
        dtype = spec.dtype or leaf.compute_dtype
        if spec.kind == "count":
            return Slot(name, spec, "count", dtype)
        if spec.form is not None:
            return self._own(leaf, name, spec)
        if spec.kind == "moment" and leaf.role not in self.keep:
            if self.moment == "bf16_legacy":
                return Slot(name, spec, "plain", torch.bfloat16)
            if self.moment == "bf16":
                return Slot(name, spec, "bf16", torch.bfloat16)
            if self.moment in ("int8", "int4") and math.prod(spec.shape) >= self.min_quantized:
                return Slot(name, spec, self.moment, torch.uint8, self.moment_block)
        if spec.kind == "basis":
            if self.basis == "seed":
                if not spec.seedable:
                    raise InputError(
                        f"storage.basis: 'seed' needs a random basis, but {leaf.name or 'the leaf'} computes its "
                        "basis from the gradient; use 'fp32' or 'bf16'"
                    )
                return Slot(name, spec, "seed", dtype)
            if not dtype.is_floating_point:  # numbers of columns and the like: as they are
                return Slot(name, spec, "plain", dtype)
            if self.basis in ("int8", "int4"):
                return Slot(name, spec, "affine8" if self.basis == "int8" else "affine4", torch.uint8, self.group)
            if self.basis == "bf16" or self.moment == "bf16_legacy":
                return Slot(name, spec, "plain", torch.bfloat16)
        return Slot(name, spec, "plain", dtype)

    def _own(self, leaf: Leaf, name: str, spec: StateSpec) -> "Slot":
        """A form that the transform chose itself."""
        if spec.form not in ("affine8", "affine4"):
            raise ValueError(f"{name}: a transform may ask for affine8 or affine4, not {spec.form!r}")
        if spec.form == "affine4" and self.group % 2:
            raise InputError(
                f"storage.group: 4-bit codes of {name} of {leaf.name or 'the leaf'} go two a byte, which needs an even "
                f"number, got {self.group}"
            )
        return Slot(name, spec, spec.form, torch.uint8, self.group)  # type: ignore[arg-type]

    def slots(self, leaf: Leaf, specs: dict[str, StateSpec]) -> dict[str, "Slot"]:
        """The transform's state, and what the form of the weight adds to it."""
        if self.weight == "split24":
            specs = {**specs, LOW: StateSpec(leaf.shape, "exact", dtype=torch.int8)}
        if self.weight == "master" and leaf.dtype.itemsize == 2:
            specs = {**specs, MASTER: StateSpec(leaf.shape, "exact", dtype=torch.float32)}
        return {name: self.slot(leaf, name, spec) for name, spec in specs.items()}

    def check_weight(self, leaf: Leaf, quantized: bool) -> None:
        """Raise InputError where a weight cannot be kept in this form. quantized: it is an `Int8Weight`."""
        what = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
        name = what.get(leaf.dtype, str(leaf.dtype))
        if self.weight == "split24" and (quantized or leaf.dtype != torch.bfloat16):
            raise InputError(
                f"storage.weight: 'split24' keeps bf16 weights; {leaf.name} is {'int8' if quantized else name}; "
                "cast the model to torch.bfloat16, or use 'plain'"
            )
        if self.weight == "master" and quantized and leaf.dtype.itemsize == 2:
            raise InputError(f"storage.weight: 'master' is for float weights; {leaf.name} is int8; use 'int8'")
        if quantized and leaf.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"{leaf.name}: int8 weights stand for fp32 or bf16 ones, not {name}; cast the model back")

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
    """One piece of state as it is kept.

    form: `plain`, `bf16` (rounded stochastically), `int8` and `int4` (codes and absmax), `affine8` and `affine4` (codes,
    scale and zero), `seed` (nothing) or `count` (an int). block: elements to a scale; 1 where there is none.
    """

    name: str
    spec: StateSpec
    form: Literal["plain", "bf16", "int8", "int4", "affine8", "affine4", "seed", "count"]
    dtype: torch.dtype
    block: int = 1

    def parts(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name in `state[p]`, shape, dtype) of every tensor kept. Packed codes are flat, ceil(numel / 2) bytes."""
        blocks = (-(-self.numel // self.block),)
        packed = (nibbles.packed_numel(self.numel),)
        if self.form in ("int8", "int4"):
            yield f"{self.name}_codes", self.spec.shape if self.form == "int8" else packed, torch.uint8
            yield f"{self.name}_absmax", blocks, torch.float32
        elif self.affine:
            # The zero is a whole number within the codes' range, hence a byte: groups are widened to hold 0.
            yield f"{self.name}_codes", self.kept_shape if self.form == "affine8" else packed, torch.uint8
            yield f"{self.name}_scale", blocks, torch.float32
            yield f"{self.name}_zero", blocks, torch.uint8
        elif self.form in ("plain", "bf16"):
            yield self.name, self.spec.shape, self.dtype

    @property
    def affine(self) -> bool:
        """Whether it is kept as affine groups."""
        return self.form in ("affine8", "affine4")

    @property
    def numel(self) -> int:
        return math.prod(self.spec.shape)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape in which affine groups run."""
        if not self.spec.transposed:
            return self.spec.shape
        *stack, rows, columns = self.spec.shape
        return (*stack, columns, rows)

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.parts())

    @property
    def row_period(self) -> int:
        """A cut between rows (of dimension 0) falls between blocks after every so many rows, and nowhere else.

        1 where rows are whole numbers of blocks. A shard whose rows start and end at multiples of this holds its own
        codes and scales, bit for bit those of the whole tensor; any other cut would share a scale between two owners.
        """
        width = math.prod(self.spec.shape[1:])
        return self.block // math.gcd(self.block, width) if width else 1

    def holds_rows(self, start: int, stop: int) -> bool:
        """Whether rows start .. stop - 1 are whole blocks: a shard of them can be kept and updated by itself.

        >>> spec = StateSpec((6, 64))
        >>> slot = Slot("exp_avg", spec, "int4", torch.uint8, 128)
        >>> slot.row_period, slot.holds_rows(2, 6), slot.holds_rows(0, 3)
        (2, True, False)
        """
        rows = self.spec.shape[0] if self.spec.shape else 1
        return all(at % self.row_period == 0 or at >= rows for at in (start, stop))
