"""From rows to token ids: which sequences a model runs for an example, and which predictions in them make the score of each answer.

| kind | runs | the score of an answer |
|---|---|---|
| causal | a sequence for each answer; one where all answers are single tokens | mean log p of the answer's tokens, given the text before |
| masked | one sequence with a mask in the gap | log p of the answer's only token there |
| classifier | one sequence, or a pair | the head's output |

Sequences longer than allowed lose tokens on the left, where prompts begin (a mask is kept; a classifier's tokenizer cuts the longer part).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tare.core.errors import InputError
from tare.plan.kinds import Kind
from tare.train.tasks.rows import Table
from tare.train.tasks.templates import Template, Text
from tare.train.tokenizer import encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Entry = tuple[int, int, int]  # (sequence, position, id): log p(id | what the model puts out at that position) counts


@dataclass(frozen=True)
class Example:
    """One row. sequences: token ids. entries: for each answer those whose mean is its score; none for classifiers. gold: the right one."""

    sequences: tuple[tuple[int, ...], ...]
    entries: tuple[tuple[Entry, ...], ...]
    gold: int
    types: tuple[int, ...] = ()  # 0 and 1 of a pair, where the tokenizer tells them apart
    cut: bool = False

    @property
    def width(self) -> int:
        return max(map(len, self.sequences))


class Encoder:
    """Encodes rows for one kind of model. Args: template; tokenizer; kind of the model; seq: most tokens in a sequence.

    Raises:
        InputError: words that the model cannot tell apart, or, for a masked model, that are several tokens; no mask token.
    """

    def __init__(self, template: Template, tokenizer: "PreTrainedTokenizerFast", kind: Kind, seq: int) -> None:
        self.template, self.tokenizer, self.kind, self.seq = template, tokenizer, kind, seq
        self._backend: Tokenizer = encoder(tokenizer)
        found = self._backend.encode("a", add_special_tokens=True)
        inner = [n for n, special in enumerate(found.special_tokens_mask) if not special]
        first, last = (inner[0], inner[-1]) if inner else (0, -1)
        self.lead, self.trail = tuple(found.ids[:first]), tuple(found.ids[last + 1 :])
        self._told = False
        if kind == "masked":
            if tokenizer.mask_token_id is None:
                raise InputError("model.tokenizer: a masked model needs a mask token, and its tokenizer has none")
            if template.task == "choice":
                raise InputError("task.name: choice needs a causal model; answers of several tokens fit no single mask")
        if kind == "classifier" and template.task == "choice":
            raise InputError("task.name: choice needs a causal model; a classifier has a fixed number of outputs")

    def encode(self, table: Table, gold: list[int]) -> list[Example]:
        """The examples of a table."""
        how: Any = {"causal": self._causal, "masked": self._masked, "classifier": self._classifier}[self.kind]
        return list(how(table, gold))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def _causal(self, table: Table, gold: list[int]) -> Iterator[Example]:
        words = tuple(label.word for label in self.template.labels)
        texts = [self.template.fill(row) for row in table.rows]
        answers = [words or self.template.answers(row) for row in table.rows]
        stems = [text.before.rstrip(" ") for text in texts]
        begun = iter(self._ids(stems))
        whole = iter(
            self._ids([
                stem + text.before[len(stem) :] + word
                for stem, text, own in zip(stems, texts, answers, strict=True)
                for word in own
            ])
        )  # fmt: skip
        for place, own, right in zip(table.places, answers, gold, strict=True):
            stem = next(begun)
            ways = [next(whole) for _ in own]
            shared = min(_common(stem, way) for way in ways)
            if not self.lead and not shared:
                raise InputError("task.template: a causal model needs some text before the answer; put it there")
            for word, way in zip(own, ways, strict=True):
                if len(way) == shared or len(way) - shared > self.seq - len(self.lead) - 1:
                    what = "gives no tokens" if len(way) == shared else f"is longer than data.seq = {self.seq} tokens"
                    raise InputError(f"data: {place}: the answer {word!r} {what}")
            if words and not self._told:
                self._apart(dict(zip(words, (way[shared:] for way in ways), strict=True)))
            yield self._scored(ways, shared, right)

    def _scored(self, ways: list[list[int]], shared: int, gold: int) -> Example:
        """The example of a causal model. ways: text and answer for each answer; shared: tokens that they all begin with."""
        room = self.seq - len(self.lead)
        if all(len(way) == shared + 1 for way in ways):
            prompt = ways[0][:shared]
            row = (*self.lead, *prompt[max(0, shared - room) :])
            spot = len(row) - 1
            return Example((row,), tuple(((0, spot, way[-1]),) for way in ways), gold, cut=shared > room)
        rows, entries = [], []
        for number, way in enumerate(ways):
            row = (*self.lead, *way[max(0, len(way) - room) :])
            start = len(row) - (len(way) - shared)
            rows.append(row)
            entries.append(tuple((number, at - 1, row[at]) for at in range(start, len(row))))
        return Example(tuple(rows), tuple(entries), gold, cut=max(map(len, ways)) > room)

    def _masked(self, table: Table, gold: list[int]) -> Iterator[Example]:
        texts = [self.template.fill(row, masked=True) for row in table.rows]
        mask = int(self.tokenizer.mask_token_id)
        ids = self._word_ids(texts[0])
        befores, afters = self._ids([t.before.rstrip(" ") for t in texts]), self._ids([t.after for t in texts])
        room = self.seq - len(self.lead) - len(self.trail)
        for before, after, right in zip(befores, afters, gold, strict=True):
            whole = [*before, mask, *after]
            over = len(whole) - room
            kept = whole if over <= 0 else whole[over:] if over <= len(before) else whole[:room]
            row = (*self.lead, *kept, *self.trail)
            spot = len(self.lead) + kept.index(mask) if mask in kept else -1
            if spot < 0:
                raise InputError(f"data.seq: {self.seq} tokens have no room for the mask; raise it")
            yield Example((row,), tuple(((0, spot, word),) for word in ids), right, cut=over > 0)

    def _word_ids(self, text: Text) -> list[int]:
        """The token of each label's word as it stands in the gap."""
        words = [label.word for label in self.template.labels]
        found = self._ids([(" " if text.before else "") + word for word in words])
        for word, ids in zip(words, found, strict=True):
            if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
                what = "unknown to" if len(ids) == 1 else f"{len(ids)} tokens for"
                raise InputError(
                    f"task.words: {word!r} is {what} this tokenizer, and a mask holds one; choose another word"
                )
        self._apart(dict(zip(words, found, strict=True)))
        return [ids[0] for ids in found]

    def _apart(self, tokens: dict[str, list[int]]) -> None:
        """Raise InputError for two words of which one's tokens begin with all of the other's."""
        self._told = True
        words = [label.word for label in self.template.labels]
        for number, word in enumerate(words):
            for other in words[:number]:
                if other == word:
                    raise InputError(f"task.words: {word!r} stands for two labels; choose another word for one of them")
                one, two = tokens[word], tokens[other]
                if one[: len(two)] == two or two[: len(one)] == one:
                    raise InputError(
                        f"task.words: {word!r} and {other!r} begin with the same tokens, so scores cannot tell them apart; choose words "
                        "of which none begins like another"
                    )

    def _classifier(self, table: Table, gold: list[int]) -> Iterator[Example]:
        texts = [self.template.fill(row).parts for row in table.rows]
        pairs = [parts[0] if len(parts) == 1 else (parts[0], " ".join(parts[1:])) for parts in texts]
        self._backend.no_truncation()
        full = [len(found.ids) for found in self._backend.encode_batch(pairs, add_special_tokens=True)]
        self._backend.enable_truncation(self.seq)
        for found, length, right in zip(
            self._backend.encode_batch(pairs, add_special_tokens=True), full, gold, strict=True
        ):
            types = tuple(found.type_ids) if any(found.type_ids) else ()
            yield Example((tuple(found.ids),), (), right, types, length > self.seq)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
