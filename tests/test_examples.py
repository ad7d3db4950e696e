"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop_learns() -> None:
    before, after = example("own_loop").main()
    assert after < 0.7 * before


def test_every_composition_learns_and_a_senseless_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("compose_your_own").main()
    assert len(found) == 4
    for name, (before, after) in found.items():
        assert after < 0.5 * before, name
    assert "refused: residual:" in capsys.readouterr().out
