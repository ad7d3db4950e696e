"""The corpus: packing and order as pure functions, evaluation that counts every token once, a split without leakage."""

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tare.core.errors import InputError
from tare.train import data, sources, tokenizer
from tare.train.config import DataConfig
from tare.train.data import Corpus, PackedDataset, eval_batches, open_corpus
from tare.train.sources import documents

sizes = st.integers(1, 400)
seeds = st.integers(0, 2**64 - 1)


def packed(count: int, seed: int = 0, seq: int = 2) -> PackedDataset:
    return PackedDataset(np.arange(count * seq, dtype=np.uint32), seq, seed)


# The order


@given(sizes, seeds, st.integers(0, 5))
def test_every_sequence_comes_once_in_every_epoch(count: int, seed: int, epoch: int) -> None:
    order = packed(count, seed).sequence_indices(epoch * count, count)
    assert sorted(order) == list(range(count))


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
    assert time.perf_counter() - begin < 1


def test_positions_that_make_no_sense() -> None:
    for position, batch in ((-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="position"):
            packed(9).batch(position, batch)


# Evaluation


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


# The corpus


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little of the standard library, a cache of its own, and nothing else."""
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    for document, number in zip(documents("stdlib"), range(30), strict=False):
        (tmp_path / "code" / f"{number:02}.py").write_text(document.text, encoding="utf-8")
    return tmp_path


def config(source: str = "code", **others: Any) -> DataConfig:
    return DataConfig(**{"source": source, "seq": 32, **others})


def parts(corpus: Corpus, side: np.ndarray) -> list[str]:
    ends = np.flatnonzero(side == corpus.tokenizer.eos_token_id) + 1
    return [corpus.tokenizer.decode(part[:-1]) for part in np.split(np.asarray(side), ends)[:-1]]


def test_training_and_held_out_documents_are_the_source_and_share_nothing(at: Path) -> None:
    Path("code/copy.py").write_text(Path("code/07.py").read_text())
    corpus = open_corpus(config(eval_fraction=0.1), 400)
    train, held = parts(corpus, corpus.train), parts(corpus, corpus.eval)
    assert sorted(train + held) == sorted(document.text for document in documents("code"))
    assert held
    assert not set(train) & set(held)
    facts = corpus.describe()
    assert (facts["train_documents"], facts["eval_documents"]) == (len(train), len(held))
    assert facts["train_tokens"] + facts["eval_tokens"] == len(corpus.train) + len(corpus.eval)
    assert corpus.vocab_size == 400 == facts["tokenizer_ids"]
    assert isinstance(corpus.train, np.memmap)
    assert not corpus.train.flags.writeable


def test_what_is_held_out_does_not_depend_on_names(at: Path) -> None:
    first = open_corpus(config(), 400)
    for path in Path("code").iterdir():
        path.rename(path.with_name(f"{99 - int(path.stem):02}.py"))
    second = open_corpus(config(), 400)
    assert set(parts(first, first.eval)) == set(parts(second, second.eval))


def test_a_second_opening_does_no_work(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = open_corpus(config(), 400, progress=said.append)
    assert "training a tokenizer of 400 ids on code" in said
    assert any(line.startswith("tokenizing code: ") for line in said)
    monkeypatch.setattr(sources, "documents", None)  # calling it would fail
    second = open_corpus(config(seq=64, eval_tokens=5), 400, progress=said.append)
    assert np.array_equal(first.train, second.train)
    assert (first.fingerprint, first.tokenizer_hash) == (second.fingerprint, second.tokenizer_hash)


def test_two_caches_get_the_same_bytes(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_corpus(config(), 400)
    monkeypatch.setenv("TARE_CACHE", str(at / "another"))
    second = open_corpus(config(), 400)
    assert first.train.tobytes() == second.train.tobytes()
    assert first.eval.tobytes() == second.eval.tobytes()
    assert first.tokenizer_hash == second.tokenizer_hash


def test_a_change_of_the_data_or_the_split_changes_the_fingerprint(at: Path) -> None:
    first = open_corpus(config(), 400)
    assert open_corpus(config(eval_fraction=0.3), 400).fingerprint != first.fingerprint
    Path("code/05.py").write_text("x = 1\n")
    changed = open_corpus(config(), 400)
    assert changed.fingerprint != first.fingerprint
    assert "x = 1\n" in parts(changed, changed.train) + parts(changed, changed.eval)


def test_data_that_changes_while_it_is_read_is_not_kept(at: Path) -> None:
    def disturb(line: str) -> None:
        if line.startswith("tokenizing"):
            Path("code/05.py").write_text("x = 1\n")

    with pytest.raises(InputError, match=r"'code' was changed while it was read"):
        open_corpus(config(), 400, progress=disturb)
    assert open_corpus(config(), 400).describe()["train_documents"] > 20


def test_a_separate_evaluation_source(at: Path) -> None:
    Path("held.txt").write_text("def held_out(text):\n    return text\n" * 9)
    corpus = open_corpus(config(eval_source="held.txt"), 400)
    assert "".join(parts(corpus, corpus.eval)) == Path("held.txt").read_text()
    assert sorted(parts(corpus, corpus.train)) == sorted(document.text for document in documents("code"))
    assert corpus.describe()["eval_tokens"] == len(corpus.eval)
    assert sum(targets for _, targets in corpus.eval_batches(4)) > 0
    assert corpus.fingerprint != open_corpus(config(), 400).fingerprint


def test_evaluation_on_training_data_warns(at: Path) -> None:
    Path("copy").mkdir()
    for path in Path("code").iterdir():
        (Path("copy") / path.name).write_bytes(path.read_bytes())
    for eval_source in ("code", "./code/", "copy", "code/03.py"):
        with pytest.warns(UserWarning, match="data: evaluation reads training data"):
            open_corpus(config(eval_source=eval_source), 400)
    Path("held.txt").write_text("held out " * 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_corpus(config(eval_source="held.txt"), 400)


def test_a_tokenizer_of_the_users(at: Path) -> None:
    open_corpus(config(), 400).tokenizer.save_pretrained("saved")
    corpus = open_corpus(config(), 1000, "saved")
    assert corpus.vocab_size == 400
    with pytest.raises(InputError, match=r"'saved' has 400 ids and the model's vocabulary is 399"):
        open_corpus(config(), 399, "saved")


def test_a_vocabulary_that_is_too_small(at: Path) -> None:
    with pytest.raises(InputError, match=r"vocabulary of 100 is too small"):
        open_corpus(config(), 100)


def test_too_little_data_is_one_line(at: Path) -> None:
    Path("short.jsonl").write_text('{"text": "one two"}\n{"text": "three four"}\n')
    Path("one.jsonl").write_text('{"text": "one two three"}\n')
    Path("unseen.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(
        InputError, match=r"'short.jsonl' has \d+ training tokens, fewer than one sequence of 32; .*data.seq"
    ):
        open_corpus(config("short.jsonl"), 400)
    with pytest.raises(InputError, match=r"'one.jsonl' holds no two different documents.*data.eval_source"):
        open_corpus(config("one.jsonl"), 400)
    corpus = open_corpus(config(), 400)
    with pytest.raises(
        InputError, match=r"'code' has \d+ sequences of 32 tokens, fewer than one batch of 100000; .*train.batch"
    ):
        corpus.dataset(seed=0, batch=100_000)
    assert corpus.dataset(seed=0, batch=8).batch(0, 8).shape == (8, 32)
    with pytest.raises(InputError, match=r"data.seq: 1 tokens"):
        PackedDataset(corpus.train, 1, 0)


def test_bad_sources_are_found_before_any_work(at: Path) -> None:
    for wrong in (config("missing.txt"), config(eval_source="missing.txt")):
        with pytest.raises(InputError, match=r"data: 'missing.txt' does not exist"):
            open_corpus(wrong, 400)
    assert not (at / "cache").exists()


def test_nothing_half_done_stays_after_a_bad_line(at: Path) -> None:
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(InputError, match=r"bad.jsonl:2: malformed JSON"):
        open_corpus(config("bad.jsonl"), 400)
    assert [path.suffix for path in (at / "cache").rglob("*") if path.is_file()] == [".lock"]


def test_importing_is_light() -> None:
    import subprocess
    import sys

    script = (
        "import sys, tare.train.data; print([name for name in ('transformers', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
    assert data.write_tokens is tokenizer.write_tokens
