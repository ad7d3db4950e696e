"""The bytes of a seed log: a header, then a record for each step, each with a checksum that runs on from the one before.

    magic (8), length of the header (4), header: JSON in UTF-8, its CRC-32 (4)
    records: length (varint), payload, CRC-32 (4) of all payloads up to this one, begun from that of the header

payload of a step: flags; mask and values of the rates that changed; factor; numbers kept; leaves, where other ones are stepped than
before; terms. A coefficient takes 4 bytes where float32 holds it exactly, else 8. A seal, at the end, holds the digest of the weights.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tare.core.errors import InputError
from tare.zeroth.probes import Term
from tare.zeroth.record import Record

MAGIC = b"TARELOG1"
MOVED, SKIPPED, RATES, FACTOR, KEEP, LEAVES, SINGLE, COUNTED = (1 << bit for bit in range(8))
SEAL = MOVED | SKIPPED  # no step is both
SEARCHED = 1 << 22  # bytes behind a broken record that are searched for another one


def header_bytes(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def framed(payload: bytes, chain: int) -> tuple[bytes, int]:
    """A record's bytes, and the checksum to go on from."""
    chain = zlib.crc32(payload, chain)
    return varint(len(payload)) + payload + struct.pack("<I", chain), chain


@dataclass(frozen=True)
class Context:
    """What a record leaves out because it is as before: rates of all groups, and the numbers of the leaves that are stepped."""

    rates: tuple[float, ...] = ()
    leaves: tuple[int, ...] = ()

    @staticmethod
    def after(record: Record, order: dict[str, int]) -> "Context":
        return Context(
            tuple(rate for pair in record.rates for rate in pair), tuple(order[name] for name in record.leaves)
        )


def step_payload(record: Record, before: Context, order: dict[str, int], with_kept: bool) -> bytes:
    """order: number of each leaf by its name. with_kept: whether some law depends on the numbers kept."""
    now = Context.after(record, order)
    known = before.rates + (float("nan"),) * (len(now.rates) - len(before.rates))
    changed = [i for i, (a, b) in enumerate(zip(now.rates, known, strict=True)) if a != b]
    members = [term.member for term in record.terms]
    coefficients = [term.coefficient for term in record.terms]
    flags = MOVED * record.moved | SKIPPED * record.skipped | RATES * bool(changed) | FACTOR * (record.factor != 1.0)
    keep = record.keep if with_kept else None
    flags |= KEEP * (keep is not None) | LEAVES * (now.leaves != before.leaves)
    flags |= SINGLE * all(map(_single, coefficients)) | COUNTED * (members == list(range(len(members))))
    out = bytearray([flags])
    if changed:
        out += varint(sum(1 << i for i in changed)) + _doubles([now.rates[i] for i in changed])
    if flags & FACTOR:
        out += _doubles([record.factor])
    if keep is not None:
        out += varint(len(keep))
        for name, value in keep.items():
            out += varint(len(name.encode())) + name.encode() + _doubles([value])
    if flags & LEAVES:
        out += varint(len(now.leaves)) + b"".join(map(varint, now.leaves))
    if record.moved:
        out += varint(len(members))
        if not flags & COUNTED:
            out += b"".join(map(varint, members))
        out += struct.pack(f"<{len(members)}{'f' if flags & SINGLE else 'd'}", *coefficients)
    return bytes(out)


def seal_payload(digest: bytes) -> bytes:
    return bytes([SEAL]) + digest


def _doubles(numbers: list[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}d", *numbers)


def _single(number: float) -> bool:
    try:
        found: float = struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        return False
    return found == number


class Reader:
    """Walks over bytes."""

    def __init__(self, data: bytes, at: int = 0):
        self.data, self.at = data, at

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise EOFError
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return number
            shift += 7

    def doubles(self, count: int) -> list[float]:
        return list(struct.unpack(f"<{count}d", self.take(8 * count)))


def read_step(payload: bytes, step: int, before: Context, names: list[str], groups: int) -> tuple[Record, Context]:
    """The record of a step, and the context of the next one."""
    reader = Reader(payload)
    flags = reader.take(1)[0]
    rates = list(before.rates) or [0.0] * (2 * groups)
    if flags & RATES:
        mask = reader.varint()
        changed = [i for i in range(2 * groups) if mask >> i & 1]
        for i, value in zip(changed, reader.doubles(len(changed)), strict=True):
            rates[i] = value
    factor = reader.doubles(1)[0] if flags & FACTOR else 1.0
    keep: dict[str, float] | None = None
    if flags & KEEP:
        keep = {}
        for _ in range(reader.varint()):
            name = reader.take(reader.varint()).decode()
            (keep[name],) = reader.doubles(1)
    leaves = before.leaves
    if flags & LEAVES:
        leaves = tuple(reader.varint() for _ in range(reader.varint()))
    terms: list[Term] = []
    if flags & MOVED:
        count = reader.varint()
        members = list(range(count)) if flags & COUNTED else [reader.varint() for _ in range(count)]
        form, size = ("f", 4) if flags & SINGLE else ("d", 8)
        values = struct.unpack(f"<{count}{form}", reader.take(size * count))
        terms = [Term(member, value) for member, value in zip(members, values, strict=True)]
    pairs = tuple((rates[i], rates[i + 1]) for i in range(0, len(rates), 2))
    record = Record(
        step, tuple(terms), factor, pairs, skipped=bool(flags & SKIPPED), moved=bool(flags & MOVED), keep=keep,
        leaves=tuple(names[i] for i in leaves),
    )  # fmt: skip
    return record, Context(tuple(rates), leaves)


@dataclass(frozen=True)
class Frame:
    """One whole record in a file: where it starts and ends, the checksum up to and with it."""

    start: int
    stop: int
    chain: int
    payload: bytes


def frames(data: bytes, at: int, chain: int, where: str) -> Iterator[Frame]:
    """The whole records from `at` on; ends quietly before a last one that was not written to its end.

    Raises:
        InputError: damage: something that is no record has records behind it.
    """
    longest = 0
    while at < len(data):
        frame = _frame(data, at, chain, len(data))
        if frame is None:
            if _more(data, at, chain, longest):
                raise InputError(damaged(where, at))
            return
        longest = max(longest, frame.stop - frame.start)
        at, chain = frame.stop, frame.chain
        yield frame


def _parsed(data: bytes, at: int, chain: int, longest: int) -> tuple[Frame, bool] | None:
    """What lies there if it is taken for a record, and whether its checksum is right."""
    reader = Reader(data, at)
    try:
        length = reader.varint()
        if not 0 < length <= longest:
            return None
        payload = reader.take(length)
        (written,) = struct.unpack("<I", reader.take(4))
    except EOFError:
        return None
    found = zlib.crc32(payload, chain)
    return Frame(at, reader.at, found, payload), found == written


def _frame(data: bytes, at: int, chain: int, longest: int) -> Frame | None:
    """The record that starts there, if one does."""
    parsed = _parsed(data, at, chain, longest)
    return parsed[0] if parsed is not None and parsed[1] else None


def _more(data: bytes, at: int, chain: int, longest: int) -> bool:
    """Whether some record starts behind `at`: one whose checksum goes on from that of the one at `at`, were it whole, or from the four
    bytes before it."""
    most = 4 * longest + 256
    broken = _parsed(data, at, chain, most)
    if broken is not None and _frame(data, broken[0].stop, broken[0].chain, most) is not None:
        return True
    for start in range(at + 5, min(len(data), at + SEARCHED)):
        (before,) = struct.unpack("<I", data[start - 4 : start])
        if _frame(data, start, before, most) is not None:
            return True
    return False


def damaged(where: str, at: int) -> str:
    return f"{where}: damaged at byte {at}; nothing was changed; take the file from a backup, or the steps before it from a copy cut there"
