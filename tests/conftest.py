"""Shared by all tests: helpers on the path, a cache of our own, one fixed thread count."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, so that what fails here fails everywhere; `pytest --hypothesis-profile=search` looks for others.
settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("search", derandomize=False)
settings.load_profile("same")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenizers, shards and plans of the tests and the native library go to a folder of the session."""
    if "TARE_CACHE" in os.environ:
        yield Path(os.environ["TARE_CACHE"])
        return
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TARE_CACHE"] = str(folder)
    yield folder
    del os.environ["TARE_CACHE"]


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Notes how many kills, changed bytes or payloads a test went through; `bench/faults.py` adds them up."""
    return lambda what, count: record_property(f"tally {what}", count)
