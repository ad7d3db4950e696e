"""Reading a seed log: whole, checked, and without what a killed run left of a last record."""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tare.core.errors import InputError
from tare.zeroth.logformat import MAGIC, SEAL, Context, damaged, framed, frames, read_step, seal_payload
from tare.zeroth.record import Record

FORMAT = 1


@dataclass(frozen=True)
class Log:
    """A log that was read. contexts, chains, ends: before each step, and behind the last one. digest: of a seal. torn: bytes cut off."""

    path: Path
    header: dict[str, Any]
    payloads: list[bytes]
    contexts: list[Context]
    chains: list[int]
    ends: list[int]
    digest: bytes | None
    torn: int

    @property
    def start(self) -> int:
        """Steps that the optimizer had done before."""
        return int(self.header["start"])

    @property
    def steps(self) -> int:
        return len(self.payloads)

    @property
    def bytes(self) -> int:
        return self.ends[-1]

    def records(self) -> Iterator[Record]:
        names = [leaf["name"] for leaf in self.header["leaves"]]
        groups = len(self.header["seeds"])
        for number, (payload, context) in enumerate(zip(self.payloads, self.contexts, strict=False)):
            yield read_step(payload, self.start + number, context, names, groups)[0]


def read(path: str | os.PathLike[str]) -> Log:
    """A log, checked to the last byte. What a killed run left of a last record is left out.

    Raises:
        InputError: no such file, no log, a later format, or damage.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a seed log, as SeedLog writes it")
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path}: not a seed log")
    header, at, chain = _header(data, path)
    names, groups = [leaf["name"] for leaf in header["leaves"]], len(header["seeds"])
    payloads: list[bytes] = []
    contexts, chains, ends, digest = [Context()], [chain], [at], None
    for frame in frames(data, at, chain, str(path)):
        if digest is not None:
            raise InputError(damaged(str(path), frame.start))
        if frame.payload[0] & SEAL == SEAL:
            digest = frame.payload[1:]
            continue
        try:
            _, context = read_step(frame.payload, len(payloads), contexts[-1], names, groups)
        except (EOFError, IndexError, struct.error, ValueError):
            raise InputError(damaged(str(path), frame.start)) from None
        payloads.append(frame.payload)
        contexts.append(contexts[-1] if context == contexts[-1] else context)  # one object while nothing changes
        chains.append(frame.chain)
        ends.append(frame.stop)
    return Log(path, header, payloads, contexts, chains, ends, digest, len(data) - _end(ends, digest))


def _end(ends: list[int], digest: bytes | None) -> int:
    """Where the whole records end, the seal with them."""
    return ends[-1] if digest is None else ends[-1] + len(framed(seal_payload(digest), 0)[0])


def _header(data: bytes, path: Path) -> tuple[dict[str, Any], int, int]:
    begin = len(MAGIC) + 4
    try:
        (length,) = struct.unpack("<I", data[len(MAGIC) : begin])
        text = data[begin : begin + length]
        (chain,) = struct.unpack("<I", data[begin + length : begin + length + 4])
    except struct.error:
        raise InputError(damaged(str(path), len(data))) from None
    if zlib.crc32(text) != chain:
        raise InputError(damaged(str(path), begin))
    header: dict[str, Any] = json.loads(text)
    if header["format"] > FORMAT:
        raise InputError(f"{path}: written by a later version ({header['tare']}); upgrade tare")
    return header, begin + length + 4, chain
