"""PyTorch's distributed checkpoint over our files: its planners decide which rank writes and reads what, safetensors and JSON hold it.

Nothing is pickled on disk, unlike in its own format. Each rank writes, syncs and hashes its files in a temporary folder; the coordinator
puts the manifest beside them and renames, after all have reported. `Reader` lets the stock `torch.distributed.checkpoint.load` read
folders of either kind; the files of one follow the convention of its `HuggingFaceStorageReader`, which reads them too.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tare.core.errors import CheckpointError
from tare.train import checkpoint, integrity, tensorfile
from tare.train.stored import LAYOUT, OPTIMIZER, TRAINER, Content, Stored

WEIGHTS_PART, STATE_PART = "weights", "optimizer"


@dataclass(frozen=True)
class Cut:
    """A rank's box of a tensor, as it is to be saved. `shape`: of the whole."""

    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Cut":
        """Of a DTensor, its local part; of any other tensor, all of it."""
        from torch.distributed.tensor import DTensor

        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return cls(tensor.detach(), (0,) * len(shape), shape)
        sizes, offsets = box_of(shape, tensor.device_mesh, tensor.placements)
        local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        if tuple(local.shape) != sizes:
            raise CheckpointError(
                f"a tensor of {list(shape)} lies across ranks as {tensor.placements}, which cannot be saved"
            )
        return cls(local, offsets, shape)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if not self.local.numel() and 0 not in self.shape:
            return []  # more ranks than rows
        chunk = ChunkStorageMetadata(torch.Size(self.offsets), self.local.size())
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), torch.Size(self.shape))
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


def box_of(shape: tuple[int, ...], mesh: Any, placements: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and offsets of this rank's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return tuple(sizes), tuple(offsets)


class Planner(DefaultSavePlanner):
    """As PyTorch's, for tensors by (part, name), plus what is no tensor: it travels with the plans, and the coordinator puts it together.

    Args:
        plain: the optimizer's state without its tensors, as far as this rank has it.
    """

    def __init__(self, plain: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.plain = plain

    def create_local_plan(self) -> SavePlan:
        return replace(super().create_local_plan(), planner_data=self.plain)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.plain = merged([plan.planner_data for plan in all_plans])
        plans, metadata = super().create_global_plan([replace(plan, planner_data=None) for plan in all_plans])
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].local


@dataclass
class Writer(StorageWriter):
    """Writes one checkpoint. texts: files of the coordinator, from the plain state of all. facts: for the manifest."""

    target: Path
    planner: Planner
    texts: Callable[[dict[str, Any]], dict[str, str]]
    facts: dict[str, Any]
    rank: int = 0
    size: int = 1
    temporary: Path | None = field(default=None, init=False)  # set on the coordinator

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: room for all, and a folder of which the others are told."""
        checkpoint.make(self.target.parent)
        needed = sum(item.tensor_storage_size() or 0 for plan in plans for item in plan.items) + checkpoint.SLACK
        integrity.require_space(self.target.parent, needed, f"the checkpoint {self.target.name}")
        self.temporary = integrity.aside(self.target)
        self.temporary.mkdir()
        return [replace(plan, storage_data=self.temporary.name) for plan in plans]

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """This rank's files, written, durable and hashed."""
        folder = self.target.parent / str(plan.storage_data)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not seen by rank {self.rank}; run.out must be a folder that all ranks share"
            )
        results = []
        for part in (WEIGHTS_PART, STATE_PART):
            items = [item for item in plan.items if item.index.fqn.startswith(f"{part}/")]
            if not items:
                continue
            name = f"{part}-{self.rank + 1:05}-of-{self.size:05}.safetensors"
            tensors = {item.index.fqn.partition("/")[2]: planner.resolve_data(item) for item in items}
            notes = tensorfile.sharding_notes(
                {item.index.fqn.partition("/")[2]: tuple(item.index.offset or ()) for item in items}
            )
            fact = integrity.put(folder / name, lambda path, t=tensors, n=notes: tensorfile.write(path, t, n))  # type: ignore[misc]
            fact = {"file": name, **fact}
            results += [WriteResult(item.index, item.tensor_storage_size() or 0, fact) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after all have written: what is common, the manifest, the rename."""
        folder = self.temporary
        assert folder is not None
        files: dict[str, dict[str, Any]] = {}
        places: dict[str, dict[tuple[int, ...], str]] = {}
        for result in (each for row in results for each in row):
            fact = dict(result.storage_data)
            places.setdefault(result.index.fqn, {})[tuple(result.index.offset or ())] = fact["file"]
            files[fact.pop("file")] = fact
        layout: dict[str, dict[str, Any]] = {WEIGHTS_PART: {}, STATE_PART: {}}
        for key, kept in metadata.state_dict_metadata.items():
            assert isinstance(kept, TensorStorageMetadata)
            part, _, name = key.partition("/")
            pieces = [[places[key][tuple(c.offsets)], list(c.offsets), list(c.sizes)] for c in kept.chunks]
            dtype = tensorfile.DTYPES[kept.properties.dtype]
            layout[part][name] = {"dtype": dtype, "shape": list(kept.size), "pieces": pieces}
        texts = {LAYOUT: json.dumps(layout), **self.texts(self.planner.plain)}
        for name in (LAYOUT, OPTIMIZER, TRAINER):
            files[name] = integrity.put(folder / name, lambda path, name=name: checkpoint.put_text(path, texts[name]))  # type: ignore[misc]
        facts = {**self.facts, "format": integrity.SHARDED, "ranks": self.size}
        integrity.seal(folder, self.target, files, facts)


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain state of all ranks as one: of a leaf, whatever any of them keeps. Raises `CheckpointError` where two disagree."""
    whole: dict[str, Any] = json.loads(json.dumps(parts[0]))
    for rank, part in enumerate(parts[1:], 1):
        if part["order"] != whole["order"] or part["param_groups"] != whole["param_groups"]:
            raise CheckpointError(f"ranks 0 and {rank} disagree on the optimizer's parameter groups; nothing is saved")
        for leaf, raw in part["state"].items():
            kept = whole["state"].setdefault(leaf, {})
            for name, value in raw.items():
                if kept.setdefault(name, value) != value:
                    raise CheckpointError(
                        f"ranks disagree on {name} of {leaf!r}: {kept[name]} and, on {rank}, {value}; nothing is saved"
                    )
    return whole


class Reader(StorageReader):
    """Reads a verified checkpoint of either kind for `torch.distributed.checkpoint.load`; what is wanted and nothing else.

    Tensors are named `weights/NAME` and `optimizer/NAME`; `part` drops one of these words and shows that part alone.
    """

    def __init__(self, content: Content, part: str | None = None) -> None:
        self._tensors: dict[str, Stored] = {}
        if part in (None, WEIGHTS_PART):
            self._tensors |= _prefixed(content.weights, "" if part else f"{WEIGHTS_PART}/")
        if part in (None, STATE_PART):
            state = {s.name: s for raw in content.state.values() for s in raw.values() if isinstance(s, Stored)}
            self._tensors |= _prefixed(state, "" if part else f"{STATE_PART}/")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Of every tensor its shape, dtype and boxes."""
        found = {}
        for name, stored in self._tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in stored.pieces]
            found[name] = TensorStorageMetadata(TensorProperties(dtype=stored.dtype), torch.Size(stored.shape), chunks)
        return Metadata(state_dict_metadata=found)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Fill what the plan asks for. Raises `CheckpointError` rather than convert a dtype."""
        for item in plan.items:
            stored = self._tensors[item.storage_index.fqn]
            base = tuple(item.storage_index.offset or (0,) * len(stored.shape))
            begin = tuple(a + b for a, b in zip(base, item.storage_offsets, strict=True))
            target = planner.resolve_tensor(item).detach()
            if target.dtype != stored.dtype:
                raise CheckpointError(f"{stored.name}: {stored.dtype} in the checkpoint, {target.dtype} asked for")
            target.copy_(stored.read(begin, tuple(item.lengths)))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _prefixed(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    return {prefix + name: stored for name, stored in tensors.items()}
