"""The tokenizer: trained the same every time, opened by anyone, refused when it does not fit the model."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from tare.core.errors import InputError
from tare.train.sources import Document, documents, find, fingerprint
from tare.train.tokenizer import (
    EOS,
    PAD,
    encoder,
    id_count,
    load_tokenizer,
    sample,
    text_hash,
    tokenizer_hash,
    train_bpe,
    trained_tokenizer,
    write_tokens,
)

TEXT = [document.text for document, _ in zip(documents("stdlib"), range(12), strict=False)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tokenizer of 400 ids."""
    bpe = train_bpe(TEXT, 400)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


BPE = train_bpe(TEXT, 400)


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert BPE.decode(BPE.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_training_does_not_depend_on_threads_or_process() -> None:
    script = (
        "import hashlib\nfrom tare.train.sources import documents\nfrom tare.train.tokenizer import train_bpe\n"
        "texts = [document.text for document, _ in zip(documents('stdlib'), range(12))]\n"
        "print(hashlib.sha256(train_bpe(texts, 400).to_str().encode()).hexdigest())"
    )
    expected = hashlib.sha256(BPE.to_str().encode()).hexdigest()
    for threads in ("1", "2"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


def test_special_tokens_come_first_and_the_size_is_kept() -> None:
    assert (BPE.token_to_id(EOS), BPE.token_to_id(PAD), BPE.get_vocab_size()) == (0, 1, 400)
    assert train_bpe(["little"], 5000).get_vocab_size() < 300


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"vocabulary of 257 is too small .* allowed: 258 or more"):
        train_bpe(TEXT, 257)


def test_the_sample_takes_the_largest_hashes_in_order() -> None:
    made = [Document(str(number), f"document {number} " * 10) for number in range(300)]
    taken = sample(made, 5000)
    assert taken == sample(made, 5000)
    assert 4500 < sum(map(len, taken)) <= 5000
    order = [document.text for document in made if document.text in set(taken)]
    assert taken == order
    left = {document.text for document in made} - set(taken)
    assert min(map(text_hash, taken)) > max(map(text_hash, left))
    assert sample(made, 10**9) == [document.text for document in made]


def test_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARE_CACHE", str(tmp_path))
    (tmp_path / "a.txt").write_text("\n".join(TEXT[0].splitlines()[:50]))
    source, said = find(str(tmp_path / "a.txt")), list[str]()
    mark = fingerprint(source)
    hashes = {tokenizer_hash(trained_tokenizer(source, "text", 300, mark, said.append)) for _ in range(2)}
    assert len(hashes) == len(said) == 1
    assert id_count(trained_tokenizer(source, "text", 280, mark)) == 280


def test_saved_beside_a_model_anyone_can_open_it(folder: Path) -> None:
    first = load_tokenizer(folder)
    LlamaConfig(vocab_size=400).save_pretrained(folder)  # a config.json must not make it another kind of tokenizer
    second = AutoTokenizer.from_pretrained(folder)
    text = "def  f(x):\n\treturn x  # é 🎈\n"
    assert second(text)["input_ids"] == first(text)["input_ids"] == BPE.encode(text).ids
    assert second.decode(second(text)["input_ids"]) == text
    assert (second.eos_token, second.pad_token, second.bos_token) == (EOS, PAD, None)


def test_the_hash_survives_saving_and_calls_and_sees_a_change(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    first = tokenizer_hash(tokenizer)
    assert first == tokenizer_hash(load_tokenizer(folder / "tokenizer.json"))
    tokenizer("text", truncation=True, max_length=3, padding="max_length")  # leaves truncation on in the backend
    assert tokenizer_hash(tokenizer) == first
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_hash(load_tokenizer(tmp_path / "again")) == first
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["model"]["merges"] = parts["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    assert tokenizer_hash(load_tokenizer(folder)) != first


def test_documents_are_encoded_whole_and_literally(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer("text", truncation=True, max_length=3, padding="max_length")
    text = f"a long enough text with {EOS} spelled out"
    ids = encoder(tokenizer).encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert (
        tokenizer.eos_token_id in tokenizer(text, truncation=False, padding=False)["input_ids"]
    )  # their own behaviour stays


def word_level(path: Path, *words: str) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>", "<|endoftext|>"])
def test_a_well_known_end_of_text_is_found_and_pads(tmp_path: Path, eos: str) -> None:
    tokenizer = load_tokenizer(word_level(tmp_path / "tokenizer.json", "[UNK]", eos, "the"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (eos, 1, 1)
    assert id_count(tokenizer) == 3


def test_bad_tokenizers_are_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"version":')
    (tmp_path / "other.json").write_text('{"model": 1}')
    (tmp_path / "noise.json").write_bytes(b"\xff\0\xfe")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "broken/tokenizer_config.json").write_text("{")
    word_level(tmp_path / "no_eos.json", "[UNK]", "the")
    cases = {
        "missing": "has no tokenizer.json; allowed: a folder that holds one, or the file itself",
        "empty": "has no tokenizer.json",
        "bad.json": "is not a tokenizer.json",
        "other.json": "is not a tokenizer.json",
        "noise.json": "is not a tokenizer.json",
        "broken": "is not a tokenizer.json",
        "no_eos.json": "has no end-of-text token",
    }
    for name, message in cases.items():
        with pytest.raises(InputError) as caught:
            load_tokenizer(tmp_path / name)
        line = str(caught.value)
        assert line.startswith("tokenizer: ")
        assert name in line
        assert message in line
        assert "\n" not in line


def test_ids_beyond_the_model_are_refused(folder: Path) -> None:
    assert id_count(load_tokenizer(folder, 400)) == 400
    with pytest.raises(
        InputError, match=r"saved' has 400 ids and the model's vocabulary is 399; take a model of at least 400"
    ):
        load_tokenizer(folder, 399)


def write(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], share: float
) -> tuple[list[str], list[str]]:
    """Train and held-out documents as they come back from the files."""
    write_tokens((Document(str(n), text) for n, text in enumerate(texts)), tokenizer, tmp_path, share, "name")
    facts = json.loads((tmp_path / "facts.json").read_text())
    sides = []
    for side in ("train", "eval"):
        path = tmp_path / f"{side}.bin"
        ids = np.fromfile(path, facts["dtype"]) if path.exists() else np.zeros(0, int)
        ends = np.flatnonzero(ids == tokenizer.eos_token_id) + 1
        parts = np.split(ids, ends)
        assert parts.pop().size == 0  # every document is closed
        assert (len(parts), len(ids)) == (facts[f"{side}_documents"], facts[f"{side}_tokens"])
        sides.append([tokenizer.decode(part[:-1]) for part in parts])
    assert facts["bytes"] == sum(len(text.encode()) for text in texts)
    return sides[0], sides[1]


@settings(deadline=None)
@given(
    st.lists(st.text("ab é\n🎈", min_size=1, max_size=12), min_size=1, max_size=30), st.sampled_from([0.0, 0.02, 0.5])
)
def test_files_hold_every_document_once_on_one_side(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], share: float
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BPE, eos_token=EOS, pad_token=PAD)
    place = tmp_path_factory.mktemp("tokens")
    if share and len(set(texts)) == 1:
        with pytest.raises(InputError, match=r"'name' holds no two different documents"):
            write(place, tokenizer, texts, share)
        return
    train, held = write(place, tokenizer, texts, share)
    assert sorted(train + held) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in their order
    assert not set(train) & set(held)
    assert bool(held) == bool(share)
    assert train


def test_the_held_out_share_is_of_the_tokens(tmp_path: Path, folder: Path) -> None:
    lines = sorted({line for text in TEXT for line in text.splitlines() if line.strip()})
    write(tmp_path, load_tokenizer(folder), lines, 0.1)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["eval_tokens"] / (facts["eval_tokens"] + facts["train_tokens"]) == pytest.approx(0.1, abs=0.01)


def test_many_ids_take_four_bytes(tmp_path: Path) -> None:
    words = ["[UNK]", "</s>", *(f"w{number}" for number in range(70_000))]
    tokenizer = load_tokenizer(word_level(tmp_path / "tokenizer.json", *words))
    assert write(tmp_path, tokenizer, ["w69999 w1", "w68000"], 0.0)[0] == ["w69999 w1", "w68000"]
    assert np.fromfile(tmp_path / "train.bin", "<u4").max() == 70_001


def test_text_of_which_nothing_is_left(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1}, merges=[]))  # drops what it does not know
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"'name' gives no tokens"):
        write(tmp_path, load_tokenizer(tmp_path), ["zzz"], 0.0)
