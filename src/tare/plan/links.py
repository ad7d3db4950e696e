"""Links: how fast ranks send each other bytes, as stated by those who make or standardise them. What follows from it is computed, not
measured: no latency, no contention, nothing hidden behind arithmetic."""

import re
from dataclasses import dataclass

from tare.core.errors import InputError, nearest

_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "Mb": 1e6 / 8, "Gb": 1e9 / 8, "Tb": 1e12 / 8}
_SPEED = re.compile(r"([0-9]*\.?[0-9]+)\s*([MGT][Bb])(?:/s|ps)", re.ASCII)


@dataclass(frozen=True)
class Link:
    """Bytes a second that one GPU can send while it receives as many. source: who says so."""

    name: str
    speed: float
    source: str = "given"


PRESETS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("nvlink5", 900e9, "NVIDIA Blackwell architecture: 1.8 TB/s a GPU, both directions together"),
        Link("nvlink4", 450e9, "NVIDIA H100 data sheet: 900 GB/s a GPU, both directions together"),
        Link("nvlink3", 300e9, "NVIDIA A100 data sheet: 600 GB/s a GPU, both directions together"),
        Link("pcie5", 63e9, "PCI Express 5.0: 32 GT/s, 16 lanes, 128b/130b"),
        Link("pcie4", 31.5e9, "PCI Express 4.0: 16 GT/s, 16 lanes, 128b/130b"),
        Link("infiniband-ndr", 50e9, "InfiniBand NDR, four lanes: 400 Gb/s, one adapter for each GPU"),
        Link("infiniband-hdr", 25e9, "InfiniBand HDR, four lanes: 200 Gb/s, one adapter for each GPU"),
        Link("ethernet-100g", 12.5e9, "IEEE 802.3: 100 Gb/s, one port for each GPU"),
        Link("ethernet-10g", 1.25e9, "IEEE 802.3: 10 Gb/s, one port for each GPU"),
    )
}


def parse_link(text: str) -> Link:
    """A preset, or a speed with its unit: bytes (GB/s) or bits (Gb/s), for each GPU and direction.

    Raises:
        InputError: neither.

    >>> parse_link("400Gb/s").speed == parse_link("infiniband-ndr").speed == parse_link("50 GB/s").speed
    True
    """
    word = text.strip()
    if word.lower() in PRESETS:
        return PRESETS[word.lower()]
    match = _SPEED.fullmatch(word)
    if match is None or not float(match.group(1)):
        raise InputError(
            f"link {text!r} is neither a speed such as 50GB/s or 400Gb/s nor known{nearest(word.lower(), list(PRESETS))}; "
            f"known: {', '.join(PRESETS)}"
        )
    return Link(word, float(match.group(1)) * _UNITS[match.group(2)])


def parse_links(text: str) -> tuple[Link, Link]:
    """The link within a machine and the one between machines: two, with a comma, or one for both.

    >>> [link.name for link in parse_links("nvlink4,infiniband-ndr")]
    ['nvlink4', 'infiniband-ndr']
    """
    parts = text.split(",")
    if len(parts) > 2:
        raise InputError(f"link {text!r} names {len(parts)} links: give one, or that within and that between machines")
    return parse_link(parts[0]), parse_link(parts[-1])
