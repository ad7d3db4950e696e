"""Routing: every leaf is claimed once, by the first entry that matches; what is unclaimed or matches nothing is an error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tare.core.errors import InputError
from tare.core.leaf import ROLES, Leaf
from tare.core.optimizer import Optimizer
from tare.core.recipe import Recipe, matches
from tare.methods import registry
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.momentum import Momentum

ADAM, LION, SGD = Adam(), Lion(), Momentum()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = nn.Linear(4, 4), nn.Linear(4, 8, bias=False), nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Block(), Block()])


def rules(optimizer: Optimizer) -> dict[str, object]:
    return {entry.leaf.name: entry.transform for entry in optimizer._entries.values()}


def test_the_first_match_claims() -> None:
    recipe = Recipe((("layers.0.*", LION), ("linear", SGD), ("*", ADAM)))
    found = rules(Optimizer(Model(), recipe, 0.1))
    assert found["layers.0.attn.weight"] is LION
    assert found["layers.0.norm.bias"] is LION
    assert found["layers.1.attn.weight"] is SGD
    assert found["layers.1.attn.bias"] is ADAM
    assert found["embed.weight"] is ADAM
    assert len(found) == len(list(Model().parameters()))


def test_a_match_may_be_a_function_or_a_tuple() -> None:
    recipe = Recipe(((lambda leaf: leaf.numel > 20, LION), (("norm", "*.bias"), SGD), ("*", ADAM)))
    found = rules(Optimizer(Model(), recipe, 0.1))
    assert {name for name, rule in found.items() if rule is LION} == {
        "embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight",
    }  # fmt: skip
    assert found["layers.0.norm.weight"] is found["layers.0.attn.bias"] is SGD


def test_an_unused_name_pattern_is_an_error() -> None:
    with pytest.raises(InputError, match=r"'layrs\.\*' matches no parameter; names look like embed\.weight"):
        Optimizer(Model(), Recipe((("layrs.*", LION), ("*", ADAM))), 0.1)
    with pytest.raises(InputError, match=r"layers\.7"):
        registry.build("galore", Model(), 0.1, rank=2, targets=("linear", "layers.7.*"))


def test_roles_and_the_rest_may_stay_unused() -> None:
    Optimizer(
        Model(),
        Recipe((("conv", LION), ("expert", SGD), (("linear", "embedding", "norm", "bias"), ADAM), ("*", SGD))),
        0.1,
    )


def test_an_unclaimed_leaf_is_an_error_that_names_it() -> None:
    with pytest.raises(InputError, match=r"no entry claims 'embed\.weight' \(role embedding, shape \(7, 4\)\)"):
        Optimizer(Model(), Recipe((("layers.*", ADAM),)), 0.1)
    with pytest.raises(InputError, match="no entries"):
        Recipe(())
    with pytest.raises(InputError, match="decay"):
        Recipe((("*", ADAM),), decay="during")  # type: ignore[arg-type]


def test_a_group_may_bring_its_own_recipe_and_role() -> None:
    model = Model()
    own = Recipe((("*", LION),))
    groups = [
        {"params": list(model.layers.named_parameters()), "recipe": own},
        {"params": [("table", model.embed.weight)], "role": "head"},
    ]
    opt = Optimizer(groups, Recipe((("head", SGD),)), 0.1)
    assert set(rules(opt).values()) == {LION, SGD}
    assert opt.leaves[-1].role == "head"


def test_a_group_overrides_hyperparameters_of_a_method() -> None:
    a, b = (nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    opt = registry.build("galore", [{"params": [a]}, {"params": [b], "rank": 4, "scale": 0.5}], 0.1, rank=2)
    assert opt.state[a]["basis"].shape == (5, 2)
    assert opt.state[b]["basis"].shape == (5, 4)
    assert [opt._entries[p].transform.scale for p in (a, b)] == [0.25, 0.5]


def test_a_pattern_counts_as_used_in_a_group_with_its_own_hyperparameters() -> None:
    named = [("layers.0.weight", nn.Parameter(torch.ones(6, 5)))]
    opt = registry.build("galore", [{"params": named, "rank": 3}], 0.1, rank=2, targets="layers.*")
    assert opt.state[named[0][1]]["basis"].shape == (5, 3)


def test_rank_above_the_shorter_side_is_dense_and_says_so() -> None:
    opt = registry.build("galore", nn.Linear(12, 3, bias=False), 0.1, rank=4)
    assert "rank 4 > 3: dense" in opt.explain()
    assert opt.state_bytes().by_kind == {"moment": 2 * 4 * 36}


names = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)
leaf = st.builds(Leaf, names, st.just((2, 2)), st.just(torch.float32), st.sampled_from(ROLES))
pattern = st.one_of(st.sampled_from(ROLES), names, names.map(lambda n: n + ".*"), st.just("*"))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(leaf, st.lists(pattern, min_size=1, max_size=4))
def test_find_is_the_first_that_matches(leaf: Leaf, patterns: list[str]) -> None:
    recipe = Recipe(tuple((p, ADAM) for p in patterns))
    hits = [i for i, p in enumerate(patterns) if matches(p, leaf)]
    if hits:
        assert recipe.find(leaf) == hits[0]
    else:
        with pytest.raises(InputError, match="no entry claims"):
            recipe.find(leaf)
