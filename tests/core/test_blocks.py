"""How leaves form blocks, and the orders as functions of the turn."""

import pytest
import torch

from tare.core.blocks import ALWAYS, EachLeaf, Layers, Rotation
from tare.core.errors import InputError
from tare.core.leaf import Leaf, role_of_name
from tare.core.orders import Ascending, Descending, Fixed, Mirror, Order, Random, Recorded, Reshuffled, Turn


def leaves(*names: str) -> list[Leaf]:
    return [Leaf(name, (2, 2), torch.float32, role_of_name(name, (2, 2))) for name in names]


def rounds(order: Order, blocks: int, count: int, turns: int, seed: int = 0) -> list[list[int]]:
    names = tuple(f"block {i}" for i in range(blocks))
    return [order.select(Turn(names, count, turn, turn, seed)) for turn in range(turns)]


LLAMA = (
    "model.embed_tokens.weight",
    "model.layers.0.q.weight",
    "model.layers.10.q.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def test_layers_by_the_first_number_in_a_name() -> None:
    assert Layers().names(leaves(*LLAMA)) == [None, "model.layers.0", "model.layers.10", None, None]
    assert Layers(True, True).names(leaves(*LLAMA)) == [
        "embedding",
        "model.layers.0",
        "model.layers.10",
        "head",
        "head",
    ]
    named = Layers(always=("norm", "*head*")).names(leaves(*LLAMA))
    assert named == [None, "model.layers.0", "model.layers.10", ALWAYS, ALWAYS]
    assert Layers().names(leaves("transformer.h.3.mlp.experts.7.up", "0.weight")) == ["transformer.h.3", "0"]
    assert Layers(always=("head", "bias")).unused(leaves(*LLAMA)) == ["bias"]


def test_modules_where_nothing_is_numbered() -> None:
    assert Layers().names(leaves("up.weight", "up.bias", "lm_head.weight", "loose")) == ["up", "up", None, "loose"]
    assert EachLeaf().names(leaves("a", "b")) == ["a", "b"]


def test_cyclic_orders_go_round() -> None:
    assert rounds(Ascending(), 5, 2, 3) == [[0, 1], [2, 3], [4, 0]]
    assert rounds(Descending(), 5, 2, 3) == [[4, 3], [2, 1], [0, 4]]
    assert rounds(Mirror(), 6, 2, 4) == [[0, 5], [1, 4], [2, 3], [0, 5]]
    assert rounds(Mirror(), 5, 2, 3) == [[0, 4], [1, 3], [0, 4]]  # the middle has no partner
    assert rounds(Mirror(), 3, 1, 4) == [[0], [2], [1], [0]]
    assert rounds(Fixed((2,)), 5, 1, 2) == [[2], [2]]


def test_reshuffled_visits_every_block_once_a_round() -> None:
    seen = [turn[0] for turn in rounds(Reshuffled(), 5, 1, 20)]
    assert all(sorted(seen[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert len({tuple(seen[i : i + 5]) for i in range(0, 20, 5)}) > 1, "the same order in every round"
    assert all(len(set(a + b)) == 4 for a, b in zip(*[iter(rounds(Reshuffled(), 5, 2, 8))] * 2, strict=True))
    assert rounds(Reshuffled(), 5, 1, 20, seed=1) != rounds(Reshuffled(), 5, 1, 20)


def test_random_orders_depend_on_names_not_on_places() -> None:
    names = ("a", "b", "c", "d", "e")
    for order in (Random(), Reshuffled()):
        for turn in range(10):
            straight = {names[b] for b in order.select(Turn(names, 2, turn))}
            turned = names[::-1]
            assert straight == {turned[b] for b in order.select(Turn(turned, 2, turn))}


@pytest.mark.parametrize("order", [Ascending(), Descending(), Mirror(), Fixed()])
@pytest.mark.parametrize(("blocks", "count"), [(5, 2), (6, 2), (6, 4), (4, 4), (7, 3), (1, 1), (3, 0)])
def test_selections_are_all_that_ever_come(order: Order, blocks: int, count: int) -> None:
    names = tuple(map(str, range(blocks)))
    listed = order.selections(names, count)
    assert listed is not None
    assert {frozenset(way) for way in listed} == {frozenset(way) for way in rounds(order, blocks, count, 3 * blocks)}


def test_recorded_selections_hold_until_the_next() -> None:
    order = Recorded({0: (1,), 3: (0, 2)})
    assert [order.select(Turn(("a", "b", "c"), 1, update=u)) for u in (0, 2, 3, 9)] == [[1], [1], [0, 2], [0, 2]]
    with pytest.raises(InputError, match="update 0"):
        Recorded({2: (1,)})


def test_rotation_counts_turns() -> None:
    assert [Rotation(EachLeaf(), Ascending(), 4).number(u) for u in (0, 3, 4, 8)] == [0, 0, 1, 2]
    assert [Rotation(EachLeaf(), Ascending(), 4, first=3).number(u) for u in (0, 2, 3, 6, 7)] == [0, 0, 1, 1, 2]
    assert [Rotation(EachLeaf(), Ascending(), 4, share=0.25).on(n) for n in (4, 7, 1, 0)] == [1, 2, 0, 0]
    for bad in ({"period": 0}, {"period": 2.5}, {"period": 3, "share": 1.5}, {"period": 3, "first": 0}):
        with pytest.raises(InputError):
            Rotation(EachLeaf(), Ascending(), **bad)  # type: ignore[arg-type]
