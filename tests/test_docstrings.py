"""The examples in docstrings are true: each module's run, and nothing that they print is otherwise."""

import doctest
import importlib
import pkgutil

import pytest

import tare

MODULES = sorted(module.name for module in pkgutil.walk_packages(tare.__path__, "tare."))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(found) > 30
