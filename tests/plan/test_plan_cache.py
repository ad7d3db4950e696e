"""Plans kept on disk are forgotten when anything changes that they were made with."""

import ast
from pathlib import Path

import tare
from tare.plan import cache

ROOT = Path(tare.__file__).parent


def imported(file: Path) -> set[Path]:
    """The files of tare that one imports, anywhere in it, and the packages that they lie in."""
    names = set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = set[Path]()
    for name in names:
        if name.startswith("tare."):
            place = ROOT.joinpath(*name.split(".")[1:])
            found |= {one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()}
    return found


def test_every_file_that_a_plan_stands_on_decides() -> None:
    reached, new = set[Path](), set((ROOT / "plan").rglob("*.py"))
    while new:
        reached |= new
        new = {other for file in new for other in imported(file)} - reached
    assert len(reached) > 100  # the methods too
    left = {str(file.relative_to(ROOT)) for file in reached - set(cache.deciding_files())}
    assert not {name for name in left if name != "__init__.py"}


def test_a_kernel_in_another_language_decides_too() -> None:
    assert {".py", ".cpp"} <= {file.suffix for file in cache.deciding_files()}
