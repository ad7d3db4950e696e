"""YAML and flags to `RunConfig`, and back: strict reading, exact round trips.

Touches only the file it is given. The loader is PyYAML's safe composer with our own scalars (as in YAML 1.2 `1e-3` is a
number and `no` a text; `010` is a text; no dates), no tags, no duplicate keys, bounded size, depth and alias expansion.
Environment variables are not expanded. Nothing in a file can become an import path.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from tare.core.errors import InputError, nearest
from tare.train.config import RunConfig
from tare.train.settings import check, kind_of, show

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 20, 10_000, 20

SECTIONS: dict[str, type] = dict(get_type_hints(RunConfig))
PATHS: tuple[str, ...] = tuple(f"{title}.{spec.name}" for title, kind in SECTIONS.items() for spec in fields(kind))

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "Null": None, "~": None, "": None}


@dataclass(frozen=True)
class Given:
    """One value that the user gave: for which field (`method.options.scale`), and where it was written."""

    path: str
    value: Any
    where: str


def scalar(text: str) -> Any:
    """What an unquoted YAML scalar means here.

    >>> scalar("1e-3"), scalar("no"), scalar("010"), scalar("1_000"), scalar("12:30:00")
    (0.001, 'no', '010', 1000, '12:30:00')
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        # Python refuses to read integers of more than 4300 digits; none of ours has more than 20.
        return int(text) if len(text) < 100 else float("inf")
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _NOT_FINITE.fullmatch(text):
        return float((match[1] or "") + "inf") if match[2] else float("nan")
    return text


class _Reader:
    """Turns composed YAML nodes into plain values, bounded in number and depth."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = 0

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}, line {node.start_mark.line + 1}"

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        """The plain value of a node. Aliases are followed, and what they expand to is counted."""
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise InputError(f"{self.place(node)}: too many or too deeply nested values; is this a run configuration?")
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        self.refuse_tag(node)
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(item, depth + 1) for key, item in self.pairs(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        return scalar(node.value) if plain else node.value

    def refuse_tag(self, node: yaml.Node) -> None:
        if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise InputError(f"{self.place(node)}: tags such as {node.tag!r} are not allowed; write a plain value")

    def pairs(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
        """Keys and value nodes of a mapping; keys are texts and stand once."""
        self.refuse_tag(node)
        seen: dict[str, yaml.Node] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{self.place(key)}: a key must be a plain word")
            if key.value in seen:
                raise InputError(f"{self.place(key)}: {show(key.value)} is given twice; keep one")
            seen[key.value] = item
        return list(seen.items())


class _Loader(yaml.SafeLoader):
    """Composes nodes only; every scalar is a text until `scalar` reads it."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the name PyYAML reads)


def loads(text: str, name: str = "<text>") -> list[Given]:
    """The settings of a YAML text, each with its line. Values are not checked yet; keys are.

    Raises `InputError` for bad syntax, duplicate or unknown keys, tags, and sections that are no mappings.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise InputError(f"{name}: too deeply nested values; is this a run configuration?") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not a YAML text"
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{name}{line}: not valid YAML: {problem}") from None
    if root is None:
        raise InputError(f"{name}: empty; expected sections {', '.join(SECTIONS)}")
    reader = _Reader(name)
    if not isinstance(root, yaml.MappingNode):
        got = show(reader.value(root))
        raise InputError(f"{name}: expected a mapping with sections {', '.join(SECTIONS)}, got {got}")
    given = []
    for title, section in reader.pairs(root):
        if title not in SECTIONS:
            raise InputError(f"{reader.place(section)}: {_unknown(title, list(SECTIONS), whole=True)}")
        if not isinstance(section, yaml.MappingNode):
            value = show(reader.value(section))
            raise InputError(f"{reader.place(section)}: {title}: expected a mapping of settings, got {value}")
        for key, node in reader.pairs(section):
            path = f"{title}.{key}"
            if path not in PATHS:
                raise InputError(f"{reader.place(node)}: {_unknown(path, list(PATHS))}")
            given.append(Given(path, reader.value(node), f"{reader.place(node)}: {path}"))
    return given


def read(path: str | Path) -> list[Given]:
    """The settings of a YAML file; see `loads`."""
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; --config expects a YAML file")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES} bytes; is this a run configuration?")
        return loads(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; --config expects a YAML file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def flag(path: str, text: str, where: str) -> Given:
    """A setting given on the command line as text. Raises `InputError` for an unknown path."""
    title, _, rest = path.partition(".")
    name, _, key = rest.partition(".")
    if f"{title}.{name}" not in PATHS or (key and kind_of(SECTIONS[title], name)[0] != dict[str, Any]):
        raise InputError(f"--{_unknown(path, list(PATHS))}")
    kind, optional = kind_of(SECTIONS[title], name)
    if kind == dict[str, Any]:
        node = yaml.compose(text, Loader=_Loader) if text.strip()[:1] in ("[", "{") else None
        return Given(path, scalar(text) if node is None else _Reader(where).value(node), where)
    if text in ("none", "null") and optional:
        return Given(path, None, where)
    numeric = kind in (int, float, bool)
    return Given(path, scalar(text) if numeric else text, where)


def build(*sources: Iterable[Given]) -> RunConfig:
    """The configuration made of the given settings; later sources win over earlier ones.

    Within one source a setting may be repeated only with the same value (`--steps 5 --train.steps 6` is an error).
    """
    merged: dict[str, Any] = {}
    for source in sources:
        seen: dict[str, Given] = {}
        for item in source:
            earlier = seen.setdefault(item.path, item)
            if repr(earlier.value) != repr(item.value):
                other = "an earlier one" if item.where == earlier.where else earlier.where
                values = f"{show(item.value)} against {show(earlier.value)}"
                raise InputError(f"{item.where}: conflicts with {other} ({values}); give one of them")
            title, name, *key = item.path.split(".", 2)
            value = {**merged.get(f"{title}.{name}", {}), key[0]: item.value} if key else item.value
            merged[f"{title}.{name}"] = check(SECTIONS[title], name, value, item.where)
    released = merged.get("method.release") and merged.get("train.clip_mode", "exact") == "exact"
    if released and "train.clip" not in merged:
        merged["train.clip"] = None  # the gradients are gone before their common norm could be known
    parts: dict[str, dict[str, Any]] = {title: {} for title in SECTIONS}
    for path, value in merged.items():
        title, name = path.split(".")
        parts[title][name] = value
    return RunConfig(**{title: SECTIONS[title](**values) for title, values in parts.items()})


def load(path: str | Path) -> RunConfig:
    """The configuration in a YAML file; what it leaves out has its default."""
    return build(read(path))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this or another YAML reader would take for something else; writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*"), list("-+0123456789"))


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML text: `build(loads(dump(config))) == config`, exactly."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _unknown(path: str, allowed: list[str], whole: bool = False) -> str:
    """The message for an unknown key: the nearest one, and what is allowed there."""
    title, _, name = path.partition(".")
    siblings = [p.partition(".")[2] for p in allowed if p.startswith(title + ".")]
    if whole or not siblings:
        sections = list(SECTIONS)
        owners = [p for p in PATHS if p.endswith("." + path)]
        hint = f" (did you mean {owners[0]!r}?)" if owners else nearest(title, sections)
        return f"{path}: unknown section{hint}; allowed: {', '.join(sections)}"
    elsewhere = [p for p in PATHS if p.endswith("." + name)]
    hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(name, siblings)
    return f"{path}: unknown setting{hint}; allowed: {', '.join(siblings)}"
