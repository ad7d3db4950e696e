"""Shared by the tests of kernels: recorded arrays, the slow twins, and whether a compiler is there."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tare.kernels import build

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Arrays recorded from the authors' code, by name."""
    return lambda name: load_file(TESTS / "golden" / f"{name}.safetensors")


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The slow twins of the codec."""
    spec = importlib.util.spec_from_file_location("reference_blockwise", TESTS / "reference" / "blockwise.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiler() -> str:
    """Path of the C++ compiler; skips the test where there is none."""
    try:
        return build.find_compiler()
    except build.Unavailable as error:
        pytest.skip(f"native kernels cannot be built here: {error}")
