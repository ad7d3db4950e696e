"""The one place that decides whether a Triton kernel takes a call: device, dtype, layout, and whether Triton is there at all.

CUDA tensors only, unless `TARE_TRITON=interpret` (with `TRITON_INTERPRET=1`) sends CPU tensors through Triton's interpreter, which is how
the kernels are tested without a GPU. `TARE_TRITON=0` turns them off. A refused call has touched nothing; its caller uses the twin.
"""

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import metadata, util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tare.kernels import rounding

FP32, BF16 = torch.float32, torch.bfloat16
FLOATS = (FP32, BF16)

# How a weight is written. The kernels compare with these numbers.
PLAIN, NEAREST, STOCHASTIC, SPLIT, SPLIT_STOCHASTIC = 0, 1, 2, 3, 4
"""fp32 as it is; bf16 to nearest; bf16 stochastically; bf16 and an 8-bit correction (24 bits), to nearest; and stochastically."""


# The Triton kernel that stands in for a native one where the tensors are on a GPU: same arguments, same answer.
COUNTERPARTS = {
    "native.adamw8bit_": "eightbit.adamw8bit_",
    "native.lion8bit_": "eightbit.lion8bit_",
    "native.encode_into": "eightbit.encode_into",
    "native.decode_into": "eightbit.decode_into",
    "native.write_stochastic_": "dense.write_stochastic_",
    "native_fourbit.adamw4bit_": "fourbit.adamw4bit_",
    "native_fourbit.lion4bit_": "fourbit.lion4bit_",
    "native_fourbit.encode_into": "fourbit.encode_into",
    "native_fourbit.decode_into": "fourbit.decode_into",
    "native16.adamw16_": "dense.adamw16_",
    "native16.write_split_": "dense.write_split_",
    "native_directions.write_": "directions.write_",
}


@cache
def present() -> bool:
    """Whether Triton is installed. It is imported with the first kernel that is launched, not before."""
    return util.find_spec("triton") is not None


def kernel(name: str) -> Callable[..., Any]:
    """A launcher by `file.function`; its file, and with it Triton, is imported here."""
    file, function = name.split(".")
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"tare.kernels.triton.{file}"), function)
    return launcher


def counterpart(native: Callable[..., bool]) -> Callable[..., bool] | None:
    """The Triton kernel for a native entry point; None where there is none."""
    name = COUNTERPARTS.get(f"{native.__module__.rsplit('.', 1)[-1]}.{native.__name__}")
    return kernel(name) if name else None


def interpreting() -> bool:
    """Whether CPU tensors go through Triton's interpreter. It must be on before the kernels' files are imported."""
    return os.environ.get("TARE_TRITON") == "interpret" and os.environ.get("TRITON_INTERPRET") == "1"


_verdicts: dict[torch.device, str | None] = {}  # why kernels are not used on a device; None where they are
_lock = threading.RLock()


def _trusted(device: torch.device) -> bool:
    """Whether kernels passed their trial on the device, which the first call for it runs."""
    if device not in _verdicts:
        with _lock:
            if device not in _verdicts:
                from tare.kernels.triton import trial  # it launches kernels, which come back here

                _verdicts[device] = None  # for the trial itself
                _verdicts[device] = trial.objection(device)
    return _verdicts[device] is None


def wants(x: Tensor) -> bool:
    """Whether `x` lives where Triton kernels are meant to run, and do. Cheap on the CPU, where the answer is no."""
    if x.device.type == "cuda":
        return (
            os.environ.get("TARE_TRITON") != "0" and present() and not isinstance(x, FakeTensor) and _trusted(x.device)
        )
    return x.device.type == "cpu" and interpreting() and present()


def takes(numel: int, *tensors: tuple[Tensor, tuple[torch.dtype, ...], int | None]) -> bool:
    """Whether a kernel may have these tensors: (tensor, allowed dtypes, elements; None for `numel`). All on one device."""
    first = tensors[0][0]
    if not wants(first) or numel == 0 or torch.compiler.is_compiling():
        return False
    for x, dtypes, size in tensors:
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:  # fake, distributed and other wrapped tensors
            return False
        if x.device != first.device or x.dtype not in dtypes or x.layout != torch.strided:
            return False
        if x.numel() != (numel if size is None else size) or not x.is_contiguous() or x.is_neg():
            return False
    return True


def on(x: Tensor) -> AbstractContextManager[object]:
    """A scope in which Triton launches on the device of `x`, not on the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def bits(x: Tensor) -> Tensor:
    """A bf16 tensor as its 16-bit patterns, anything else as it is: kernels round through patterns, never by conversion.

    The interpreter truncates where a GPU rounds, so a conversion would make two different results of one kernel.
    """
    x = x.detach()
    return x.view(torch.int16) if x.dtype == BF16 else x


def written(*tensors: Tensor) -> None:
    """Tell autograd, which cannot see a write through a pointer."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


class Rounding(NamedTuple):
    """How a weight is written: the form, and the number that element indices are added to before hashing (signed 32-bit)."""

    form: int
    seed: int


def seed_of(key: int | None, start: int, numel: int) -> int | None:
    """The first element's argument of the hash; None when the indices cross a multiple of 2^32, where the hash's base changes."""
    if key is None:
        return 0
    start += rounding.offset_of(key)
    if start < 0 or start >> 32 != (start + numel - 1) >> 32:
        return None
    x = (rounding.base(key, start >> 32) + start) & rounding.MASK
    return x - (1 << 32) if x >> 31 else x


def rounding_of(weight: Tensor, key: int | None, start: int, low: Tensor | None = None) -> Rounding | None:
    """The form that fits the weight; None where there is none, or its noise cannot be drawn in one go. fp32 weights ignore `key`."""
    if weight.dtype != BF16:
        return Rounding(PLAIN, 0) if low is None else None
    seed = seed_of(key, start, weight.numel())
    if seed is None:
        return None
    nearest, stochastic = (NEAREST, STOCHASTIC) if low is None else (SPLIT, SPLIT_STOCHASTIC)
    return Rounding(nearest if key is None else stochastic, seed)


def block_fits(block: int) -> bool:
    """Kernels handle whole blocks as rows of a tile, whose width must be a power of two."""
    return 16 <= block <= 4096 and block & (block - 1) == 0


def tile_elements(most: int = 1024) -> int:
    """Elements to a program: a thousand or so on a GPU; many in the interpreter, which pays by the program."""
    return 1 << 12 if interpreting() else most


def reason() -> str:
    """One line for people: whether Triton kernels run on CUDA tensors, and if not, why."""
    if not present():
        return "plain torch kernels on CUDA: triton is not installed"
    if os.environ.get("TARE_TRITON") == "0":
        return "plain torch kernels on CUDA: TARE_TRITON=0"
    for device, why in _verdicts.items():
        if why is not None:
            return f"plain torch kernels on {device}: {why}"
    return f"Triton {metadata.version('triton')} kernels in use" + (" (interpreter)" if interpreting() else "")
