"""Every registered method keeps every invariant. A new method is picked up from the registry with no further code."""

import pytest

from tare.methods import registry
from tare.testing import invariants


@pytest.mark.parametrize("name", invariants.INVARIANTS)
@pytest.mark.parametrize("key", registry.keys("gradient"))
def test_invariant(key: str, name: str) -> None:
    invariants.check(key, name)
