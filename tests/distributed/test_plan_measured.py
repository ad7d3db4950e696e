"""The promise, on ranks: what a plan says of each is what two real processes hold. State to the byte, the peak within 5 %."""

from typing import Any

import pytest
from ranks import Ranks
from work_plan_ranks import config_of

import tare
from tare.methods import registry
from tare.plan.resolve import resolve
from tare.plan.shares import shares
from tare.plan.steps import on_paper, step_cost

CUT = [
    ("llama-tiny", "galore", {}), ("uneven", "muon", {"checkpointing": True}), ("uneven", "adamw", {"precision": "bf16"}),
    ("uneven", "apollo", {"accumulate": 2}),
]  # fmt: skip


def planned(name: str, key: str, parallel: str, gpus: int = 2, **own: Any) -> Any:
    return tare.plan(
        config_of(name), batch=8, seq=64, methods=[key], gpus=gpus, parallel=parallel, hyper=own.pop("hyper", {}), **own
    )


@pytest.mark.parametrize(("name", "key", "own"), CUT, ids=[f"{name}-{key}-{'-'.join(own)}" for name, key, own in CUT])
def test_cut_weights(ranks2: Ranks, name: str, key: str, own: dict) -> None:
    hyper = {"rank": 16} if "rank" in registry.options(key) else {}
    real = ranks2.run(
        "work_plan_ranks", "measured", name=name, key=key, parallel="fsdp", batch=8, seq=64, hyper=hyper, **own
    )
    row = planned(name, key, "fsdp", hyper=hyper, **own).row(key)
    assert row.ranks.first.state == real[0]["state"]
    assert row.ranks.worst.state == real[row.ranks.worst.rank]["state"]
    assert max(each["peak"] for each in real) == pytest.approx(row.peak, rel=0.05)


@pytest.mark.parametrize("own", [{}, {"accumulate": 2}], ids=["one", "two"])
def test_whole_weights(ranks2: Ranks, own: dict) -> None:
    real = ranks2.run("work_plan_ranks", "measured", name="uneven", key="adamw", parallel="ddp", batch=8, seq=64, **own)
    row = planned("uneven", "adamw", "ddp", **own).row("adamw")
    assert [each["state"] for each in real] == [row.state] * 2
    assert max(each["peak"] for each in real) == pytest.approx(row.peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("key", registry.keys("gradient"))
def test_every_method(ranks2: Ranks, key: str) -> None:
    hyper = {"period": 2} if registry.card(key).every_leaf else {}
    row = planned("uneven", key, "fsdp", hyper=hyper).row(key)
    if row.note:
        pytest.skip(row.note)
    config = config_of("uneven")
    choice = resolve(key, "uneven", hyper=hyper)
    states = shares(on_paper(choice, config, "fp32"), step_cost(choice, config, "fp32"), 2).states
    real = ranks2.run(
        "work_plan_ranks", "measured", name="uneven", key=key, parallel="fsdp", batch=8, seq=64, hyper=hyper
    )
    if not registry.card(key).every_leaf:  # of leaves that take turns the plan tells of the turn with most
        assert [each["state"] for each in real] == list(states)
    which = "most" if registry.card(key).every_leaf else "peak"
    assert max(each[which] for each in real) == pytest.approx(row.peak, rel=0.05)
