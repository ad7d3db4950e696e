"""Low-bit transfer: the forms in which matrices of blocks rest on the host and travel. The device decodes them, and encodes them anew
after a step, rounded at random so that the mean is exact."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.kernels import groupwise
from tare.kernels.rounding import hash32, round_stochastic_

GROUP = 128


class Codec(Protocol):
    """A form of a float weight. key: of the rounding; None rounds to nearest."""

    def empty(self, weight: Tensor) -> list[Tensor]:
        """Room for the codes of a weight, on its device."""

    def encode(self, value: Tensor, codes: list[Tensor], key: int | None) -> None: ...

    def decode(self, codes: list[Tensor], out: Tensor) -> None: ...


@dataclass(frozen=True)
class Sixteen:
    """bf16 or fp16: two bytes."""

    dtype: torch.dtype

    def empty(self, weight: Tensor) -> list[Tensor]:
        return [torch.empty(weight.shape, dtype=self.dtype, device=weight.device)]

    def encode(self, value: Tensor, codes: list[Tensor], key: int | None) -> None:
        if key is None:
            codes[0].copy_(value)
        else:
            round_stochastic_(codes[0], value.float(), key)

    def decode(self, codes: list[Tensor], out: Tensor) -> None:
        out.copy_(codes[0])


@dataclass(frozen=True)
class Int8:
    """Whole numbers up to 127 with one fp32 scale for 128 consecutive elements: 1.03 bytes."""

    def empty(self, weight: Tensor) -> list[Tensor]:
        n = weight.numel()
        return [
            torch.empty(n, dtype=torch.uint8, device=weight.device),
            torch.empty(-(-n // GROUP), dtype=torch.float32, device=weight.device),
        ]

    def encode(self, value: Tensor, codes: list[Tensor], key: int | None) -> None:
        flat = value.reshape(-1).float()
        found, scale, _ = groupwise.encode_affine(flat, 8, GROUP, symmetric=True, key=key)
        codes[0].copy_(found)
        codes[1].copy_(scale)

    def decode(self, codes: list[Tensor], out: Tensor) -> None:
        middle = torch.full_like(codes[1], 128.0)
        flat = torch.empty(codes[0].numel(), dtype=torch.float32, device=out.device)
        groupwise.decode_affine(codes[0], codes[1], middle, GROUP, flat)
        out.copy_(flat.view(out.shape))


@dataclass(frozen=True)
class Float8:
    """float8_e4m3fn with one power of two for 128 consecutive elements: 1.03 bytes. What is decoded encodes to itself."""

    largest: ClassVar[float] = 448.0

    def empty(self, weight: Tensor) -> list[Tensor]:
        n = weight.numel()
        return [
            torch.empty(n, dtype=torch.float8_e4m3fn, device=weight.device),
            torch.empty(-(-n // GROUP), dtype=torch.float32, device=weight.device),
        ]

    def encode(self, value: Tensor, codes: list[Tensor], key: int | None) -> None:
        flat = value.reshape(-1).float()
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
        fraction, exponent = torch.frexp(padded.abs().amax(1) / self.largest)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # the least power of two that is no smaller
        scale = torch.ldexp(torch.ones_like(fraction), exponent.clamp(-120, 120))
        scaled = (padded / scale[:, None]).view(-1)[: flat.numel()]
        codes[0].copy_(scaled if key is None else _dithered(scaled, key))
        codes[1].copy_(scale)

    def decode(self, codes: list[Tensor], out: Tensor) -> None:
        value = codes[0].float() * codes[1].repeat_interleave(GROUP)[: codes[0].numel()]
        out.copy_(value.view(out.shape))


def _dithered(x: Tensor, key: int) -> Tensor:
    """fp32 numbers of at most 448 to numbers that float8_e4m3fn holds: 2^20 fp32 patterns apart, and 2^-9 below 2^-6."""
    noise = hash32(key, 0, x.numel(), x.device).bitwise_right_shift_(12).bitwise_and_(0xFFFFF)
    coarse = (x.view(torch.int32) + noise).bitwise_and_(~0xFFFFF).view(torch.float32)
    fine = (x.abs() * 2.0**9 + noise.float() * 2.0**-20).floor_().mul_(2.0**-9).copysign_(x)
    return torch.where(x.abs() < 2.0**-6, fine, coarse)


CODECS: dict[str, Codec] = {
    "bf16": Sixteen(torch.bfloat16), "fp16": Sixteen(torch.float16), "fp8": Float8(), "int8": Int8(),
}  # fmt: skip


def codec(name: str) -> Codec | None:
    """By its name; None for `exact`. Raises InputError naming the others."""
    if name != "exact" and name not in CODECS:
        raise InputError(f"transfer: expected exact, {', '.join(CODECS)}, got {name!r}")
    return CODECS.get(name)
