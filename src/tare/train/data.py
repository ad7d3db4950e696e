"""The data of a run: a source tokenized once into memory-mapped files, packed into sequences, in an order that is computed.

Nothing about the order is ever saved: sequence number `position` of a run is a pure function of (seed, position).
"""

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tare.core.errors import InputError
from tare.train import cache, sources
from tare.train.config import DataConfig
from tare.train.tokenizer import (
    Progress,
    check_fits,
    id_count,
    load_tokenizer,
    tokenizer_hash,
    trained_tokenizer,
    write_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Order:
    """A random order of `count` things for every epoch, a pure function of (seed, position).

    Epoch `e` visits all of them once in the order of a keyed permutation: a Feistel network on the smallest even
    number of bits, walked along its cycle until it falls inside `count` (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"). It needs no table and no state.

    >>> order = Order(5, seed=0)
    >>> sorted(int(index) for index in order.indices(0, 5))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._half = max(1, math.ceil((count - 1).bit_length() / 2))  # bits of one side of the Feistel network

    def epoch(self, position: int) -> float:
        """Epochs done when `position` things have been seen."""
        return position / self.count

    def indices(self, position: int, batch: int) -> np.ndarray:
        """What stands at `position .. position + batch - 1` -> int64 [batch]; positions count from 0 across epochs."""
        if position < 0 or batch < 1:
            raise ValueError(f"position {position} and batch {batch}: allowed are 0 or more, and 1 or more")
        at = np.arange(position, position + batch, dtype=np.uint64)
        epoch, index = at // np.uint64(self.count), at % np.uint64(self.count)
        key = _mix(_mix(np.full(batch, self.seed % 2**64, np.uint64)) ^ epoch)
        outside = np.ones(batch, bool)
        while outside.any():  # the network permutes 4**half >= count numbers; at most 4 rounds of walking on average
            index[outside] = self._feistel(index[outside], key[outside])
            outside = index >= self.count
        return index.astype(np.int64)

    def _feistel(self, index: np.ndarray, key: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = index >> bits, index & mask
        for number in range(8):  # 4 rounds make a good permutation; small domains like some more
            salt = key + np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)  # the step of SplitMix64
            left, right = right, left ^ (_mix(salt ^ right) & mask)
        return (left << bits) | right


class PackedDataset(Order):
    """Sequences of `seq` tokens out of one stream, in a random order of their own for every epoch.

    Sequence `i` of the stream is `tokens[i * seq : (i + 1) * seq]`; documents run on across sequences and what is left at
    the end (below `seq`) is not used. `batch()` gives the inputs, and they are the labels too: the models of `transformers`
    shift labels themselves, so a row of `seq` tokens holds `seq - 1` targets.

    Arguments:
        tokens: the stream, 1-D integers (usually memory-mapped).
        seq: tokens a sequence. seed: of the order. batch: sequences that must be there at least.
        name: what the source is called in errors.

    Raises `InputError` when the stream is shorter than one sequence or has fewer sequences than `batch`.

    >>> data = PackedDataset(np.arange(12, dtype=np.uint16), seq=3, seed=0)
    >>> sorted(data.sequence_index(position) for position in range(4))
    [0, 1, 2, 3]
    >>> data.batch(position=2, batch=4).shape
    torch.Size([4, 3])
    """

    def __init__(self, tokens: np.ndarray, seq: int, seed: int, batch: int = 1, name: str = "data") -> None:
        if seq < 2:
            raise InputError(f"data.seq: {seq} tokens a sequence leave nothing to predict; allowed: 2 or more")
        self.tokens, self.seq = tokens, seq
        super().__init__(len(tokens) // seq, seed)
        if self.count < 1:
            raise InputError(
                f"data: {name!r} has {len(tokens)} training tokens, fewer than one sequence of {seq}; give more text or set "
                f"data.seq to {len(tokens)} or less"
            )
        if self.count < batch:
            raise InputError(
                f"data: {name!r} has {self.count} sequences of {seq} tokens, fewer than one batch of {batch}; give more "
                f"text, or set train.batch to {self.count} or less, or data.seq lower"
            )

    def __len__(self) -> int:
        return self.count

    def sequence_index(self, position: int) -> int:
        """Which sequence of the stream stands at `position`; positions count from 0 across epochs."""
        return int(self.sequence_indices(position, 1)[0])

    def sequence_indices(self, position: int, batch: int) -> np.ndarray:
        """Those at `position .. position + batch - 1` -> int64 [batch]."""
        return self.indices(position, batch)

    def batch(self, position: int, batch: int) -> torch.Tensor:
        """The `batch` sequences from `position` on -> int64 [batch, seq], inputs and labels alike.

        The same whatever the batches before were: `batch(0, 8)` is `batch(0, 4)` and `batch(4, 4)`, one after the other.
        """
        rows = self.tokens[: self.count * self.seq].reshape(self.count, self.seq)[
            self.sequence_indices(position, batch)
        ]
        return torch.from_numpy(rows.astype(np.int64))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def eval_batches(
    tokens: np.ndarray, seq: int, batch: int, max_tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, int]]:
    """The first `max_tokens` tokens of a stream in their order, each once: `(input_ids [rows, width], targets)`.

    The last batch of whole sequences may have fewer rows; a remainder below `seq` follows as one shorter row. `targets` is
    the number of tokens that are predicted, `rows * (width - 1)`: weigh the mean loss of a batch with it.

    >>> [(tuple(ids.shape), targets) for ids, targets in eval_batches(np.arange(23), seq=4, batch=3)]
    [((3, 4), 9), ((2, 4), 6), ((1, 3), 2)]
    """
    tokens = tokens[:max_tokens]
    whole = len(tokens) // seq
    for start in range(0, whole, batch):
        rows = tokens[start * seq : min(start + batch, whole) * seq].reshape(-1, seq)
        yield torch.from_numpy(rows.astype(np.int64)), rows.shape[0] * (seq - 1)
    if (rest := tokens[whole * seq :]).size > 1:  # one token alone has nothing to be predicted from
        yield torch.from_numpy(rest.astype(np.int64))[None], rest.size - 1


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens of a run, with the tokenizer that made them."""

    config: DataConfig
    train: np.ndarray  # token ids, memory-mapped; every document ends with eos
    eval: np.ndarray
    tokenizer: "PreTrainedTokenizerFast"
    tokenizer_hash: str
    fingerprint: str  # of the content of the sources and the way they are split
    vocab_size: int  # ids that the tokenizer uses: the model needs at least so many
    facts: dict[str, Any]
    tokens_hash: str = ""  # of the bytes of all token files

    def dataset(self, seed: int, batch: int = 1) -> PackedDataset:
        """The training sequences in the order of `seed`; `InputError` when they do not fill one batch."""
        return PackedDataset(self.train, self.config.seq, seed, batch, self.config.source)

    def eval_batches(self, batch: int) -> Iterator[tuple[torch.Tensor, int]]:
        """The first `eval_tokens` held-out tokens, as `eval_batches` gives them."""
        return eval_batches(self.eval, self.config.seq, batch, self.config.eval_tokens)

    def describe(self) -> dict[str, Any]:
        """Documents, tokens, bytes of text, tokenizer and cache folders, for reports; plain JSON values."""
        return dict(self.facts)


def open_corpus(
    data: DataConfig, vocab_size: int, tokenizer: str | None = None, progress: Progress | None = None
) -> Corpus:
    """Open the data of a run, tokenizing what is not in the cache yet.

    Without `eval_source`, documents are held out that make up `eval_fraction` of the tokens, those with the lowest hash of
    their text: the choice depends on nothing else, and equal documents are never on both sides.

    Arguments:
        data: the section of the run's configuration. vocab_size: of the model.
        tokenizer: folder or tokenizer.json; None trains a byte-level BPE of `vocab_size` on the source, once.
        progress: is told in words what is being done, while there is work.

    Raises `InputError` for every kind of bad input, naming file and line where there are such.
    """
    source = sources.find(data.source)
    held = sources.find(data.eval_source) if data.eval_source is not None else None
    prints = [sources.fingerprint(found, data.text_column) for found in (source, held) if found]
    if held and (prints[0] == prints[1] or _inside(held, source)):
        warnings.warn(f"data: evaluation reads training data ({data.eval_source!r}): its loss flatters", stacklevel=2)
    if tokenizer is None:
        made = trained_tokenizer(source, data.text_column, vocab_size, prints[0], progress, data.bad_rows)
    else:
        made = load_tokenizer(tokenizer, vocab_size)
    check_fits(made, vocab_size, tokenizer or data.source)
    mark = tokenizer_hash(made)

    def tokens_of(found: sources.Source, fingerprint: str, fraction: float) -> tuple[Path, dict[str, Any]]:
        spare = sources.Spare(data.bad_rows)

        def build(folder: Path) -> None:
            documents = sources.documents(found, data.text_column, spare)
            write_tokens(documents, made, folder, fraction, found.given, progress, spare)
            if sources.fingerprint(found, data.text_column) != fingerprint:
                raise InputError(f"data: {found.given!r} was changed while it was read; start again when it is at rest")

        # What is kept with rows left out is not found where none may be.
        allowed = (data.bad_rows,) if data.bad_rows else ()
        folder = cache.entry("tokens", cache.key_of("tokens", 1, fingerprint, mark, fraction, *allowed), build)
        facts = json.loads((folder / "facts.json").read_bytes())
        if left := facts.get("bad_rows"):
            rows = f"{left} row{'s' if left > 1 else ''} of {found.given!r} left out (data.bad_rows {data.bad_rows})"
            warnings.warn(f"data: {rows}, first {facts['first_bad_row']}", stacklevel=3)
        return folder, facts

    folder, facts = tokens_of(source, prints[0], 0.0 if held else data.eval_fraction)
    facts |= {"source": data.source, "eval_source": data.eval_source, "tokenizer_ids": id_count(made)}
    facts |= {"cache": str(folder)}
    held_file = folder / "eval.bin"
    if held:
        held_folder, other = tokens_of(held, prints[1], 0.0)
        held_file = held_folder / "train.bin"
        facts |= {"eval_documents": other["train_documents"], "eval_tokens": other["train_tokens"]}
    train, evaluation = (np.memmap(file, np.dtype(facts["dtype"]), "r") for file in (folder / "train.bin", held_file))
    PackedDataset(train, data.seq, 0, 1, data.source)  # says at once when there is less than one sequence
    if len(evaluation) < 2:
        raise InputError(f"data: {data.eval_source or data.source!r} leaves {len(evaluation)} tokens to evaluate on")
    fingerprint = cache.key_of(prints, data.eval_fraction if not held else None)
    tokens = cache.key_of(cache.hashes(folder), cache.hashes(held_file.parent))
    return Corpus(data, train, evaluation, made, mark, fingerprint, id_count(made), facts, tokens)


def _inside(held: sources.Source, source: sources.Source) -> bool:
    """Whether some file that is evaluated on is a file that is trained on, whatever the two are called."""
    return not {path.resolve() for _, path in held.files}.isdisjoint(path.resolve() for _, path in source.files)
