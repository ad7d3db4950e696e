"""Assembly: the estimated gradient of a leaf, put together from directions that are drawn again, piece by piece and never stored.

Also the count of updates that 16 bits cannot hold, and parameters in a form that can be looked at twice.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.leaf import as_groups
from tare.core.storage import Storage
from tare.zeroth.memory import Moved
from tare.zeroth.probes import Term


class Assembly:
    """sum of coefficient z_member over the terms of one leaf: a call gives elements start .. stop - 1, flat, in its compute dtype.

    step: whose directions, where it is a former one.
    """

    def __init__(self, leaf: Moved, terms: Sequence[Term], lost: "Lost | None" = None, step: int | None = None):
        self.leaf = leaf
        law, draws = leaf.directed.law, [leaf.draw(term.member) for term in terms]
        draws = draws if step is None else [replace(draw, step=step) for draw in draws]
        gains = [term.coefficient * law.update(draw.leaf, leaf.state) for term, draw in zip(terms, draws, strict=True)]
        self.parts = list(zip(draws, gains, strict=True))
        p = leaf.parameter
        self.lost = lost if lost is not None and p.dtype.itemsize == 2 and p.is_contiguous() else None

    def __call__(self, start: int, stop: int) -> Tensor:
        weight, law = self.leaf.parameter.detach(), self.leaf.directed.law
        gradient = torch.zeros(stop - start, dtype=self.leaf.draw(0).leaf.compute_dtype, device=weight.device)
        law.gather_(gradient, self.parts, self.leaf.state, weight, self.leaf.start + start)
        if self.lost is not None:
            self.lost.look(weight.view(-1)[start:stop], gradient)
        return gradient

    def whole(self) -> Tensor:
        """All of it, in the leaf's shape."""
        return self(0, self.leaf.parameter.numel()).view(self.leaf.parameter.shape)

    def done(self) -> None:
        """The leaf has been stepped."""
        if self.lost is not None:
            self.lost.compare()


class Lost:
    """Counts elements of 16-bit weights whose gradient is not zero and which a step does not change; tells once where they are many."""

    def __init__(self) -> None:
        self._unmoved: dict[torch.device, Tensor] = {}
        self._wanted: dict[torch.device, Tensor] = {}
        self._open: tuple[Tensor, Tensor, Tensor] | None = None
        self._told = False

    def look(self, weight: Tensor, gradient: Tensor) -> None:
        """Before a piece is written; and the piece before it has been."""
        self.compare()
        self._open = weight, weight.clone(), gradient != 0

    def compare(self) -> None:
        """When the last piece has been written."""
        if self._open is None:
            return
        weight, before, wanted = self._open
        self._open = None
        for counts, found in ((self._unmoved, (weight == before) & wanted), (self._wanted, wanted)):
            counts[weight.device] = counts.get(weight.device, 0) + found.sum()

    @property
    def share(self) -> float:
        """Of all updates of single weights so far."""
        wanted = sum(int(count) for count in self._wanted.values())
        return sum(int(count) for count in self._unmoved.values()) / wanted if wanted else 0.0

    def warn(self, step: int) -> None:
        """Once, where most updates are lost. Looked at after steps 1, 2, 4, 8 ... of the run, since a GPU has to be waited for."""
        if not self._told and self._wanted and (step + 1) & step == 0 and self.share > 0.5:
            self._told = True
            warnings.warn(
                f"{self.share:.0%} of the updates were too small to change their 16-bit weight, and are lost; use storage "
                "{'weight': 'stochastic'}, or 'master' for an fp32 copy",
                stacklevel=4,
            )


def settled(params: Any) -> Any:
    """Parameters with every generator in them made a list, so that they can be looked at before they are used."""
    if isinstance(params, nn.Module | Tensor):
        return params
    return [
        {**group, "params": _listed(group["params"])} if "params" in group else group for group in as_groups(params)
    ]


def _listed(params: Any) -> Any:
    return list(params) if isinstance(params, Iterable) and not isinstance(params, nn.Module | Tensor | set) else params


def storage_for(params: Any, storage: Storage | dict[str, Any] | None) -> Storage:
    """The policy, with 16-bit weights rounded stochastically where `storage` says nothing about weights."""
    if isinstance(storage, Storage) or (storage is not None and "weight" in storage):
        return Storage.of(storage)
    given = dict(storage or {})
    sixteen = any(p.dtype.itemsize == 2 for p in _tensors(params))
    return Storage.of({**given, "weight": "stochastic"} if sixteen else given)


def _tensors(params: Any) -> Iterator[Tensor]:
    if isinstance(params, nn.Module):
        yield from params.parameters()
    elif isinstance(params, Tensor):
        yield params
    elif isinstance(params, dict):
        yield from _tensors(params.get("params", ()))
    elif isinstance(params, tuple) and len(params) == 2 and isinstance(params[0], str):
        yield from _tensors(params[1])
    elif isinstance(params, Iterable):
        for item in params:
            yield from _tensors(item)
