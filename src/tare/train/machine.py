"""How much memory the machine has at all: a model that needs more is refused before any of it is asked for."""

import os
from pathlib import Path

import torch

from tare.core.errors import DoesNotFit
from tare.plan.budget import format_bytes

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def memory_of(device: torch.device) -> int | None:
    """Bytes that a process could have on a device at the very most: on the CPU with swap, in a container its limit. None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        swap = int(facts.get("SwapTotal", "0 kB").split()[0]) * 1024
    except (OSError, ValueError, AttributeError):  # no Linux
        return None
    limits = [
        int(text) for path in map(Path, _LIMITS) if path.is_file() and (text := path.read_text().strip()).isdigit()
    ]
    return min(physical, *limits) + swap if limits else physical + swap


def require(peak: int, device: torch.device) -> None:
    """Raise `DoesNotFit` where a planned peak is more than the machine has."""
    there = memory_of(device)
    if there is not None and peak > there:
        raise DoesNotFit(
            f"model.name: a step needs {format_bytes(peak)} on {device}, and there are {format_bytes(there)} at all; take a smaller model "
            "or larger machine, or see what would fit: tare plan MODEL --budget "
            f"{format_bytes(there).replace(' ', '')}"
        )
