"""docs/faults.md names tests that exist, and says rightly which of them are slow."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def names_in(path: Path) -> dict[str, bool]:
    """The tests of a file: whether the whole test is slow."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = any(
                ast.unparse(mark) in ("pytest.mark.slow", "SLOW", "SLOWLY") for mark in node.decorator_list
            )
    return found


def test_every_test_that_is_named_exists() -> None:
    named = 0
    for row in TABLE.splitlines():
        path = None
        for file, test, rest in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`([^`]*)", row):
            if not file and not test:
                continue
            path = ROOT / file if file else path
            assert path is not None, row
            assert path.is_file(), path
            named += 1
            if test:
                tests = names_in(path)
                assert test in tests, f"{path.name} has no {test}"
                assert tests[test] == rest.lstrip().startswith("(slow)"), f"{test}: slow or not?"
    assert named > 50
