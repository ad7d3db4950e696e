"""Packing and order as pure functions of (seed, position), and evaluation that counts every token once."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tare.train.data import PackedDataset, eval_batches

sizes = st.integers(1, 400)
seeds = st.integers(0, 2**64 - 1)


def packed(count: int, seed: int = 0, seq: int = 2) -> PackedDataset:
    return PackedDataset(np.arange(count * seq, dtype=np.uint32), seq, seed)


# The order


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 5))
def test_every_sequence_comes_once_in_every_epoch(count: int, seed: int, epoch: int) -> None:
    order = packed(count, seed).sequence_indices(epoch * count, count)
    assert sorted(order) == list(range(count))


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 3000), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_the_order_does_not_depend_on_the_batches(count: int, seed: int, start: int, parts: list[int]) -> None:
    dataset = packed(count, seed)
    whole = dataset.batch(start, sum(parts))
    positions = [start + sum(parts[:number]) for number in range(len(parts))]
    assert torch.equal(whole, torch.cat([dataset.batch(at, part) for at, part in zip(positions, parts, strict=True)]))
    assert [dataset.sequence_index(start + number) for number in range(sum(parts))] == [
        int(row[0]) // 2 for row in whole
    ]


def test_the_order_is_the_same_for_ever() -> None:
    # Recorded when the order was defined: a change would make every resumed run see other data.
    assert packed(10, seed=0).sequence_indices(0, 10).tolist() == [4, 9, 2, 7, 1, 3, 6, 0, 8, 5]
    assert packed(10, seed=0).sequence_indices(10, 10).tolist() == [5, 3, 2, 1, 7, 4, 0, 8, 9, 6]
    assert packed(100_000, seed=7).sequence_indices(99_998, 4).tolist() == [7959, 33509, 69515, 32265]


def plain_index(position: int, count: int, seed: int) -> int:
    """The order in plain integers, one sequence at a time."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    epoch, index = divmod(position, count)
    key = mix(mix(seed) ^ epoch)
    half = 1
    while 4**half < count:
        half += 1
    while True:
        left, right = divmod(index, 2**half)
        for number in range(8):
            left, right = right, left ^ mix((key + number * 0x9E3779B97F4A7C15) % 2**64 ^ right) % 2**half
        index = left * 2**half + right
        if index < count:
            return index


@settings(deadline=None)
@given(st.integers(1, 10**6), seeds, st.integers(0, 10**9))
def test_the_order_agrees_with_its_plain_twin(count: int, seed: int, position: int) -> None:
    tokens = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (2 * count,), (0,))
    assert PackedDataset(tokens, 2, seed).sequence_index(position) == plain_index(position, count, seed)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    count = 1000
    orders = [packed(count, seed).sequence_indices(epoch * count, count) for seed in range(3) for epoch in range(3)]
    for number, order in enumerate(orders):
        for other in [np.arange(count), *orders[:number]]:
            assert (
                order == other
            ).sum() < 12  # fixed points of a random permutation: Poisson of mean 1, so 12 is 1e-10


def test_the_order_looks_random() -> None:
    count = 5000
    order = packed(count).sequence_indices(0, count).astype(float)
    # The correlation of neighbours has deviation 1/sqrt(5000) = 0.014 under a random permutation; 5 deviations.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.07
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.07
    # Of 3 sequences all 6 orders come up: over 600 epochs each about 100 times (deviation 9).
    small = packed(3).sequence_indices(0, 1800).reshape(600, 3)
    counts = np.unique(small @ np.array([9, 3, 1]), return_counts=True)[1]
    assert len(counts) == 6
    assert counts.min() > 55


def test_rows_are_the_stream_cut_into_sequences() -> None:
    tokens = np.arange(103, dtype=np.uint16)
    dataset = PackedDataset(tokens, 10, seed=3)
    rows = dataset.batch(0, 10)
    assert rows.dtype == torch.int64
    assert sorted(map(tuple, rows.tolist())) == [tuple(range(start, start + 10)) for start in range(0, 100, 10)]
    assert (len(dataset), dataset.epoch(15)) == (10, 1.5)


def test_a_large_set_needs_no_table() -> None:
    tokens = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (2**40,), (0,))  # 2 TB that are not there
    begin = time.perf_counter()
    assert PackedDataset(tokens, 1024, 0).sequence_indices(2**50, 64).max() < 2**30
    assert time.perf_counter() - begin < 5


def test_positions_that_make_no_sense() -> None:
    for position, batch in ((-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="position"):
            packed(9).batch(position, batch)


# Evaluation


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(2, 20), st.integers(1, 8), st.none() | st.integers(1, 250))
def test_evaluation_covers_the_tokens_once_in_order(length: int, seq: int, batch: int, limit: int | None) -> None:
    tokens = np.arange(length, dtype=np.uint16)
    batches = list(eval_batches(tokens, seq, batch, limit))
    seen = torch.cat([ids.flatten() for ids, _ in batches]).tolist() if batches else []
    used = length if limit is None else min(length, limit)
    assert seen == list(range(used - (used % seq == 1)))  # one token alone cannot be predicted
    assert sum(targets for _, targets in batches) == used - -(-used // seq)
    for ids, targets in batches:
        assert ids.dtype == torch.int64
        assert ids.shape[0] <= batch
        assert targets == ids.shape[0] * (ids.shape[1] - 1)


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    tokens = np.arange(1000)
    for batch in (1, 3, 7, 100):
        assert sum(targets for _, targets in eval_batches(tokens, 16, batch)) == 62 * 15 + 7
