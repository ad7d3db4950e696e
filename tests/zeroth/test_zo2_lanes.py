"""Lanes: runs that take turns, one at a time, and stop together."""

import threading

import pytest
import torch

from tare.zeroth.stream_lanes import Lanes, ambient


def journey(count: int, gates: list[int], fail: tuple[int, int] | None = None) -> tuple[list[str], Lanes]:
    """Lanes that note where they are; lane i passes gates[i] of them."""
    seen: list[str] = []
    lanes: Lanes

    def run(lane: int) -> int:
        for place in range(gates[lane]):
            seen.append(f"{lane}{'abcdef'[place]}")
            if fail == (lane, place):
                raise KeyError(lane)
            lanes.gate()
        return lane * 10

    lanes = Lanes([lambda lane=lane: run(lane) for lane in range(count)], lambda _: None, lambda _: None)
    return seen, lanes


def test_all_pass_a_gate_before_any_passes_the_next() -> None:
    seen, lanes = journey(3, [2, 2, 2])
    assert lanes.run() == [0, 10, 20]
    assert seen == ["0a", "1a", "2a", "0b", "1b", "2b"]


def test_lanes_of_unequal_length() -> None:
    seen, lanes = journey(3, [1, 3, 0])
    assert lanes.run() == [0, 10, 20]
    assert seen == ["0a", "1a", "1b", "1c"]


@pytest.mark.parametrize("fail", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_a_fault_in_one_stops_all(fail: tuple[int, int]) -> None:
    before = threading.active_count()
    seen, lanes = journey(3, [2, 2, 2], fail)
    with pytest.raises(KeyError, match=str(fail[0])):
        lanes.run()
    assert seen[-1] == f"{fail[0]}{'ab'[fail[1]]}", "nobody went on"
    assert threading.active_count() == before


def test_enter_and_leave_are_paired_and_never_overlap() -> None:
    events: list[tuple[str, int]] = []
    lanes = Lanes(
        [lambda: lanes.gate() or lanes.gate() for _ in range(2)],
        lambda lane: events.append(("in", lane)),
        lambda lane: events.append(("out", lane)),
    )
    lanes.run()
    inside = None
    for what, lane in events:
        if what == "in":
            assert inside is None
            inside = lane
        else:
            assert inside in (lane, None)
            inside = None


def test_ambient_takes_along_what_torch_keeps_for_a_thread() -> None:
    found = []

    def look() -> None:
        found.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        look()
        standing = ambient()

    def run() -> None:
        with standing():
            look()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0] == found[1] == (False, True, torch.float16)
