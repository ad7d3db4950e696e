"""The examples of populations run, and do what they say."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_integers_alone_learn_real_text() -> None:
    before, after = example("egg_bytes").main(steps=40)
    assert before > 8.0
    assert after < before - 1.5


def test_an_order_is_enough_to_find_a_colour() -> None:
    found = example("rank_by_hand")
    wanted = (250, 120, 30)
    colour = found.main(found.nearest_to(wanted))
    assert sum(abs(a - b) for a, b in zip(colour, wanted, strict=True)) < 60


def test_a_person_answers_and_may_err(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter(
        ["3", "no", "1 1 2", "3 1 5", "2"]
    )  # too few, no numbers, one twice; then an order, and the best of a line
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    found = example("rank_by_hand")
    found.main(found.ask_person, rounds=1)
    told = capsys.readouterr().out
    assert "each once" in told
    assert "\x1b[48;2;" in told
    assert next(answers, None) is None


def test_what_the_page_tells_users_to_type_runs_and_gets_there() -> None:
    page = (EXAMPLES.parent / "docs" / "zeroth.md").read_text(encoding="utf-8")
    found = []
    for heading in ("Populations", "Rankings: only what is better than what", "Consensus"):
        section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
        (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
        exec(compile(block, "zeroth.md", "exec"), names := {})
        found.append(names)
    population, ranking, particles = found
    x, y, model = (population[name] for name in ("x", "y", "model"))
    assert (model(x).argmax(1) == y).float().mean() > 0.75
    assert ranking["opt"].steps == 2
    assert bool((particles["x"] - 0.3).abs().max() < 0.3)
    assert particles["opt"].state_bytes().total == 60 * 2 * torch.float32.itemsize
