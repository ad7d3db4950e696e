"""The pages are true: generated ones are those that would be generated now, code in them runs, links lead somewhere, no name is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tare.methods.compose import RESIDUALS, RULES
from tare.rules.maps import MAPS
from tare.subspace.catalogue import BASES
from tare.subspace.wrapper import SIDES

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


def test_every_name_of_an_axis_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")
    for name in (*BASES, *RESIDUALS, *MAPS, *RULES, *SIDES):
        assert f"`{name}`" in text, name
