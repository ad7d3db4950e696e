"""What a checkpoint folder holds, read tensor by tensor and slice by slice, whichever kind it is.

single:  `weights.safetensors`, `optimizer.safetensors`: every tensor whole, state under `state.NUMBER.KEY`.
sharded: `weights-I-of-N.safetensors`, `optimizer-I-of-N.safetensors`, a pair for each rank, state under `state.LEAF.KEY`, and
`layout.json`, which says in which boxes a tensor lies where.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tare.core.errors import CheckpointError
from tare.train import integrity
from tare.train.tensorfile import BY_NAME, TensorFile
from tare.train.trees import unflatten

WEIGHTS, TENSORS, OPTIMIZER, TRAINER = "weights.safetensors", "optimizer.safetensors", "optimizer.json", "trainer.json"
LAYOUT = "layout.json"
SINGLE_FILES = (WEIGHTS, TENSORS, OPTIMIZER, TRAINER)
SHARDED_FILES = (LAYOUT, OPTIMIZER, TRAINER)

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, how large it is


class Held:
    """A file of tensors, opened when it is first read: of the files of many ranks, one needs few."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def open(self) -> TensorFile:
        return TensorFile(self.path)


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, in one file under the tensor's name."""

    file: Held
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def read(self, name: str, dtype: torch.dtype, begin: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The part of it that begins at `begin`, counted in the whole tensor."""
        self.check(name, dtype)
        return self.file.open.part(name, _less(begin, self.offsets), sizes)

    def check(self, name: str, dtype: torch.dtype) -> None:
        """Raise `CheckpointError` unless the file has it as the layout says."""
        file = self.file.open
        if file.shapes.get(name) != self.sizes or file.dtypes.get(name) != dtype:
            raise CheckpointError(
                f"{self.file.path.parent / LAYOUT}: damaged ({name} is another in {self.file.path.name})"
            )


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a checkpoint: its global shape and dtype, and its pieces, read when asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of it: a view of the mapped file where it lies in one piece."""
        return self.read((0,) * len(self.shape), self.shape)

    def read(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The box that begins at `offsets`; only what lies in it is read. Any dtype stays as it is."""
        met = [
            (piece, *both) for piece in self.pieces if (both := _meet((piece.offsets, piece.sizes), (offsets, sizes)))
        ]
        if len(met) == 1 and met[0][2] == sizes:
            piece, begin, size = met[0]
            return piece.read(self.name, self.dtype, begin, size)
        found = torch.empty(sizes, dtype=self.dtype)
        for piece, begin, size in met:
            at = tuple(slice(a, a + n) for a, n in zip(_less(begin, offsets), size, strict=True))
            found[at].copy_(piece.read(self.name, self.dtype, begin, size))
        return found


@dataclass(frozen=True)
class Content:
    """An open checkpoint: its manifest, its weights, the state of its optimizer with `Stored` in the place of tensors, and the rest.

    `state`: leaf name -> what the rule keeps of it; where a single checkpoint has no names, its number. `groups`: as in
    `state_dict`. `order`: the leaf of each number in the groups. `exchange`: of a communication hook, if there was one.
    """

    folder: Path
    manifest: dict[str, Any]
    weights: dict[str, Stored]
    state: dict[Any, dict[str, Any]]
    groups: list[dict[str, Any]]
    order: dict[int, Any]
    trainer: dict[str, Any]
    exchange: dict[str, Any] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        return bool(self.manifest["format"] == integrity.SHARDED)

    def state_dict(self, make: Callable[[Stored], Any] = Stored.whole) -> dict[str, Any]:
        """What `optimizer.state_dict()` gave, made whole; `make` turns what is stored into what is wanted."""
        numbers = {leaf: number for number, leaf in self.order.items()}
        state = {numbers[leaf]: _made(raw, make) for leaf, raw in self.state.items()}
        return {"state": dict(sorted(state.items())), "param_groups": _made(self.groups, make)}


def open_content(folder: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1) -> Content:
    """Open a folder that has been verified. Raises `CheckpointError`, naming the file that is at fault.

    part, parts: of several processes each opens every `parts`-th file of tensors to see whether it has what it should.
    """
    sharded = manifest["format"] == integrity.SHARDED
    for name in SHARDED_FILES if sharded else SINGLE_FILES:
        if name not in manifest["files"]:
            raise CheckpointError(f"{folder / name}: missing from the checkpoint")
    weights, tensors = _sharded_tensors(folder, manifest, part, parts) if sharded else _single_tensors(folder)
    read = _sharded_state if sharded else _single_state
    tree = parsed(folder / OPTIMIZER, lambda text: _tree(text, tensors))
    state, groups, order = parsed(folder / OPTIMIZER, lambda _: _sane(*read(tree)))
    trainer = parsed(folder / TRAINER, lambda text: _tree(text, {}))
    return Content(folder, manifest, weights, state, groups, order, trainer, dict(tree.get("exchange") or {}))


def parsed(path: Path, read: Callable[[str], Any]) -> Any:
    """A JSON file read. Raises `CheckpointError`, naming it, where it makes no sense."""
    try:
        return read(path.read_text("utf-8"))
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as fault:
        raise CheckpointError(f"{path}: damaged ({type(fault).__name__}: {fault})") from fault


def _single_tensors(folder: Path) -> tuple[dict[str, Stored], dict[str, Stored]]:
    found: tuple[dict[str, Stored], dict[str, Stored]] = {}, {}
    for held, into in zip((Held(folder / WEIGHTS), Held(folder / TENSORS)), found, strict=True):
        for name in held.open.names:
            shape, dtype = held.open.shapes[name], held.open.dtypes[name]
            if dtype is None:
                raise CheckpointError(f"{held.path}: {name} has a dtype that this tare does not know; upgrade tare")
            into[name] = Stored(name, shape, dtype, (Piece(held, (0,) * len(shape), shape),))
    return found


def _sharded_tensors(
    folder: Path, manifest: dict[str, Any], part: int, parts: int
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    names = sorted(name for name in manifest["files"] if name.endswith(".safetensors"))
    files = {name: Held(folder / name) for name in names}

    def read(text: str) -> tuple[dict[str, Stored], dict[str, Stored]]:
        layout = json.loads(text)
        return _placed(layout["weights"], files), _placed(layout["optimizer"], files)

    found: tuple[dict[str, Stored], dict[str, Stored]] = parsed(folder / LAYOUT, read)
    mine = {id(files[name]) for name in names[part::parts]}
    for stored in (*found[0].values(), *found[1].values()):
        for piece in stored.pieces:
            if id(piece.file) in mine:
                piece.check(stored.name, stored.dtype)
    return found


def _placed(layout: dict[str, Any], files: dict[str, Held]) -> dict[str, Stored]:
    """The tensors of a layout. Raises ValueError or KeyError where a piece is in no file or outside of its tensor, or one has holes."""
    found = {}
    for name, fact in layout.items():
        shape, dtype = tuple(fact["shape"]), BY_NAME[fact["dtype"]]
        pieces = tuple(Piece(files[file], tuple(offsets), tuple(sizes)) for file, offsets, sizes in fact["pieces"])
        boxes = [(piece.offsets, piece.sizes) for piece in pieces]
        volume = sum(torch.Size(sizes).numel() for _, sizes in boxes)
        if volume != torch.Size(shape).numel() or not pieces:
            raise ValueError(f"the pieces of {name} do not make it whole")
        if volume and any(_meet(box, ((0,) * len(shape), shape)) != box for box in boxes):
            raise ValueError(f"a piece of {name} lies outside of it")
        if _overlap(boxes):
            raise ValueError(f"pieces of {name} overlap")
        found[name] = Stored(name, shape, dtype, pieces)
    return found


def _overlap(boxes: list[Box]) -> bool:
    """Whether any two have a point in common."""
    ordered = sorted(box for box in boxes if all(box[1]))
    for number, (offsets, sizes) in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if sizes and other[0][0] >= offsets[0] + sizes[0]:
                break  # it, and all behind it, begin below the last row
            if _meet((offsets, sizes), other):
                return True
    return False


def _tree(text: str, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    found = unflatten(json.loads(text), tensors)
    if not isinstance(found, dict):
        raise TypeError("not a table")
    return found


def _sharded_state(plain: dict[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]], dict[int, Any]]:
    return plain["state"], plain["param_groups"], dict(enumerate(plain["order"]))


def _single_state(plain: dict[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]], dict[int, Any]]:
    if not plain:  # of no optimizer
        return {}, [], {}
    order = {number: number for number in plain["state"]}
    for group in plain["param_groups"]:
        order |= zip(group["params"], group.get("param_names") or group["params"], strict=True)
    return {order[number]: raw for number, raw in plain["state"].items()}, plain["param_groups"], order


def _sane(
    state: Any, groups: Any, order: dict[Any, Any]
) -> tuple[dict[Any, Any], list[dict[str, Any]], dict[int, Any]]:
    """The same, if it can be what an optimizer gave. Raises ValueError where leaves are not numbered or none's state is there."""
    if not all(type(number) is int for number in order):
        raise ValueError("parameters are numbered by integers")
    if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
        raise ValueError("param_groups is not a list of tables")
    leaves = set(order.values())
    for leaf, raw in state.items():
        if leaf not in leaves or not isinstance(raw, dict):
            raise ValueError(f"state of {leaf!r}, which is no parameter of any group, or not a table")
    return state, groups, order


def _made(tree: Any, make: Callable[[Stored], Any]) -> Any:
    if isinstance(tree, Stored):
        return make(tree)
    if isinstance(tree, dict):
        return {key: _made(item, make) for key, item in tree.items()}
    return type(tree)(_made(item, make) for item in tree) if isinstance(tree, list | tuple) else tree


def _meet(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None for nothing. Numbers (no dimensions) always meet."""
    begin = tuple(map(max, a[0], b[0]))
    end = tuple(min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    return (begin, _less(end, begin)) if all(x < y for x, y in zip(begin, end, strict=True)) else None


def _less(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))
