"""What the ranks do for `test_checkpoint_sharded`: train a small model that `fully_shard` cuts, save, load, go on."""

import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as stock
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tare.core.errors import CheckpointError
from tare.core.storage import Storage
from tare.methods import registry
from tare.train import checkpoint, sharded, tensorfile
from tare.train.dcp import Reader
from tare.train.saving import Saver
from tare.train.tensorfile import TensorFile


def build(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The same on every rank. Rows: uneven, even, and fewer than ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).to(dtype)


def job(how: str, method: str = "torch", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """A model as one process has it, or under DDP, FSDP2 or HSDP (by default copies alone; `hsdp2`: each copy cut in two), and an optimizer
    on it; the inner model, not DDP's."""
    model = build(dtype)
    if how == "fsdp":
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    elif how.startswith("hsdp"):
        shards = int(how.removeprefix("hsdp") or 1)
        mesh = init_device_mesh("cpu", (dist.get_world_size() // shards, shards), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif how == "ddp":
        DistributedDataParallel(model)
    if method == "torch":
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)
    name, _, more = method.partition(":")
    options: dict[str, Any] = {k: int(v) for k, _, v in (item.partition("=") for item in more.split(",") if item)}
    if "block" in options:
        options["storage"] = Storage("int8", block=options.pop("block"), min_quantized=1)
    return model, registry.build(name, model, lr=0.05, **options)


def steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Steps `first` .. `last` - 1; every rank has the same batch, so that all kinds of run do the same mathematics."""
    for step in range(first, last):
        batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        dtype = next(model.parameters()).dtype
        loss = model(batch.to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def numbers(model: nn.Module) -> list[float]:
    """All weights, whole, as one list."""
    found: list[float] = []
    for p in model.parameters():
        full = p.full_tensor() if hasattr(p, "full_tensor") else p
        found += full.detach().flatten().double().tolist()
    return found


def train(
    rank: int, size: int, *, how: str, folder: str = "", first: int = 0, last: int = 4, method: str = "torch", save: bool = False,
    dtype: str = "float64", **more: Any,
) -> list[float]:  # fmt: skip
    """Load the newest checkpoint of `folder`, if any is to be gone on from, step, and save. The weights in the end."""
    model, optimizer = job(how, method, getattr(torch, dtype))
    if first:
        snapshot = sharded.load_latest(Path(folder))
        assert snapshot is not None
        assert snapshot.step == first
        sharded.restore(model, optimizer, snapshot)
    steps(model, optimizer, first, last)
    if save:
        keep(rank, how, Path(folder), last, model, optimizer, **more)
    found = numbers(model)
    del model, optimizer
    gc.collect()
    return found


def keep(rank: int, how: str, folder: Path, step: int, model: nn.Module, optimizer: Any, **more: Any) -> None:
    """Save as a run of this kind does."""
    trainer = {"counters": {"step": step}}
    if sharded.is_sharded(model):
        sharded.save(folder, step, model=model, optimizer=optimizer, trainer=trainer, **more)
    elif rank == 0:
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group.setdefault("param_names", [name for name, _ in model.named_parameters()])
        checkpoint.save(folder, step, weights=checkpoint.weights_of(model), optimizer=state, trainer=trainer)
    if dist.is_initialized():
        dist.barrier()


def read_bytes(rank: int, size: int, how: str, folder: str) -> int:
    """Bytes of tensors that this rank asks the files for when it loads."""
    model, optimizer = job(how, "adamw")
    snapshot = sharded.load_latest(Path(folder))
    assert snapshot is not None
    count, real = 0, TensorFile.part

    def part(self: TensorFile, name: str, offsets: Any, sizes: Any) -> Tensor:
        nonlocal count
        found = real(self, name, offsets, sizes)
        count += found.numel() * found.element_size()
        return found

    TensorFile.part = part  # type: ignore[method-assign]
    try:
        sharded.restore(model, optimizer, snapshot)
    finally:
        TensorFile.part = real  # type: ignore[method-assign]
    return count


def stock_weights(place: Path, ours: bool) -> dict[str, Any]:
    """The weights as PyTorch's own `load` reads them, with our reader or with its own one for safetensors."""
    state = {name: torch.zeros_like(p) for name, p in build().state_dict().items()}
    step = int(place.name.partition("-")[2])
    reader = Reader(checkpoint.load(place, step).content, "weights") if ours else HuggingFaceStorageReader(str(place))
    stock.load(state, storage_reader=reader, no_dist=True)
    return {name: tensor.tolist() for name, tensor in state.items()}


def latest(rank: int, size: int, folders: list[str]) -> list[Any]:
    """What each folder has for all ranks."""
    found = [sharded.load_latest(Path(folder)) for folder in folders]
    return [(snapshot.step, snapshot.skipped) for snapshot in found if snapshot is not None]


def background(rank: int, size: int, folder: str) -> list[Any]:
    """Steps go on, with communication of their own, while writers are held back; beside it the same, saved at once."""
    model, optimizer = job("fsdp")
    saver, written, real = Saver(Path(folder) / "async", model, optimizer), [], tensorfile.write

    def slow(*given: Any) -> dict[str, Any]:
        time.sleep(0.2)
        return real(*given)

    for step in (0, 2):
        steps(model, optimizer, step, step + 2)
        sharded.save(Path(folder) / "sync", step + 2, model=model, optimizer=optimizer, trainer={"counters": {}})
        tensorfile.write = slow
        saver.save(step + 2, {"counters": {}})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        steps(model, optimizer, step, step + 2)
        written += saver.finished()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(1.0)
        saver.wait()
        tensorfile.write = real
    return [(step, path.name) for step, path in [*written, *saver.close()]]


def full_disk(rank: int, size: int, folder: str, who: int) -> str:
    """One rank cannot write its files."""
    model, optimizer = job("fsdp")
    steps(model, optimizer, 0, 2)
    keep(rank, "fsdp", Path(folder), 2, model, optimizer)
    real = tensorfile.write

    def full(path: Path, *given: Any) -> dict[str, Any]:
        path.write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    tensorfile.write = full if rank == who else real
    try:
        sharded.save(Path(folder), 4, model=model, optimizer=optimizer, trainer={})
    except CheckpointError as fault:
        return str(fault)
    finally:
        tensorfile.write = real
        dist.barrier()
    return "saved"


def disagree(rank: int, size: int, folder: str) -> str:
    """The ranks have different learning rates."""
    model, optimizer = job("fsdp")
    steps(model, optimizer, 0, 1)
    optimizer.param_groups[0]["lr"] = 0.1 + rank
    try:
        sharded.save(Path(folder), 1, model=model, optimizer=optimizer, trainer={})
    except CheckpointError as fault:
        return str(fault)
    return "saved"


def many(rank: int, size: int, folder: str, losses: list[float]) -> None:
    """A checkpoint for each loss."""
    model, optimizer = job("fsdp")
    for step, loss in enumerate(losses):
        sharded.save(Path(folder), step, model=model, optimizer=optimizer, trainer={}, facts={"eval_loss": loss})


def foreign(rank: int, size: int, folder: str) -> str:
    """Loading into a model of another shape."""
    model = nn.Linear(5, 7, dtype=torch.float64)
    fully_shard(model)
    snapshot = sharded.load_latest(Path(folder))
    assert snapshot is not None
    try:
        sharded.restore(model, torch.optim.AdamW(model.parameters()), snapshot)
    except CheckpointError as fault:
        return str(fault)
    return "loaded"


def three_saves(folder: Path, beside: bool) -> None:
    """Steps with a save after each second one, at once or beside the steps."""
    model, optimizer = job("fsdp", "adamw")
    saver = Saver(folder, model, optimizer, background=beside)
    for step in (0, 2, 4):
        steps(model, optimizer, step, step + 2)
        saver.save(step + 2, {"counters": {"step": step + 2}})
        saver.finished()
    saver.close()
