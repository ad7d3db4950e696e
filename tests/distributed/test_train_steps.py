"""Steps that processes take together are the steps of one: DDP, FSDP2, HSDP, release, accumulation, clipping; and all decide alike."""

from typing import Any

import pytest
from ranks import Ranks

GALORE = {"rank": 3, "period": 2}
# eps so large that the step depends on how long the gradient is: clipping shows
SCALED = {"eps": 1.0}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("ddp", "adamw", SCALED, {"clip": 0.01, "accumulate": 2}),
    ("ddp", "adamw", {}, {"tied": True, "accumulate": 2, "sync": "batch"}),
    ("ddp", "galore", GALORE, {"release": True, "accumulate": 2, "clip": 0.05}),
    ("ddp", "badam", {"period": 1}, {"accumulate": 2}),
    ("ddp", "muon", {}, {}),
    ("fsdp", "adamw", SCALED, {"clip": 0.01, "accumulate": 2}),
    ("fsdp", "adamw", SCALED, {"tied": True, "accumulate": 2, "sync": "step"}),
    ("fsdp", "adamw", {}, {"release": True, "clip": 0.05}),
    ("fsdp", "galore", GALORE, {"tied": True}),
    ("fsdp", "muon", {}, {}),
    ("fsdp", "apollo-mini", {}, {"accumulate": 2}),
    ("hsdp", "adamw", SCALED, {"shards": 1, "clip": 0.01}),
]
MORE: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (parallel, method, options, {"accumulate": accumulate})
    for parallel in ("ddp", "fsdp")
    for accumulate in (1, 3)
    for method, options in (
        ("lion", {}), ("adan", {}), ("galore-adafactor", GALORE), ("fira", GALORE), ("frugal", {}), ("dct-adamw", {"rank": 3}),
        ("sinkgd", {}), ("scion", {}), ("adamw-8bit", {"storage": {"min_quantized": 0}}), ("online-subspace", {"rank": 3}),
    )
]  # fmt: skip
FORMS = {"ddp": "ddp", "fsdp": "fsdp", "hsdp": "fsdp"}


def check(ranks: Ranks, parallel: str, method: str, options: dict[str, Any], changes: dict[str, Any]) -> None:
    found = ranks.run("work_train", "beside", parallel=parallel, method=method, options=options, **changes)
    leaf_by_leaf = parallel == "ddp" and (changes.get("release") or method == "badam")
    for each in found:
        assert max(each["weight"], each["loss"], each["norm"]) < 1e-12
        assert each["moved"] > 1e-6
        assert each["form"] == ("leaves" if leaf_by_leaf else FORMS[parallel])
    rows = sum(each["rows"] for each in found)
    assert rows == (31 if parallel == "fsdp" else 31 * ranks.size)


@pytest.mark.parametrize(("parallel", "method", "options", "changes"), CASES)
def test_steps_are_those_of_one_process(
    ranks2: Ranks, parallel: str, method: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    check(ranks2, parallel, method, options, changes)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "method", "options", "changes"), [*CASES[:-1], *MORE])
def test_three_of_them(
    ranks3: Ranks, parallel: str, method: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Uneven rows: 11, 11, 9 of 31; 4 each of 12."""
    check(ranks3, parallel, method, options, changes)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("where", "problem"), [("loss", "the loss is inf"), ("gradient", "the gradient norm is nan")])
def test_a_bad_number_on_one_rank_skips_the_step_on_all(ranks2: Ranks, parallel: str, where: str, problem: str) -> None:
    for each in ranks2.run("work_train", "one_bad", parallel=parallel, where=where, who=1):
        assert each["problems"] == ["", problem, ""]
        assert each["far"] < 1e-12


@pytest.mark.parametrize("changes", [{"sync": "step"}, {"sync": "batch"}, {"sync": "step", "release": True}])
@pytest.mark.parametrize(("where", "micro"), [("loss", 2), ("gradient", 1)])
@pytest.mark.parametrize(("method", "options"), [("adamw", {}), ("galore", GALORE)])
def test_of_a_step_that_is_skipped_no_micro_batch_counts(
    ranks2: Ranks, method: str, options: dict[str, Any], where: str, micro: int, changes: dict[str, Any]
) -> None:
    """FSDP2 keeps whole gradients of micro-batches where `zero_grad` does not reach them."""
    if method == "galore" and changes.get("release"):
        pytest.skip("whole matrices are not stepped in release mode under fsdp")
    job = {"parallel": "fsdp", "method": method, "options": options, "accumulate": 2, **changes}
    for each in ranks2.run("work_train", "one_bad", where=where, who=1, micro=micro, **job):
        assert [bool(problem) for problem in each["problems"]] == [False, True, False]
        assert each["far"] < 1e-12


def test_uneven_counts_weigh_as_in_one_batch(ranks2: Ranks) -> None:
    """A loss that is a mean over unequal numbers of tokens; unweighted it would be far off."""
    for each in ranks2.run("work_train", "uneven"):
        assert each["far"] < 1e-12
        assert each["unweighted"] > 1e-3


def test_weights_that_drift_apart_are_named(ranks2: Ranks) -> None:
    assert ranks2.run("work_train", "apart") == [(None, (1, "layers.1.down_proj.bias"))] * 2


@pytest.mark.parametrize("in_step", [False, True])
def test_what_is_evaluated_is_dealt_out_once(ranks2: Ranks, in_step: bool) -> None:
    for items in (0, 1, 4, 5):
        hands = ranks2.run("work_train", "dealt", items=items, in_step=in_step)
        assert sorted(item for hand in hands for item, counts in hand if counts) == list(range(items))
        assert not in_step or len({len(hand) for hand in hands}) == 1


def test_what_a_step_sends(ranks2: Ranks) -> None:
    """Calls and bytes of collectives over weights and gradients, counted by torch, beside the formula in docs/distributed.md."""
    for parallel, accumulate in (("fsdp", 1), ("fsdp", 2), ("ddp", 1), ("ddp", 2)):
        for each in ranks2.run("work_train", "traffic", parallel=parallel, accumulate=accumulate):
            assert each["counted"] == each["formula"], (parallel, accumulate)
