"""Pools of ranks, one a test module."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


def _pool(size: int) -> Iterator[Ranks]:
    pool = Ranks(size)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def ranks2() -> Iterator[Ranks]:
    yield from _pool(2)


@pytest.fixture(scope="module")
def ranks3() -> Iterator[Ranks]:
    yield from _pool(3)


@pytest.fixture(scope="module")
def ranks4() -> Iterator[Ranks]:
    yield from _pool(4)
