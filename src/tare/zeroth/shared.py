"""Shared: models that ranks hold together, wrapped by DDP or cut by `fully_shard` (FSDP2), under forward-only methods.

Directions are numbered by the elements of whole leaves, so each rank draws those of its own rows, and the steps are those of one process.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist
from torch import nn

from tare.core.entry import Entry
from tare.core.errors import InputError
from tare.core.shard.layout import is_sharded
from tare.zeroth.directions import Directed
from tare.zeroth.exchange import Exchange, Workers
from tare.zeroth.inplace import ExactInPlace
from tare.zeroth.moved import Memory, Moved
from tare.zeroth.probes import Point, Probe
from tare.zeroth.trials import ForwardGradient


def wrapped_by_ddp(params: Any) -> bool:
    """Whether what a method is given is a DistributedDataParallel. By its name: who uses none need not import it."""
    return isinstance(params, nn.Module) and type(params).__name__ == "DistributedDataParallel"


def unwrapped(params: Any) -> Any:
    """The module inside of DDP, whose names are those of one process; anything else as it is."""
    return params.module if wrapped_by_ddp(params) else params


def refuse(name: str, params: Any) -> None:
    """Raise InputError where a method that works on whole modules in one process is given a model that ranks share."""
    if wrapped_by_ddp(params):
        raise InputError(
            f"{name}: it works on the model itself, not on one that DDP wraps; give model.module, and share losses with "
            "exchange=tare.Workers(...) where the method takes it"
        )
    if isinstance(params, nn.Module) and any(is_sharded(p) for p in params.parameters()):
        raise InputError(
            f"{name}: it must see whole weights, and fully_shard has cut them; use tare.MeZO, or a model that is whole on every rank"
        )


class InShards(ExactInPlace):
    """Writes theta + point to the rows that this rank has, and takes it back bit for bit.

    What forward has gathered is dropped before and after each evaluation: a module whose weights stay gathered (`fully_shard` leaves
    those of the root so) would not see what is written.
    """

    name = "in place on this rank's rows, put back exactly"

    def __init__(self, model: nn.Module):
        self._cut = [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]

    @contextmanager
    def at(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        with super().at(leaves, point):
            self._drop()
            try:
                yield
            finally:
                self._drop()

    def _drop(self) -> None:
        for module in self._cut:
            module.reshard()  # type: ignore[operator]


def memory_of(entries: Iterable[Entry], probe: Probe, memory: str | Memory, model: nn.Module | None) -> Memory:
    """The memory plan of leaves that `fully_shard` has cut.

    Raises:
        InputError: a leaf of which a rank cannot draw or step its rows alone; no model; another plan; a probe of derivatives.
    """
    for entry in entries:
        if entry.place is None or not isinstance(entry.transform, Directed):
            continue
        law = entry.transform.law
        if not law.cuts:
            raise InputError(
                f"{entry.leaf.name}: directions of this kind ({law.describe()}) need the whole weight, and fully_shard has cut it; use "
                "directions='gaussian', or a model that is whole on every rank"
            )
        if not entry.place.lies:
            raise InputError(
                f"{entry.leaf.name}: {entry.transform.describe()} steps it as a whole or keeps state that ranks cannot share, and "
                "fully_shard has cut it; use a rule that steps element by element, or a model that is whole on every rank"
            )
    if isinstance(probe, ForwardGradient):
        raise InputError(
            "probe: 'forward-gradient' differentiates through forward, which gathers weights that are cut by fully_shard; use 'two-sided'"
        )
    if memory not in ("auto", "in-place-exact"):
        raise InputError(
            "memory: weights that fully_shard has cut are perturbed in place, each rank its own rows; use 'auto' or 'in-place-exact'"
        )
    if model is None:
        raise InputError(
            "model: parameters are cut by fully_shard, and what forward has gathered of them must be dropped; give the model itself as "
            "params, or as model="
        )
    return InShards(model)


def exchange_of(exchange: Exchange | None, entries: Iterable[Entry], ddp: nn.Module | None) -> Exchange | None:
    """Who averages the losses of ranks that share a model: `Workers(data=...)` of all of them unless something else is given.

    Raises:
        InputError: one that has ranks evaluate different points, where forward is a matter of all of them.
    """
    meshes = [entry.place.mesh for entry in entries if entry.place is not None]
    if not meshes and ddp is None:
        return exchange
    if meshes:
        mesh = meshes[0].device_mesh
        size, group = mesh.size(), meshes[0].group if mesh.ndim == 1 else None
        if exchange is not None:
            _fits(exchange, size)
        elif group is None and size != dist.get_world_size():
            raise InputError(
                f"exchange: the model lies on {size} of {dist.get_world_size()} processes; give exchange=tare.Workers(data={size}, "
                "group=...) of these"
            )
    else:
        group = getattr(ddp, "process_group", None)
        size = dist.get_world_size(group)
    return Workers(data=size, group=group) if exchange is None else exchange


def _fits(exchange: Exchange, size: int) -> None:
    if not isinstance(exchange, Workers) or exchange.sharing != 1:
        raise InputError(
            "exchange: fully_shard has cut the parameters, so all ranks run forward together, at the same points; use "
            f"tare.Workers(data={size}), or none"
        )
