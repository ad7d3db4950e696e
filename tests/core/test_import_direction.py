"""Imports run one way: cli -> report -> train -> plan -> parallel -> methods -> zeroth -> subspace -> rules -> core -> kernels."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tare

SOURCE = Path(tare.__file__).parent
ORDER = ("cli", "report", "train", "plan", "parallel", "methods", "zeroth", "subspace", "rules", "core", "kernels")
FILES = sorted(SOURCE.rglob("*.py"))
# What a room may import from outside; nothing said means any dependency of the package.
OUTSIDE = {
    "core": {"torch"},
    "kernels": {"torch", "numpy", "triton"},
    "rules": {"torch"},
    "subspace": {"torch"},
    "zeroth": {"torch", "safetensors"},
    "methods": {"torch"},
}


def room(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module named by an import statement, wherever it stands: also inside functions and TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def violations(path: Path, text: str) -> list[str]:
    here, bad = room(path), []
    for name in imported(ast.parse(text)):
        top, *rest = name.split(".")
        if top == "tare":
            there = rest[0] if rest else ""
            if here in ("", "testing"):
                ok = there != "testing" or here == "testing"
            elif there in ORDER:
                ok = here in ORDER and ORDER.index(there) >= ORDER.index(here)
            else:
                ok = (
                    there not in ("testing", "") and there not in ORDER
                )  # a name of the package itself, such as __version__
            if not ok:
                bad.append(name)
        elif here in OUTSIDE and top not in OUTSIDE[here] and top not in sys.stdlib_module_names:
            bad.append(name)
    return bad


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    assert room(path) in (*ORDER, "testing", ""), f"{path} stands in a room that the order does not know"
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("core/x.py", "from tare.rules.adam import Adam"), ("core/x.py", "import numpy"), ("kernels/x.py", "import tare.core.leaf"),
        ("rules/x.py", "from tare.subspace import wrapper"), ("plan/x.py", "def f():\n    from tare.train import loop"),
        ("cli/x.py", "from tare.testing import invariants"), ("__init__.py", "from tare import testing"),
        ("core/x.py", "from tare import methods"),
    ],
)  # fmt: skip
def test_the_reader_sees_wrong_imports(where: str, line: str) -> None:
    assert violations(SOURCE / where, line) != []


def test_the_reader_sees_right_imports() -> None:
    assert (
        violations(SOURCE / "cli/x.py", "import yaml\nfrom tare.kernels import native\nfrom tare import __version__")
        == []
    )
    assert violations(SOURCE / "core/x.py", "import math\nimport torch.nn\nfrom tare.kernels import gemm") == []


def test_files_are_rooms() -> None:
    """No file above 500 lines; the median below 200."""
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert lengths[-1] <= 500
    assert lengths[len(lengths) // 2] < 200
