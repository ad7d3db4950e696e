"""Every registered method on cut leaves: the steps, the state and the bytes of one process, on two ranks and on three."""

from typing import Any

import pytest
from ranks import Ranks

from tare.methods import registry

KEYS = registry.keys("gradient")
FEW = ["adamw", "galore", "frugal", "lion-kappa", "badam", "lanton", "galore-plus"]


def check(results: list[dict[str, Any]]) -> None:
    """No fault on any rank; what ranks keep is what they say, and together what one process keeps."""
    faults = [
        f"{key} on rank {rank}: {found}"
        for rank, each in enumerate(results)
        for key, found in each.items()
        if isinstance(found, str)
    ]
    assert not faults, "\n".join(faults)
    for key in results[0]:
        mine = [each[key] for each in results]
        assert all(each["here"] == each["kept"] for each in mine), f"{key}: {mine}"
        total, alone = sum(each["here"] for each in mine), mine[0]["alone"]
        # `gain` has no rows: every rank keeps its state. Adan's is the largest: four numbers.
        assert alone <= total <= alone + 8 * 4 * (len(mine) - 1), f"{key}: {total} of {alone}"


def test_every_method_takes_the_steps_of_one_process(ranks2: Ranks) -> None:
    check(ranks2.run("work_shard", "equal", keys=KEYS))


@pytest.mark.slow
def test_three_ranks_with_uneven_and_empty_pieces(ranks3: Ranks) -> None:
    check(ranks3.run("work_shard", "equal", keys=KEYS, dtype="float64"))


@pytest.mark.parametrize("form", ["int8", "bf16", "int8-straddling"])
def test_moments_in_few_bits_are_cut_between_blocks_or_not_at_all(ranks2: Ranks, form: str) -> None:
    check(ranks2.run("work_shard", "equal", keys=FEW, form=form))


def test_a_rule_that_sees_whole_rows_steps_them_where_they_lie(ranks2: Ranks) -> None:
    for lies in ranks2.run("work_shard", "by_rows"):
        assert lies["tall.weight"]
        assert lies["experts.weight"]
        assert not lies["norm.weight"]  # a vector is one row


@pytest.mark.parametrize("weight", ["stochastic", "split24", "master"])
def test_noise_of_a_weight_is_that_of_its_place_in_the_whole(ranks2: Ranks, weight: str) -> None:
    check(ranks2.run("work_shard", "equal", keys=FEW, dtype="bfloat16", weight=weight))


def test_saved_state_is_taken_up_by_ranks_from_ranks_and_from_one_process(ranks2: Ranks) -> None:
    assert ranks2.run("work_shard", "loads", keys=KEYS) == [{}, {}]


@pytest.mark.parametrize(
    ("key", "apart"), [("adamw", 0), ("muon", 0), ("galore", 5), ("apollo-mini", 5), ("lanton", 0)]
)
def test_what_a_step_sends(ranks2: Ranks, key: str, apart: int) -> None:
    """Nothing for leaves stepped where they lie; sums of projections for those taken apart; for owned ones gradient and weight to the
    owner, and the weight back."""
    for sent in ranks2.run("work_shard", "sent", key=key):
        assert sent["calls"] == sent["calls_predicted"]
        assert sent["bytes"] == sent["predicted"]
        assert sent["apart"] == apart
        assert (sent["bytes"] == 0) == (key == "adamw")


def test_what_cannot_be_is_refused_in_one_line(ranks2: Ranks) -> None:
    for refused in ranks2.run("work_shard", "refusals"):
        assert "stepped whole" in refused["release"]
        assert "release=False" in refused["release"]
        assert "Shard(0)" in refused["columns"]
        assert "greedy" in refused["greedy"]
        assert all("\n" not in line for line in refused.values())


def test_the_real_fully_shard_trains_like_one_process(ranks2: Ranks) -> None:
    """Gradients averaged by FSDP2 from halves of a batch: equal to rounding, float64."""
    for gaps in ranks2.run("work_shard", "fully_sharded", keys=KEYS):
        assert all(gap <= 1e-10 for gap in gaps.values()), gaps
