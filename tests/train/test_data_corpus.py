"""The corpus: a split without leakage, made once, made anew when the data changes, and refused in one line."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tare.core.errors import InputError
from tare.train import sources
from tare.train.config import DataConfig
from tare.train.data import Corpus, PackedDataset, open_corpus
from tare.train.sources import documents

SMALL = [document for document in documents("stdlib") if 1000 < len(document.text) < 9000][:30]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little of the standard library, a cache of its own, and nothing else."""
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    for number, document in enumerate(SMALL):
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


def test_so_many_bad_rows_are_left_out_and_told(at: Path) -> None:
    good = [json.dumps({"text": f"the film number {n} is fine and its plot is dull"}) for n in range(400)]
    Path("good.jsonl").write_text("\n".join(good))
    bad = ['{"text": ', "[1]", '{"text": 3}', '{"txt": "x"}', '{"text": "\\ud800"}']
    Path("bad.jsonl").write_text("\n".join([*good[:7], bad[0], *good[7:200], *bad[1:], *good[200:]]))
    told = r"5 rows of 'bad.jsonl' left out \(data.bad_rows 5\), first data: bad.jsonl:8: malformed JSON"
    for _ in range(2):  # tokenized, and found again
        with pytest.warns(UserWarning, match=told):
            found = open_corpus(config("bad.jsonl", bad_rows=5), 400)
        assert found.facts["bad_rows"] == 5
    whole = open_corpus(config("good.jsonl"), 400)
    assert np.array_equal(found.train, whole.train)
    assert np.array_equal(found.eval, whole.eval)
    for allowed, line in ((4, 205), (1, 202), (0, 8)):
        with pytest.raises(InputError, match=rf"bad.jsonl:{line}: ") as fault:
            open_corpus(config("bad.jsonl", bad_rows=allowed), 400)
        assert (f"data.bad_rows allows {allowed}" in str(fault.value)) == (allowed > 0)


def test_bad_rows_of_parquet(at: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [None if n in (3, 90) else f"the film number {n} is fine and its plot is dull" for n in range(400)]
    parquet.write_table(pyarrow.table({"text": texts}), "rows.parquet")
    with pytest.warns(UserWarning, match=r"2 rows of 'rows.parquet' left out .*: row 4: column 'text' holds NoneType"):
        open_corpus(config("rows.parquet", bad_rows=2), 400)
    with pytest.raises(InputError, match=r"row 91: .*data.bad_rows allows 1"):
        open_corpus(config("rows.parquet", bad_rows=1), 400)


def test_importing_is_light() -> None:
    script = (
        "import sys, tare.train.data; print([name for name in ('transformers', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
