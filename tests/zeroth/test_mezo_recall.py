"""Momentum and Adam by replay: no moments, the rule run anew over the last directions. How much is left out, and what it cannot do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tare import InputError, MeZO
from tare.core.random import make_key, normal
from tare.core.recipe import Recipe
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.momentum import Momentum
from tare.rules.muon import Muon
from tare.zeroth.directions import Directed, Gaussian
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import Term, TwoSided
from tare.zeroth.recall import Recall, updates_until
from tare.zeroth.record import PAST, Record


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 2, bias=False)
        for name, p in self.named_parameters():
            p.data = normal(make_key(1, name), tuple(p.shape)).mul_(0.5).to(dtype)

    def forward(self, step: int) -> Tensor:
        x = normal(make_key(2, "x", step), (6, 5)).to(self.up.weight.dtype)
        return (self.down(torch.tanh(self.up(x))) - 1).square().mean()


def drive(opt: MeZO, net: nn.Module, first: int, last: int) -> None:
    for step in range(first, last):
        opt.step(lambda step=step: net(step))


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "own", [{"rule": "momentum"}, {"rule": "adam", "weight_decay": 0.1}, {"rule": "adam", "n": 3, "maximize": True}]
)
def test_untruncated_it_is_the_dense_rule_bit_for_bit(own: dict[str, Any], dtype: torch.dtype) -> None:
    """Through a skipped step, an equal-loss step, a schedule, and a checkpoint of the replayed run on the way."""
    dense, replayed = Net(dtype), Net(dtype)
    one, two = MeZO(dense, 1e-2, **own), MeZO(replayed, 1e-2, **own, moments="replay", tolerance=0.0)
    for step in range(14):
        if step == 9:
            fresh = MeZO(replayed, 1.0, **{**own, "seed": 5}, moments="replay", tolerance=0.0)
            fresh.load_state_dict(two.state_dict())
            two = fresh
        for opt, net in ((one, dense), (two, replayed)):
            opt.param_groups[0]["lr"] = 1e-2 * 0.9**step
            opt.step(
                lambda net=net, step=step: (
                    net(step).float() * (float("nan") if step == 4 else 0.0 if step == 6 else 1.0)
                )
            )
        same(dense, replayed)
    assert one.state_bytes().total > 0
    assert two.state_bytes().total == 0
    assert two.param_groups[0][PAST][:, 0].unique().tolist() == [t for t in range(14) if t != 4]


def test_a_large_leaf_is_replayed_in_pieces() -> None:
    """More elements than a piece, an odd number of them."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(normal(1, (701, 433)))

        def forward(self, step: int) -> Tensor:
            return self.w[:, :7].square().mean()

    dense, replayed = Wide(), Wide()
    drive(MeZO(dense, 1e-2, rule="adam"), dense, 0, 4)
    drive(MeZO(replayed, 1e-2, rule="adam", moments="replay"), replayed, 0, 4)
    same(dense, replayed)


def test_truncated_it_is_the_rule_begun_so_many_updates_ago() -> None:
    """The step after t updates, from the same weights and with the last K directions, is that of a dense run of K updates."""
    net, last, records = Net(), 4, []
    opt = MeZO(net, 1e-2, rule=Recall(Adam(), last), on_step=records.append)
    drive(opt, net, 0, 9)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    drive(opt, net, 9, 10)

    moments = Net()
    dense = MeZO(moments, 0.0, rule="adam")
    for group in dense.param_groups:
        group["forward_steps"] = 6
    for record in records[6:]:
        if record.step == 9:
            for name, p in moments.named_parameters():
                p.data.copy_(before[name])
        lr = 0.0 if record.step < 9 else 1e-2
        dense.replay(Record(record.step, record.terms, 1.0, ((lr, 0.0),), leaves=record.leaves))
    same(moments, net)
    assert len(opt.param_groups[0][PAST]) == last - 1


@pytest.mark.parametrize(
    ("beta", "tolerance"), [(0.9, 1e-4), (0.999, 1e-4), (0.5, 0.5), (0.5, 0.25), (0.3, 0.9), (0.0, 0.1)]
)
def test_tolerance_says_how_many(beta: float, tolerance: float) -> None:
    last = updates_until(beta, tolerance)
    assert last is not None
    assert beta**last < tolerance
    assert last == 1 or beta ** (last - 1) >= tolerance


def test_tolerance_bounds_what_is_left_out() -> None:
    """The truncated momentum differs from the dense one by less than the tolerance times the largest buffer there can be."""
    steps = []
    for own in ({}, {"moments": "replay", "tolerance": 1e-3}):
        net = Net()
        opt = MeZO(net, 1e-6, rule="momentum", momentum=0.5, **own)
        drive(opt, net, 0, 30)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        drive(opt, net, 30, 31)
        steps.append({name: (p.detach() - before[name]) / 1e-6 for name, p in net.named_parameters()})
    for name, dense in steps[0].items():
        gap = (dense - steps[1][name]).abs().max()
        assert 0 < gap < 1e-3 * 2 * 8 * 4  # |delta| < 8 here, |z| < 4 or so, and the sum of 0.5^k is 2


def test_a_leaf_that_rested_begins_anew() -> None:
    """Frozen for two steps, it is stepped afterwards as by an optimizer whose momentum starts there."""
    net, alone, records = Net(), Net(), []
    opt = MeZO(net, 1e-2, rule="momentum", moments="replay", tolerance=0.0, on_step=records.append)
    drive(opt, net, 0, 3)
    net.down.requires_grad_(False)
    drive(opt, net, 3, 5)
    net.down.requires_grad_(True)
    alone.load_state_dict(net.state_dict())
    drive(opt, net, 5, 8)
    assert opt.state[net.down.weight]["recall_from"] == 5
    assert opt.state[net.up.weight]["recall_from"] == 0
    other = MeZO(alone, 1e-2, rule="momentum")
    for group in other.param_groups:
        group["forward_steps"] = 5
    for record in records[5:]:
        other.replay(record)
    assert torch.equal(alone.down.weight, net.down.weight)
    assert not torch.equal(alone.up.weight, net.up.weight)


def test_the_tail_is_the_mean_of_what_is_left_out() -> None:
    """400 steps with beta2 = 0.99: the last 30 directions and a mean step as dense moments do, to 8 %; without the mean, not to 30 %."""
    steps = {}
    for name, own in {
        "dense": {}, "tail": {"rule": Recall(Adam((0.7, 0.99)), 30, tail=True)}, "cut": {"rule": Recall(Adam((0.7, 0.99)), 30)},
    }.items():  # fmt: skip
        net = Net()
        opt = MeZO(net, 0.0, **{"rule": "adam", "betas": (0.7, 0.99), **own})
        for step in range(401):
            size = 1.0 if step < 300 else 0.2  # the sizes of differences change, so that what is left out matters
            lr = 1e-6 if step == 400 else 0.0
            before = {key: p.detach().clone() for key, p in net.named_parameters()}
            terms = (Term(0, size * (1 + step % 3)), Term(1, -size))
            opt.replay(Record(step, terms, 1.0, ((lr, 0.0),), leaves=tuple(before)))
        steps[name] = torch.cat([((p.detach() - before[key]) / 1e-6).view(-1) for key, p in net.named_parameters()])
        if name == "tail":
            rows = opt.param_groups[0][PAST]
            assert rows.shape == (1 + 2 * 29, 3)
            assert rows[0, :2].tolist() == [-1, 401 - 29]
            assert opt.state_bytes().total == 0
    off = {name: float((found - steps["dense"]).norm() / steps["dense"].norm()) for name, found in steps.items()}
    assert off["tail"] < 0.08
    assert off["cut"] > 0.3


def test_with_a_tail_and_all_directions_it_is_still_exact() -> None:
    dense, replayed = Net(), Net()
    drive(MeZO(dense, 1e-2, rule="adam"), dense, 0, 20)
    opt = MeZO(replayed, 1e-2, rule="adam", moments="replay")
    drive(opt, replayed, 0, 20)
    assert "adam by recall of 88 and a mean" in opt.explain()
    same(dense, replayed)


def test_a_tail_resumes() -> None:
    net, other = Net(), Net()
    make = lambda net: MeZO(net, 1e-2, rule=Recall(Adam((0.5, 0.9)), 4, tail=True))  # noqa: E731
    opt = make(net)
    drive(opt, net, 0, 9)
    resumed = make(other)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(opt.state_dict())
    drive(opt, net, 9, 14)
    drive(resumed, other, 9, 14)
    same(net, other)


def test_tails_are_for_adam_and_for_one_rule() -> None:
    with pytest.raises(InputError, match="a tail is of Adam's"):
        Recall(Lion(), 4, tail=True)
    with pytest.raises(InputError, match="tail"):
        MeZO(Net(), rule="adam", moments="replay", tail="long")
    law, recipe = Gaussian(), []
    for match, betas in (("up.*", (0.9, 0.99)), ("*", (0.9, 0.999))):
        recipe.append((match, Directed(law, Recall(Adam(betas), 5, tail=True))))
    with pytest.raises(InputError, match="two rules that recall with a tail"):
        ForwardOptimizer(Net(), Recipe(tuple(recipe)), 1e-3, probe=TwoSided())


def test_rules_of_different_length_side_by_side() -> None:
    """Each reads as many steps as it was given, whatever the others keep."""
    net, short, long = Net(), Net(), Net()
    law = Gaussian()
    recipe = Recipe((("up.*", Directed(law, Recall(Momentum(0.9), 2))), ("*", Directed(law, Recall(Momentum(0.9), 6)))))
    records: list[Record] = []
    opt = ForwardOptimizer(net, recipe, 1e-2, probe=TwoSided(), on_step=records.append)
    drive(opt, net, 0, 9)  # type: ignore[arg-type]
    for twin, last, part in ((short, 2, "up"), (long, 6, "down")):
        other = MeZO(twin, 1e-2, rule=Recall(Momentum(0.9), last))
        for record in records:
            other.replay(record)
        assert torch.equal(twin.get_submodule(part).weight, net.get_submodule(part).weight), part


def test_a_leaf_that_is_added_has_no_past() -> None:
    net, late = Net(), nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    opt = MeZO(net, 1e-2, rule="momentum", moments="replay")
    drive(opt, net, 0, 4)
    opt.add_param_group({"params": [("late", late)], "lr": 1e-2})
    opt.step(lambda: net(4) + late.square().sum())
    state = opt.state[late]
    assert (state["recall_from"], state["recall_last"], state["step"]) == (4, 4, 1)
    assert [group["forward_steps"] for group in opt.param_groups] == [5, 5]


def test_any_element_wise_rule_can_be_recalled() -> None:
    dense, replayed = Net(), Net()
    drive(MeZO(dense, 1e-3, rule=Lion()), dense, 0, 6)
    drive(MeZO(replayed, 1e-3, rule=Recall(Lion())), replayed, 0, 6)
    same(dense, replayed)


class FromWeights(Gaussian):
    reads_weight = True


def test_what_cannot_be_recalled_is_refused() -> None:
    net = Net()
    with pytest.raises(InputError, match="not element-wise"):
        Recall(Muon())
    with pytest.raises(InputError, match="draws former directions again"):
        MeZO(net, rule="adam", moments="replay", directions=FromWeights())
    with pytest.raises(InputError, match="draws former directions again"):
        MeZO(net, rule="adam", moments="replay", scales="parameter-norm")
    with pytest.raises(InputError, match="give rule=Recall"):
        MeZO(net, rule=Lion(), moments="replay")
    for bad in (-0.1, 1.0, "none"):
        with pytest.raises(InputError, match="tolerance"):
            MeZO(net, rule="adam", moments="replay", tolerance=bad)
    with pytest.raises(InputError, match="last"):
        Recall(Adam(), 0)
    with pytest.raises(InputError, match="moments"):
        MeZO(net, moments="sparse")


def test_explain_says_what_is_recalled() -> None:
    table = MeZO(Net(), rule="momentum", moments="replay").explain()
    assert "momentum by recall of 88 on gaussian" in table
    assert "adam by recall of all" in MeZO(Net(), rule="adam", moments="replay", tolerance=0.0).explain()
