"""The harness itself: results of all ranks, and a failing one that neither hangs nor hides."""

import pytest
from ranks import RankFailed, Ranks


def test_every_rank_answers_and_the_group_stays(ranks2: Ranks) -> None:
    assert ranks2.run("work_harness", "total", start=1) == [3.0, 3.0]
    assert ranks2.run("work_harness", "total", start=2) == [5.0, 5.0]


def test_a_failing_rank_is_told_with_its_traceback_and_the_pool_recovers(ranks2: Ranks) -> None:
    with pytest.raises(RankFailed, match=r"rank 1: (?s:.*)this one fails"):
        ranks2.run("work_harness", "fail", who=1)
    assert ranks2.run("work_harness", "total", start=0) == [1.0, 1.0]
