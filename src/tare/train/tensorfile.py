"""Files of tensors in the safetensors format: written in pieces and hashed on the way, read by name and by slice.

Written here and not by the `safetensors` package, which forms all bytes of a file in memory first and holds Python's lock while it writes:
a save in the background would double its memory and stop the training beside it. Read by the package, which checks every header.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tare.core.errors import CheckpointError

CHUNK = 1 << 22
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class Lies(Protocol):
    """A tensor, or one that lies elsewhere and is read with `whole()`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def check(tensors: Mapping[str, Lies]) -> None:
    """Raise `TypeError`, naming it, for a tensor of a dtype that the format does not know."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"state {name}: a tensor of {tensor.dtype} cannot be checkpointed; keep it in another dtype"
            )


def write(path: Path, tensors: Mapping[str, Lies], notes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write a file and make it durable; its size and SHA-256, as a manifest states them.

    Args:
        path: the file; what was there is lost.
        tensors: name -> tensor on any device, or what has `shape`, `dtype` and `whole()`, which gives the tensor; at most one at a time
            is read, or copied where it is not on the CPU or not contiguous.
        notes: texts for the header.

    Raises:
        TypeError: a dtype that the format does not know.
        OSError: the disk is full or the file cannot be written.
    """
    check(tensors)
    # Widest elements first keeps each tensor aligned, as the format asks for.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(notes or {})}}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name in order:
            data = _bytes(tensors[name])
            for at in range(0, len(data), CHUNK):
                digest.update(data[at : at + CHUNK])
                file.write(data[at : at + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return {"size": 8 + len(text) + start, "sha256": digest.hexdigest()}


def sharding_notes(offsets: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What a header says of where its boxes lie in their tensors, in the words that PyTorch's `HuggingFaceStorageReader` reads."""
    where = {name: {"saved_offsets": list(each)} for name, each in offsets.items()}
    return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(where)}


class TensorFile:
    """An open file, of which nothing is read until it is asked for. Tensors are views of the mapped file: who keeps them copies them.

    Raises `CheckpointError`, naming the file, where it is no such file or torn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            self.names: list[str] = list(self._file.keys())
            slices = {name: self._file.get_slice(name) for name in self.names}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: BY_NAME.get(part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as fault:
            raise CheckpointError(f"{path}: damaged ({str(fault).splitlines()[0]})") from fault

    def whole(self, name: str) -> Tensor:
        """One tensor."""
        try:
            found: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(f"{self.path}: damaged ({str(fault).splitlines()[0]})") from fault
        return found

    def part(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The box of a tensor that begins at `offsets`; only its bytes are read."""
        if sizes == self.shapes[name]:
            return self.whole(name)
        cut: Tensor = self._file.get_slice(name)[
            tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
        ]
        return cut


def _bytes(given: Any) -> memoryview:
    tensor: Tensor = given if isinstance(given, Tensor) else given.whole()
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
