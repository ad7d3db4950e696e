"""What the ranks do for `test_shard`."""

import math
import traceback
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import tare
from tare.core.errors import InputError
from tare.core.optimizer import Optimizer
from tare.core.recipe import Recipe
from tare.core.shard.apart import apart_for
from tare.core.southwell import Greedy
from tare.core.storage import Storage
from tare.parallel.wrap import mesh_of
from tare.rules.lion_kappa import LionKappa
from tare.rules.maps import RowNorm
from tare.testing import sharded
from tare.testing.subject import Net, Subject, batch, gradient, leaves, near


def equal(
    rank: int, size: int, keys: list[str], form: str = "", dtype: str = "float32", weight: str = "plain"
) -> dict[str, Any]:
    """key -> bytes, or the fault."""
    storage = sharded.forms()[form] if form else Storage(weight=weight)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    mesh = sharded.mesh_of(size)
    for key in keys:
        try:
            found[key] = sharded.check_equals_one_process(key, mesh, storage, getattr(torch, dtype))
        except Exception as fault:
            found[key] = traceback.format_exc() if not isinstance(fault, AssertionError) else f"AssertionError {fault}"
    return found


def by_rows(rank: int, size: int) -> dict[str, bool]:
    """leaf -> whether it is stepped where it lies, of a rule that sees whole rows; its steps are those of one process."""
    mesh = sharded.mesh_of(size)
    names = [name for name in sharded.NAMES if name != "gain"]
    alone, together = leaves(tuple(names)), sharded.cut(leaves(tuple(names)), mesh)
    first, second = (Optimizer(each, Recipe((("*", LionKappa(RowNorm())),)), 1e-2) for each in (alone, together))
    for step in range(3):
        for name, p in alone:
            p.grad = gradient(name, step, tuple(p.shape))
        first.step()
        sharded.drive_cut(second, together, mesh, step, step + 1)
    got = {name: p.detach().full_tensor() for name, p in together}
    near(got, {name: p.detach() for name, p in alone}, 1e-6, "by rows")
    return {e.leaf.name: e.place.lies for e in second._entries.values() if e.place is not None}


def loads(rank: int, size: int, keys: list[str]) -> dict[str, str]:
    """key -> the fault, of those that have one."""
    faults = {}
    for key in keys:
        try:
            sharded.check_goes_on_after_loading(key, sharded.mesh_of(size))
        except Exception:
            faults[key] = traceback.format_exc()
    return faults


def sent(rank: int, size: int, key: str) -> dict[str, int]:
    """All-to-alls of a step, and the bytes that this rank gives to others, beside what the leaves say."""
    mesh = sharded.mesh_of(size)
    named = sharded.cut(leaves(sharded.NAMES), mesh)
    optimizer = Subject(key).build(named)
    sharded.drive_cut(optimizer, named, mesh, 0, 2)
    calls: list[int] = []
    real = dist.all_to_all_single

    def counted(out: Any, given: Any, out_sizes: list[int], in_sizes: list[int], **options: Any) -> Any:
        calls.append(sum(n for to, n in enumerate(in_sizes) if to != rank))
        return real(out, given, out_sizes, in_sizes, **options)

    dist.all_to_all_single = counted
    try:
        with CommDebugMode() as seen:
            sharded.drive_cut(optimizer, named, mesh, 2, 3)  # no basis is due, and ranks hold the last one
    finally:
        dist.all_to_all_single = real
    entries = [each for each in optimizer._entries.values() if each.leaf.numel and each.place and not each.place.lies]
    apart = [apart_for(each.transform, each.leaf, each.slots, size) for each in entries]
    predicted = calls_predicted = 0
    kinds: dict[Any, list[Any]] = {}  # what shares its rounds
    for each, steps in zip(entries, apart, strict=True):
        company = id(each.transform) if each.transform.together else 0
        kinds.setdefault((steps is None, company), []).append((each.place, steps))
    for (together, _), mine in kinds.items():
        owners = [place.owner for place, _ in mine]
        calls_predicted += max(owners.count(rank) for rank in range(size)) * (3 if together else 2)
        for place, steps in mine:
            width, layout = math.prod(place.mesh.shape[1:]), place.mesh.layout
            others = [r for r in range(size) if r != rank]
            if steps is None:  # the weight back; gradient and weight to the owner
                counts = layout.counts
                predicted += 4 * width * (sum(counts[r] for r in others) if place.mine else 2 * counts[rank])
            elif place.mine:
                predicted += sum(piece.nbytes(layout, r) for piece in steps.down for r in others)
            else:
                predicted += sum(piece.nbytes(layout, rank) for piece in steps.up)
    words = {str(op) for op in seen.get_comm_counts()}
    assert not {
        w
        for w in words
        if not any(
            known in w for known in ("alltoall", "all_to_all", "scatter", "broadcast", "allgather_", "allreduce_")
        )
    }
    apart_ones = sum(each is not None for each in apart)
    return {
        "calls": len(calls), "calls_predicted": calls_predicted, "bytes": sum(calls), "predicted": predicted, "apart": apart_ones,
        "whole": 4 * sum(each.leaf.numel for each in entries),
    }  # fmt: skip


def refusals(rank: int, size: int) -> dict[str, str]:
    """What each bad use is answered with."""
    mesh, found = sharded.mesh_of(size), {}
    named = sharded.cut(leaves(("tall.weight",)), mesh)

    def ask(name: str, use: Any) -> None:
        try:
            use()
            found[name] = "nothing was raised"
        except InputError as fault:
            found[name] = str(fault)

    ask("release", lambda: tare.GaLore(named, lr=1e-3, rank=2, release=True))
    columns = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(1)]))
    ask("columns", lambda: tare.AdamW([("w", columns)], lr=1e-3))
    ask("greedy", lambda: tare.BAdam(named, lr=1e-3, order=Greedy()))
    return found


def fully_sharded(rank: int, size: int, keys: list[str], shards: int | None = None) -> dict[str, float]:
    """key -> largest gap between weights trained by FSDP2 on parts of a batch, and by one process on all of it.

    shards: ranks among which they are cut, and that is repeated (HSDP).
    """
    mesh, gaps = mesh_of("cpu", shards or size, size // (shards or size)), {}
    tokens, targets = batch()
    share = slice(rank * len(tokens) // size, (rank + 1) * len(tokens) // size)
    for key in keys:
        alone, net = Net().double(), Net().double()
        for child in (net.up, net.down):
            fully_shard(child, mesh=mesh)
        fully_shard(net, mesh=mesh)
        first, second = (Subject(key).build(each, weight_decay=0.1) for each in (alone, net))
        for _ in range(5):
            for model, optimizer, part in ((alone, first, slice(None)), (net, second, share)):
                optimizer.zero_grad()
                (model(tokens[part]) - targets[part]).square().mean().backward()
                optimizer.step()
        pairs = zip(alone.parameters(), net.parameters(), strict=True)
        gaps[key] = max(float((a - b.full_tensor()).detach().abs().max()) for a, b in pairs)
    return gaps
