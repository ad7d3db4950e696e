"""From text to token ids: a byte-level BPE trained on the data, or a tokenizer that the user brings.

What is handed out is always a `transformers` fast tokenizer, so that it can be saved beside a model and opened by anyone.
`transformers` itself is imported when the first one is made.
"""

import hashlib
import heapq
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tare.core.errors import InputError
from tare.train import cache, sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"  # id 0: ends a document, and stands between two of them
PAD = "<|pad|>"  # id 1
SMALLEST_VOCAB = 258  # 256 bytes and the two above
SAMPLE_BYTES = 6_000_000  # of text a BPE is trained on: a second or two of work; more hardly moves the merges
_KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")  # where no config names it

GROUP_CHARS = 1 << 22  # encoded at a time: enough for every core, little enough to hold

Progress = Callable[[str], None]  # is told in words what is being done


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (the GPT-2 kind) of at most `vocab_size` ids; any text can be encoded and comes back unchanged.

    The same texts in the same order give the same tokenizer, whatever the number of threads. Little text gives fewer ids.
    Raises `InputError` when `vocab_size` cannot hold the 256 bytes and the two special tokens.

    >>> bpe = train_bpe(["the cat and the hat"] * 9, 300)
    >>> bpe.decode(bpe.encode("the hat é").ids)
    'the hat é'
    """
    if vocab_size < SMALLEST_VOCAB:
        what = f"tokenizer: the model's vocabulary of {vocab_size} is too small for a byte-level BPE"
        raise InputError(f"{what}; allowed: {SMALLEST_VOCAB} or more; take another model or set model.tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def sample(documents: Iterable[sources.Document], limit: int = SAMPLE_BYTES) -> list[str]:
    """At most `limit` bytes of whole documents, in their order: those with the largest hash of their text.

    So the choice is spread over the source, is the same every time, and leaves out what is held out for evaluation (the
    smallest hashes) unless the source is small.
    """
    heap: list[tuple[int, int, str]] = []  # the smallest hash on top
    held = 0
    for index, document in enumerate(documents):
        heapq.heappush(heap, (text_hash(document.text), -index, document.text))
        held += len(document.text.encode())
        while held > limit and len(heap) > 1:
            held -= len(heapq.heappop(heap)[2].encode())
    return [text for _, _, text in sorted(heap, key=lambda item: -item[1])]


def text_hash(text: str) -> int:
    """64 bits that depend on the text alone: equal documents always land on the same side of a split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def trained_tokenizer(
    source: sources.Source,
    text_column: str,
    vocab_size: int,
    fingerprint: str,
    progress: Progress | None = None,
    bad_rows: int = 0,
) -> "PreTrainedTokenizerFast":
    """The BPE of a source, trained once per (content of the source, vocabulary size) and kept in the cache."""

    def build(folder: Path) -> None:
        if progress:
            progress(f"training a tokenizer of {vocab_size} ids on {source.given}")
        bpe = train_bpe(sample(sources.documents(source, text_column, sources.Spare(bad_rows))), vocab_size)
        (folder / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")

    key = cache.key_of("bpe", 1, fingerprint, vocab_size, SAMPLE_BYTES)
    return load_tokenizer(cache.entry("tokenizers", key, build))


def load_tokenizer(
    path: str | Path, vocab_size: int | None = None, *, documents: bool = True
) -> "PreTrainedTokenizerFast":
    """Open a tokenizer: a folder with `tokenizer.json` (as `save_pretrained` writes it) or such a file.

    The end-of-text token is the one that the folder's configuration names, else a well-known one of the vocabulary; it
    stands in for a missing padding token. With `vocab_size`, ids must stay below it. documents: whether texts follow one another, so
    that the end-of-text token is needed.

    Raises `InputError`: nothing there, not a tokenizer, no end-of-text token, more ids than `vocab_size`.
    """
    from transformers import PreTrainedTokenizerFast

    given = Path(path).expanduser()
    if not (file := given / "tokenizer.json" if given.is_dir() else given).is_file():
        what = f"tokenizer: {str(path)!r} has no tokenizer.json; allowed: a folder that holds one, or the file itself"
        raise InputError(f"{what}; AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes it")
    try:
        backend = Tokenizer.from_file(str(file))
        if given.is_dir() and (given / "tokenizer_config.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(given), local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    except BaseException as error:  # the tokenizers library raises bare Exception, and panics of Rust, which are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"tokenizer: {str(file)!r} is not a tokenizer.json ({' '.join(str(error).split())[:160]})"
        raise InputError(f"{what}; save the tokenizer again") from error
    if tokenizer.eos_token_id is None:
        known = [token for token in _KNOWN_EOS if backend.token_to_id(token) is not None]
        if not known and documents:
            what = f"tokenizer: {str(path)!r} has no end-of-text token, which must stand between documents"
            raise InputError(f"{what}; set eos_token in tokenizer_config.json or add one of: {', '.join(_KNOWN_EOS)}")
        if known:
            tokenizer.eos_token = known[0]
    if tokenizer.pad_token_id is None:
        # What stands for padding is masked, so any token does.
        other = tokenizer.eos_token or tokenizer.unk_token or backend.id_to_token(0)
        tokenizer.pad_token = PAD if backend.token_to_id(PAD) is not None else other
    if vocab_size is not None:
        check_fits(tokenizer, vocab_size, str(path))
    return tokenizer


def id_count(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The largest id plus one: what the model's embedding must at least hold."""
    return 1 + max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values())


def check_fits(tokenizer: "PreTrainedTokenizerFast", vocab_size: int, name: str) -> None:
    """Raise `InputError` when the tokenizer has ids that a model of `vocab_size` has no row for."""
    if (count := id_count(tokenizer)) > vocab_size:
        what = f"tokenizer: {name!r} has {count} ids and the model's vocabulary is {vocab_size}"
        raise InputError(f"{what}; take a model of at least {count} or a tokenizer of at most {vocab_size} ids")


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 (hexadecimal) of all that decides the ids of a text; saving and loading a tokenizer does not change it."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are left behind by calls; a post-processor adds special tokens, which packing never asks for.
    for key in ("truncation", "padding", "post_processor"):
        parts.pop(key, None)
    return hashlib.sha256(json.dumps([parts, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def encoder(tokenizer: "PreTrainedTokenizerFast") -> Tokenizer:
    """A copy for encoding documents: nothing cut, nothing padded, and text that spells a special token stays text."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def write_tokens(
    documents: Iterable[sources.Document],
    tokenizer: "PreTrainedTokenizerFast",
    folder: Path,
    held_out: float,
    name: str,
    progress: Progress | None = None,
    spare: sources.Spare | None = None,
) -> None:
    """Tokenize documents into `folder`: `train.bin`, with `held_out` > 0 `eval.bin`, and `facts.json` about both.

    The files are bare little-endian ids (`dtype` in the facts: uint16 while the ids allow it, else uint32), every document
    followed by the end-of-text token. Held out are the documents with the lowest `text_hash`, so many that they make up the
    share `held_out` of the tokens: at least one, never all, and equal documents together. spare: what `documents` leaves out.

    Raises `InputError` when there are no tokens, or no two different documents to divide.
    """
    encode, eos = encoder(tokenizer), int(tokenizer.eos_token_id)
    dtype = np.dtype("<u2" if id_count(tokenizer) <= 1 << 16 else "<u4")
    hashes, ends, size, written, real = array("Q"), array("Q"), 0, 0, 0
    with open(folder / "train.bin", "wb") as file:
        for texts in _groups(documents):
            ids: list[int] = []
            for text, encoding in zip(texts, encode.encode_batch_fast(texts, add_special_tokens=False), strict=True):
                ids += [*encoding.ids, eos]
                hashes.append(text_hash(text))
                ends.append(written + len(ids))
            np.array(ids, dtype).tofile(file)
            written, real = written + len(ids), real + len(ids) - len(texts)
            size += sum(len(text.encode()) for text in texts)
            if progress:
                progress(f"tokenizing {name}: {size / 1e6:.1f} MB of text, {written / 1e6:.2f} M tokens")
    if real == 0:
        raise InputError(f"data: {name!r} gives no tokens; the tokenizer leaves nothing of its text")
    stops = np.array(ends, np.int64)
    held = _held_out(np.array(hashes), np.diff(stops, prepend=0), held_out, name)
    eval_tokens = _divide(folder, dtype, held, stops) if held.any() else 0
    facts = {
        "train_documents": int((~held).sum()),
        "eval_documents": int(held.sum()),
        "bytes": size,
        "dtype": dtype.str,
    }
    facts |= {"train_tokens": written - eval_tokens, "eval_tokens": eval_tokens, **(spare.facts if spare else {})}
    (folder / "facts.json").write_text(json.dumps(facts))


def _groups(documents: Iterable[sources.Document]) -> Iterator[list[str]]:
    group, size = [], 0
    for document in documents:
        group.append(document.text)
        size += len(document.text)
        if size >= GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _held_out(hashes: np.ndarray, lengths: np.ndarray, share: float, name: str) -> np.ndarray:
    """Which documents are held out -> bool [documents]: those of the lowest hashes that make up `share` of the tokens."""
    if share == 0:
        return np.zeros(len(hashes), bool)
    order = np.argsort(hashes, kind="stable")
    enough = int(np.searchsorted(np.cumsum(lengths[order]), share * lengths.sum()))
    held = hashes <= hashes[order[enough]]
    if held.all():
        held = hashes != hashes.max()
    if not held.any():
        raise InputError(
            f"data: {name!r} holds no two different documents, so none can be held out; set data.eval_source"
        )
    return held


def _divide(folder: Path, dtype: np.dtype, held: np.ndarray, ends: np.ndarray) -> int:
    """Move the tokens of the held-out documents from train.bin to eval.bin; returns how many they are."""
    whole = np.memmap(folder / "train.bin", dtype, "r")
    last = np.append(np.flatnonzero(held[1:] != held[:-1]), len(held) - 1)  # of every run of documents on one side
    stops = ends[last]
    with open(folder / "kept.bin", "wb") as kept, open(folder / "eval.bin", "wb") as out:
        for start, stop, side in zip(np.append(0, stops[:-1]), stops, held[last], strict=True):
            whole[start:stop].tofile(out if side else kept)
    del whole  # some systems do not replace a file that is mapped
    (folder / "kept.bin").replace(folder / "train.bin")
    return int((folder / "eval.bin").stat().st_size // dtype.itemsize)
