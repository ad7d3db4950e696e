"""Reads source without running it: calls that could execute what was loaded, and scalars that leave a tensor."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "tare"
FILES = sorted(SOURCE.rglob("*.py"))

UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
LOADERS = {f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all")}
ARCHIVES = {"extractall", "unpack_archive"}
# Reductions: of a shard they give a number of the shard alone.
REDUCED = {
    "sum",
    "mean",
    "norm",
    "max",
    "min",
    "amax",
    "amin",
    "all",
    "any",
    "item",
    "median",
    "det",
    "trace",
    "count_nonzero",
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; else the last part with a leading dot."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def calls(text: str) -> Iterator[tuple[int, str, ast.Call]]:
    """Every call of a source text: (line, function, node), imported names spelled out."""
    tree = parsed(text)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({item.asname: item.name for item in node.names if item.asname})
        elif isinstance(node, ast.ImportFrom):
            names.update({item.asname or item.name: f"{node.module}.{item.name}" for item in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = dotted(node.func).partition(".")
            yield node.lineno, names.get(first, first) + dot + rest, node


def dangers(text: str) -> list[tuple[int, str]]:
    """(line, what) of every call that could run what comes from outside."""
    found = []
    for line, name, node in calls(text):
        given = {word.arg: word.value for word in node.keywords}
        true = lambda word, given=given: isinstance(given.get(word), ast.Constant) and given[word].value is True  # type: ignore[attr-defined]  # noqa: E731
        parts = name.split(".")
        if parts[0] in UNPICKLERS and parts[-1] in ("load", "loads", "Unpickler", "open"):
            found.append((line, name))
        elif name.startswith("torch.distributed.checkpoint") and parts[-1] in ("load", "load_state_dict", "async_load"):
            if "storage_reader" not in given:  # its own reader unpickles; see tests of train.dcp for ours
                found.append((line, f"{name} without a reader of ours"))
        elif name.endswith("FileSystemReader"):
            found.append((line, f"{name}, which unpickles"))
        elif parts[0] in ("torch", "pandas") and parts[-1] in ("load", "read_pickle") and not true("weights_only"):
            found.append((line, f"{name} without weights_only=True"))
        elif parts[0] in ("np", "numpy") and "allow_pickle" in given:
            found.append((line, f"{name} with allow_pickle"))
        elif name in BUILTINS or name in SHELLS or name in LOADERS or parts[-1] in ARCHIVES:
            found.append((line, name))
        elif "shell" in given or "trust_remote_code" in given or "allow_dangerous_deserialization" in given:
            found.append((line, f"{name} with shell or remote code"))
        elif name == "importlib.import_module" and not _fixed(node):
            found.append((line, f"{name} of a computed name"))
    return found


def _fixed(node: ast.Call) -> bool:
    return bool(node.args) and isinstance(node.args[0], ast.Constant)


def imports_of(text: str, names: set[str]) -> list[tuple[int, str]]:
    """Imports of certain packages."""
    found = []
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, item.name) for item in node.names if item.name.split(".")[0] in names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in names:
            found.append((node.lineno, node.module or ""))
    return found


def scalars(text: str) -> list[tuple[str, int, str]]:
    """(function, line, what) where a number leaves a tensor: `.item()`, `.tolist()`, and `float`, `bool`, `int`, `if` of a reduction."""
    found: list[tuple[str, int, str]] = []

    def walk(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                walk(child, f"{where}.{child.name}".lstrip("."))
                continue
            called = child.func if isinstance(child, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in ("item", "tolist"):
                found.append((where, child.lineno, f".{called.attr}()"))
            elif (
                isinstance(called, ast.Name)
                and called.id in ("float", "bool", "int")
                and any(map(_reduces, ast.walk(child)))
            ):
                found.append((where, child.lineno, f"{called.id}() of a reduction"))
            elif isinstance(child, ast.If | ast.IfExp | ast.While) and any(map(_reduces, ast.walk(child.test))):
                found.append((where, child.lineno, "a branch on a reduction"))
            walk(child, where)

    walk(parsed(text), "")
    return sorted(set(found))


def _reduces(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REDUCED
