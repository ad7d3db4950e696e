"""Workers of one start find each other in a store that earlier starts have written in."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed as dist

from tare.core.errors import InputError
from tare.parallel.meeting import meeting, named

LONG = timedelta(seconds=30)


def start(store: dist.Store, size: int) -> list[str]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: named(store, rank, size, LONG), reversed(range(size))))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_agree_and_every_start_has_another_name(size: int) -> None:
    store = dist.HashStore()
    names = [start(store, size) for _ in range(4)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == 4


def test_what_broken_starts_left_deceives_nobody() -> None:
    store, short = dist.HashStore(), timedelta(seconds=0.2)
    with pytest.raises(InputError, match=r"torchrun: worker 0 has waited 0 s for worker 1"):
        named(store, 0, 3, short)  # alone: proposes, and is killed
    with pytest.raises(InputError, match="for worker 0"):
        named(store, 1, 3, short)  # answers the dead one
    assert len(set(start(store, 3))) == 1
    with pytest.raises(InputError, match="for worker 0"):
        named(store, 2, 3, short)  # a list is there, of a start that is over
    assert len(set(start(store, 3))) == 1


def test_a_store_of_the_first_worker_needs_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert meeting(LONG) == {}
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert meeting(LONG) == {}
