"""Rand-k and Top-k as DDP hooks: a slow twin in float64, the limits, what error feedback owes, resume, NaN, bytes, bad use."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import work_hooks
from ranks import Ranks

from tare.core.errors import InputError
from tare.core.random import bits, make_key
from tare.parallel import hooks
from tare.parallel.hooks.randk import places

KINDS = [("randk", True), ("randk", False), ("topk", True), ("topk", False)]


def twin(kind: str, feedback: bool, fraction: float, seed: int, steps: int, size: int) -> tuple[list[Any], list[Any]]:
    """The same in plain Python, one element after another: mean gradients of each step, and the errors of each rank."""
    owed = [{name: [0.0] * math.prod(shape) for name, shape in work_hooks.SHAPES.items()} for _ in range(size)]
    seen = []
    for step in range(steps):
        given = [{n: g.flatten().tolist() for n, g in work_hooks.gradients(r, step).items()} for r in range(size)]
        found = {}
        for name, shape in work_hooks.SHAPES.items():
            d = math.prod(shape)
            k = math.ceil(fraction * d)
            mean = [0.0] * d
            if k >= d:
                mean = [sum(given[r][name][i] for r in range(size)) / size for i in range(d)]
            for r in range(size if k < d else 0):
                total = (
                    [g + e for g, e in zip(given[r][name], owed[r][name], strict=True)] if feedback else given[r][name]
                )
                if kind == "randk":
                    words = bits(make_key(seed, name + "/randk", step), 0, k).tolist()
                    runs = [(j * d // k, (j + 1) * d // k) for j in range(k)]
                    chosen = {a + (w * (b - a) >> 32): b - a for w, (a, b) in zip(words, runs, strict=True)}
                else:
                    chosen = dict.fromkeys(sorted(range(d), key=lambda i: -abs(total[i]))[:k], 1)
                for i, inverse in chosen.items():
                    mean[i] += total[i] * (1 if feedback else inverse) / size
                if feedback:
                    owed[r][name] = [0.0 if i in chosen else t for i, t in enumerate(total)]
            found[name] = np.array(mean).reshape(shape)
        seen.append(found)
    return seen, owed


@pytest.mark.parametrize(("kind", "feedback"), KINDS)
def test_equals_the_slow_twin(ranks2: Ranks, kind: str, feedback: bool) -> None:
    options: dict[str, Any] = {"fraction": 0.13, "error_feedback": feedback, "min_compressed": 0}
    if kind == "randk":
        options["seed"] = 3
    found = ranks2.run("work_hooks", "run", kind=kind, steps=5, **options)
    wanted, owed = twin(kind, feedback, 0.13, 3, 5, 2)
    for rank, (seen, errors, _) in enumerate(found):
        for mine, theirs in zip(seen, wanted, strict=True):
            for name in theirs:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=1e-14, err_msg=name)
        assert set(errors) == ({"big", "odd", "cube", "small"} if feedback else set())  # of `one`, k is all
        for name, error in errors.items():
            np.testing.assert_allclose(error, owed[rank][name], rtol=0, atol=1e-14, err_msg=name)


@pytest.mark.slow
def test_the_twin_of_three_ranks(ranks3: Ranks) -> None:
    for kind in ("randk", "topk"):
        found = ranks3.run("work_hooks", "run", kind=kind, steps=3, fraction=0.2, min_compressed=0)
        wanted, _ = twin(kind, True, 0.2, 0, 3, 3)
        for seen, _, _ in found:
            for mine, theirs in zip(seen, wanted, strict=True):
                for name in theirs:
                    np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("kind", ["randk", "topk", "whole"])
def test_all_of_it_is_what_ddp_does_bit_for_bit(ranks2: Ranks, kind: str) -> None:
    options = {} if kind == "whole" else {"fraction": 1.0, "min_compressed": 0}
    assert ranks2.run("work_hooks", "against_no_hook", kind=kind, **options) == [True, True]


def test_small_leaves_are_sent_whole(ranks2: Ranks) -> None:
    assert ranks2.run("work_hooks", "against_no_hook", kind="randk", fraction=0.01) == [True, True]
    found = ranks2.run("work_hooks", "run", kind="topk", steps=1, fraction=0.1, min_compressed=102)
    assert set(found[0][1]) == {"big", "cube"}


@pytest.mark.parametrize("kind", ["randk", "topk"])
def test_what_was_sent_and_what_is_owed_are_all_gradients(ranks2: Ranks, kind: str) -> None:
    # gradients are whole numbers, so that float32 adds them without rounding
    steps = 7
    found = ranks2.run(
        "work_hooks",
        "run",
        kind=kind,
        steps=steps,
        whole_numbers=True,
        dtype="float32",
        fraction=0.07,
        min_compressed=0,
    )
    for name in work_hooks.SHAPES:
        sent = sum(2 * seen[name] for seen in found[0][0])
        owed = sum(errors[name].reshape(sent.shape) for _, errors, _ in found if name in errors)
        given = sum(
            work_hooks.gradients(rank, step, torch.float32, True)[name].double().numpy()
            for rank in range(2)
            for step in range(steps)
        )
        np.testing.assert_array_equal(sent + owed, given, err_msg=name)


def test_rand_k_is_unbiased() -> None:
    numel, k, draws = 17, 5, 1500
    hits: Counter[int] = Counter()
    for number in range(draws):
        index, inverse = places(make_key(0, "w", number), numel, k)
        assert index.tolist() == sorted(set(index.tolist()))
        assert int(inverse.sum()) == numel
        for i, w in zip(index.tolist(), inverse.tolist(), strict=True):
            hits[i] += w
    # each element's mean is 1; its standard deviation is sqrt(w - 1), at most sqrt(3), over sqrt(draws): 5 of them
    assert all(abs(hits[i] / draws - 1) < 5 * math.sqrt(3 / draws) for i in range(numel))


def test_rand_k_looks_elsewhere_at_each_step_leaf_and_seed() -> None:
    drawn = {
        (s, n, t): tuple(places(make_key(s, n, t), 1000, 50)[0].tolist()) for s in (0, 1) for n in "ab" for t in (0, 1)
    }
    assert len(set(drawn.values())) == 8


@pytest.mark.parametrize("how", ["own", "gathered"])
@pytest.mark.parametrize("kind", ["randk", "topk"])
def test_resume_is_bit_for_bit(ranks2: Ranks, kind: str, how: str) -> None:
    for found in ranks2.run("work_hooks", "resumed", kind=kind, how=how, fraction=0.1, min_compressed=0):
        assert found == {"gradients": True, "errors": True, "steps": 6, "sent": True, "some": 5 - 1}


def test_a_state_of_three_ranks_on_two_owes_the_same(ranks2: Ranks) -> None:
    for kind in ("randk", "topk"):
        assert ranks2.run("work_hooks", "other_size", kind=kind) == [True, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("kind", "feedback"), KINDS)
def test_a_bad_number_on_one_rank_shows_on_all_and_spoils_nothing(
    ranks2: Ranks, kind: str, feedback: bool, value: float, dtype: str
) -> None:
    found = ranks2.run(
        "work_hooks",
        "spoilt",
        kind=kind,
        dtype=dtype,
        value=value,
        fraction=0.05,
        error_feedback=feedback,
        min_compressed=0,
    )
    for of_rank in found:
        assert of_rank == {"seen": True, "others": True, "kept": True, "moved": True, "recovered": True}


@pytest.mark.parametrize(("kind", "payload"), [("randk", 4), ("topk", 8)])
def test_bytes_are_what_reaches_the_links(ranks2: Ranks, kind: str, payload: int) -> None:
    for found in ranks2.run("work_hooks", "counted", kind=kind, fraction=0.1, min_compressed=5, bucket=25):
        numbers = sum(math.ceil(0.1 * math.prod(s)) for n, s in work_hooks.SHAPES.items() if n not in ("one", "small"))
        whole = 4 * (1 + 4)
        assert found["sent"] == found["seen"] == payload * numbers + whole
        assert found["calls"] == found["mode"] == found["times"] == (1 if kind == "randk" else 2)
        assert found["whole"] == 4 * sum(map(math.prod, work_hooks.SHAPES.values()))
        assert found["total"] == 3 * found["sent"]
        assert f"{found['sent']:,} bytes a step" in found["report"]


def test_accumulation_is_exchanged_once(ranks2: Ranks) -> None:
    for kind in ("randk", "topk"):
        assert ranks2.run("work_hooks", "accumulated", kind=kind) == [(1, 1, True)] * 2


def test_torch_registers_it_too(ranks2: Ranks) -> None:
    assert ranks2.run("work_hooks", "registered_by_hand") == [True, True]


def test_bad_use_is_told_in_a_line(ranks2: Ranks) -> None:
    words = (
        "already",
        "expected a torch.nn.parallel",
        "attach(ddp_model)",
        "'topk'",
        "error.gone",
        "error.big: 3 numbers",
    )
    for said in ranks2.run("work_hooks", "refused"):
        assert len(said) == len(words)
        for line, word in zip(said, words, strict=True):
            assert word in line
            assert "\n" not in line


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.5, math.nan, True, "1%", None])
def test_a_fraction_is_a_number_up_to_one(fraction: Any) -> None:
    for kind in (hooks.RandK, hooks.TopK):
        with pytest.raises(InputError, match=r"Invalid fraction: .*> 0 and <= 1"):
            kind(fraction)


def test_options_are_checked_by_name() -> None:
    assert isinstance(hooks.build("randk", fraction=0.5, seed=2), hooks.RandK)
    assert hooks.build("topk", fraction=0.5, seed=2).describe() == "Top-k of 50 % with error feedback"
    assert hooks.build("powersgd", rank=3, start=5).describe() == "PowerSGD of rank 3"
    for arguments, words in (
        ({"name": "rankd"}, "did you mean 'randk'"),
        ({"name": "topk", "rank": 2}, "'topk' has no option 'rank'"),
        ({"name": "whole", "fraction": 0.1}, "'whole' has no option 'fraction'"),
        ({"name": "powersgd", "start": 1}, "Invalid start"),
        ({"name": "projected"}, "expected an optimizer of tare, got NoneType"),
    ):
        with pytest.raises(InputError, match=words):
            hooks.build(**arguments)


class _Bucket:
    def __init__(self, buffer: torch.Tensor):
        self._buffer = buffer

    def buffer(self) -> torch.Tensor:
        return self._buffer


def test_gradients_of_other_kinds_are_refused() -> None:
    hook = hooks.RandK(0.1)
    hook._names = {torch.zeros(1): "w"}
    for buffer, word in ((torch.zeros(3, dtype=torch.complex64), "complex64"), (torch.eye(2).to_sparse(), "sparse")):
        with pytest.raises(InputError, match=word):
            hook.reduce(_Bucket(buffer))  # type: ignore[arg-type]
