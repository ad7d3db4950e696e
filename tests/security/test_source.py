"""S1, S4, S8, S9, S12 and T16 as far as the source tells: nothing can run what was loaded, and no number of a part of a leaf decides."""

import pytest
from source_scan import FILES, SOURCE, UNPICKLERS, calls, dangers, imports_of, scalars

# Modules that are named by a computed text, and why the text is never the user's.
COMPUTED = {
    "__init__.py": "names of a table in the file",
    "cli/main.py": "names of a table in the file",
    "methods/registry.py": "files of the package itself",
    "kernels/triton/dispatch.py": "files of the package itself",
    "report/bench_peers.py": "packages named in the file",
    "testing/forward.py": "of an object of the test",
    "zeroth/portable.py": "modules of tare alone, and of these frozen dataclasses alone",
}
# Where numbers leave tensors in the rooms that step, and why no rank can decide otherwise than the others by it.
LEAVES = {
    "core/clipping.py:numbers_of": "sums of squares, of all ranks where gradients are cut",
    "core/shard/apart.py:flags_of_all": "what all ranks have gathered",
    "core/shard/exchange.py:numbers_of_all": "what all ranks have gathered",
    "core/southwell.py:gs": "scores of blocks, whole gradients only",
    "core/southwell.py:gsd": "scores of blocks, whole gradients only",
    "core/tensors.py:healthy": "of a whole matrix: before a factorisation",
    "subspace/apart.py:RowSteps.form": "what the owner decided and sent to all",
    "subspace/online.py:projector_error": "a measure for people",
    "subspace/refresh.py:AdaptiveRefresh.refreshed": "of a basis, which sees the whole matrix",
    "subspace/renewal.py:renew": "of a whole matrix, before a basis is computed",
    "subspace/sparse.py:_by_rows": "of entries of a whole matrix",
}


def test_nothing_in_the_source_can_run_what_was_loaded() -> None:
    found = {}
    for path in FILES:
        name = path.relative_to(SOURCE).as_posix()
        for line, what in dangers(path.read_text(encoding="utf-8")):
            if name.startswith("testing/") and what.startswith("pickle."):
                continue  # round trips of objects made there
            if what.endswith("computed name") and name in COMPUTED:
                continue
            found[f"{name}:{line}"] = what
    assert found == {}


def test_unpicklers_and_templates_are_not_even_imported() -> None:
    names = UNPICKLERS | {"jinja2", "mako", "commands", "imp", "runpy"}
    found = {
        path.relative_to(SOURCE).as_posix(): imports_of(path.read_text(encoding="utf-8"), names)
        for path in FILES
        if "testing" not in path.parts
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_processes_are_started_by_lists_of_words_alone() -> None:
    for path in FILES:
        for line, name, node in calls(path.read_text(encoding="utf-8")):
            if name.startswith("subprocess."):
                keys = {word.arg for word in node.keywords}
                assert "shell" not in keys, f"{path}:{line}"


def test_numbers_leave_tensors_only_where_all_ranks_see_the_same() -> None:
    """Where a gradient may be a part of a leaf, a plain `.item()` or `bool(...)` gives each rank an answer of its own."""
    found = {
        f"{path.relative_to(SOURCE).as_posix()}:{where}"
        for path in FILES
        if path.relative_to(SOURCE).parts[0] in ("core", "rules", "subspace")
        for where, _, _ in scalars(path.read_text(encoding="utf-8"))
    }
    assert found - LEAVES.keys() == set(), "reduce over ranks first (core.shard), or say here why it is the same on all"


DANGEROUS = [
    "import pickle\npickle.load(f)", "from pickle import loads as l\nl(b)", "import torch\ntorch.load(p)",
    "import joblib as j\nj.load(p)",
    "import torch as t\nt.load(p, weights_only=False)", "import yaml\nyaml.load(s)", "eval(text)", "exec(text)", "import os\nos.system(c)",
    "import subprocess as s\ns.run(c, shell=True)", "from os import popen\npopen(c)",
    "AutoModel.from_pretrained(p, trust_remote_code=flag)",    "import numpy as np\nnp.load(p, allow_pickle=True)",
    "import tarfile\ntarfile.open(p).extractall()", "__import__(name)",
    "import importlib\nimportlib.import_module(name)", "import torch.distributed.checkpoint as d\nd.load(x, checkpoint_id=p)",
    "from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader(p)",
]  # fmt: skip


@pytest.mark.parametrize("text", DANGEROUS)
def test_the_scan_sees(text: str) -> None:
    assert dangers(text)


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import torch\ntorch.load(p, weights_only=True)",
        "import yaml\nyaml.safe_load(s)",
        "json.load(f)",
        "self.load(p)",
    ],
)
def test_the_scan_lets_pass(text: str) -> None:
    assert dangers(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(g):\n if g.isnan().any():\n  pass", "def f(g):\n return float(g.norm())", "def f(g):\n return g.item()",
        "def f(g):\n x = 1 if bool(g.isfinite().all()) else 2",
    ],
)  # fmt: skip
def test_the_scan_sees_numbers_that_leave(text: str) -> None:
    assert [where for where, _, _ in scalars(text)] != []
    assert {where for where, _, _ in scalars(text)} == {"f"}
