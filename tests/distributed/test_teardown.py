"""Processes part without aborting: in peace, after a fault that all hear of, and after one in the middle of a step."""

import socket
from typing import Any

import pytest
import work_teardown as work
from processes import CONTEXT

CASES = [(how, end, again) for again in range(9) for end in ("peace", "fault", "step") for how in ("ddp", "fsdp")]
SHORT = (("ddp", "peace", 0), ("ddp", "fault", 0), ("fsdp", "step", 0))


def ends(how: str, end: str) -> list[int]:
    """The exit codes of two processes; negative ones are signals, of an abort too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [CONTEXT.Process(target=work.run, args=(rank, port, how, end)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    found = [process.exitcode for process in both]
    for process in both:
        process.kill()
    assert None not in found, "a process waits for ever"
    return [int(code) for code in found if code is not None]


@pytest.mark.parametrize(
    ("how", "end", "again"), [pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow) for case in CASES]
)
def test_parting_never_aborts(how: str, end: str, again: int, tally: Any) -> None:
    codes = ends(how, end)
    assert codes == ([0, 0] if end == "peace" else [1, 1])
    tally("groups left without an abort", 1)
