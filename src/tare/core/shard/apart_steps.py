"""Steps of leaves that are taken apart: whose turn it is to come together after all, who needs a basis, and the rounds.

An owner alone knows whether a basis is due, so a step begins with a word of every owner on each of its leaves: one byte.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tare.core.shard.apart import Apart, Message, Piece, answer, ask, flags_of_all
from tare.core.shard.owned import Engine, Owned, mine_of
from tare.core.shard.places import rounds
from tare.core.write import seen, shape_of, write

APART, BASIS, WHOLE = (
    0,
    1,
    2,
)  # with what ranks hold; after they got the basis; together, because a basis is computed from all of it


class ApartSteps:
    """What ranks hold beside their state: their part of each basis, and of what owners know that they hold it."""

    def __init__(self) -> None:
        self._bases: dict[Tensor, Tensor] = {}
        self._sent: set[Tensor] = set()

    def forget(self, leaves: Iterable[Tensor] | None = None) -> None:
        """Of these leaves, or of all: owners send their bases again."""
        for p in list(self._sent) if leaves is None else leaves:
            self._sent.discard(p)
            self._bases.pop(p, None)

    def step(self, listed: Sequence[Owned], group: Any, engine: Engine) -> None:
        """Step those that can be, and mark them `done`."""
        if not listed:
            return
        flags = self._flags(listed, group, engine)
        for some in rounds([each for each, flag in zip(listed, flags, strict=True) if flag == BASIS]):
            self._give_bases(some, group, engine)
        for some in rounds([each for each, flag in zip(listed, flags, strict=True) if flag != WHOLE]):
            self._round(some, group, engine)

    def _flags(self, listed: Sequence[Owned], group: Any, engine: Engine) -> list[int]:
        own = [self._flag(each, engine) for each in listed if each.place.mine]
        owners = [each.owner for each in listed]
        size = listed[0].place.mesh.layout.size
        every = flags_of_all(own, [owners.count(rank) for rank in range(size)], group, listed[0].device)
        told = [iter(each) for each in every]
        return [next(told[owner]) for owner in owners]

    def _flag(self, owned: Owned, engine: Engine) -> int:
        transform = owned.entry.transform
        state, step = engine.coming(owned)
        if transform.due(state, step):
            if not transform.drawn:
                return WHOLE
            nothing = torch.ones((), device=owned.device, dtype=owned.rows.dtype).expand(owned.entry.leaf.shape)
            transform.prepare(nothing, state, step, False)
            state.flush()
            self._sent.discard(owned.p)
        return APART if owned.p in self._sent else BASIS

    def _give_bases(self, some: Sequence[Owned], group: Any, engine: Engine) -> None:
        mine, held = mine_of(some), None
        if mine is not None:
            held = [_apart(mine).hold(*engine.coming(mine))]
            self._sent.add(mine.p)
        messages = [_message(each, (_apart(each).basis,)) for each in some]
        for each, (basis,) in zip(some, answer(messages, held, group, some[0].device), strict=True):
            self._bases[each.p] = basis.clone()

    def _round(self, some: Sequence[Owned], group: Any, engine: Engine) -> None:
        works = [engine.rows_work(each) for each in some]
        grads = [seen(work.grad, work, 0, work.weight.numel()) for work in works]
        told = [_apart(each).tell(g, self._bases[each.p]) for each, g in zip(some, grads, strict=True)]
        messages = [_message(each, _apart(each).up) for each in some]
        found = ask(messages, told, group, some[0].device)
        mine, decided = mine_of(some), None
        if mine is not None:
            assert found is not None
            state, step = engine.coming(mine)
            decided = _apart(mine).decide(found, state, step)
            state.flush()
        messages = [_message(each, _apart(each).down) for each in some]
        answers = answer(messages, decided, group, some[0].device)
        for each, work, g, parts in zip(some, works, grads, answers, strict=True):
            if work.weight.numel():
                delta = _apart(each).form(g, self._bases[each.p], parts)
                write(shape_of(work, delta), delta, work, 0)
            engine.counted(each.p)
            each.done = True


def _apart(owned: Owned) -> Apart:
    assert owned.apart is not None
    return owned.apart


def _message(owned: Owned, pieces: tuple[Piece, ...]) -> Message:
    return Message(pieces, owned.place.mesh.layout, owned.owner)
