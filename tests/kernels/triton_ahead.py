"""Compile kernels for a GPU that is not there: launches are caught, compiled for a named architecture, and not run."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tare.kernels.triton import dispatch

_TYPES = {
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.bfloat16: "*bf16",
}


@dataclass
class Compiled:
    """One launch, compiled."""

    name: str
    ptx: str
    cubin: bytes
    shared: int
    constants: dict[str, Any]

    def instructions(self) -> list[str]:
        """Machine instructions, slow paths included."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            tool = Path(nvidia).parent / "bin" / "nvdisasm"
            text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", text)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Compiled]]:
    """CPU tensors are taken as if they were on a GPU; every launch inside is compiled instead of run."""
    done: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for number, parameter in enumerate(self.params):
            value = given[parameter.name]
            if parameter.is_constexpr or (
                isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            ):  # as at run time: a stride of 1 is a constant
                signature[parameter.name], constants[number,] = "constexpr", value
                continue
            signature[parameter.name] = _type(value)
            aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if aligned and not parameter.do_not_specialize:
                attributes[number,] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature=signature, constexprs=constants, attrs=attributes)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        named = {p.name: constants[n,] for n, p in enumerate(self.params) if (n,) in constants}
        done.append(Compiled(self.__name__, built.asm["ptx"], built.asm["cubin"], built.metadata.shared, named))

    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels cannot be compiled"
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(dispatch, "wants", return_value=True):
        yield done
