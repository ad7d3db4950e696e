"""The pages are true: generated ones are those that would be generated now, code in them runs, links lead somewhere, no name is missing."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tare.core.recipe import Recipe
from tare.methods.compose import RESIDUALS, RULES
from tare.rules.maps import MAPS
from tare.rules.momentum import Momentum
from tare.subspace.catalogue import BASES
from tare.subspace.wrapper import SIDES
from tare.zeroth.directions import Directed, Gaussian, Untouched
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import THETA, Estimate, Term, away
from tare.zeroth.record import KEPT

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def test_generated_pages_are_current() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["composition", "storage"])
def test_code_in_pages_runs(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    known = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"`([\w/]+\.py)(?:::\w+)?`", page.read_text(encoding="utf-8")):
        if name.startswith("tests/"):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"
        elif name.startswith("test_"):
            assert name in known, f"{page.name}: {name}"


def test_every_name_of_an_axis_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")
    for name in (*BASES, *RESIDUALS, *MAPS, *RULES, *SIDES):
        assert f"`{name}`" in text, name


def test_the_forward_method_of_the_guide_learns() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "ForwardOptimizer" in b]
    names = {
        "dataclass": dataclass, "Recipe": Recipe, "Momentum": Momentum, "Directed": Directed, "Untouched": Untouched, "Gaussian": Gaussian,
        "THETA": THETA, "away": away, "Estimate": Estimate, "Term": Term, "ForwardOptimizer": ForwardOptimizer, "CARD": None,
        "register": lambda card: lambda cls: cls,
    }  # fmt: skip
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 1), torch.randn(16, 4)
    optimizer = names["Mine"](net, 0.02)  # type: ignore[operator]
    losses = [optimizer.step(lambda: (net(x) - x.sum(1, keepdim=True)).square().mean()) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.param_groups[0][KEPT]["curvature"] > 0
