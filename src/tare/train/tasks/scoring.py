"""From a batch of examples to scores of answers; losses and objectives of scores.

Only the predictions that count are kept: logits at other positions are not made where the model can leave them out, and never copied.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tare.plan.kinds import Kind
from tare.train.tasks.encoding import Example


@dataclass(frozen=True)
class Batch:
    """Examples as tensors; n examples of at most c answers, r sequences of t tokens, u positions, m predictions, e tokens of answers.

    ids, mask [r, t]; types [r, t] or None. positions [u]: those where a prediction counts. row, column [m]: sequence, and number within
    positions, of each prediction. spot, token, slot [e]: prediction, id and answer (example * c + number) of each token of an answer.
    counts [n, c]: tokens of each answer, 0 where an example has fewer answers. gold [n]. tokens: without padding.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor | None
    positions: Tensor
    row: Tensor
    column: Tensor
    spot: Tensor
    token: Tensor
    slot: Tensor
    counts: Tensor
    gold: Tensor
    tokens: int
    only_gold: bool = False

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def blank(self) -> "Batch":
        """The same shapes with zeros; where tensors are fake, fake ones."""
        return self._each(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))

    def tensors(self) -> list[Tensor]:
        return [value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def collate(examples: Sequence[Example], pad: int, only_gold: bool = False) -> Batch:
    """Examples as one batch, padded on the right to the longest sequence. only_gold: leave out the other answers of a choice."""
    rows: list[tuple[int, ...]] = []
    types: list[tuple[int, ...]] = []
    spots: dict[tuple[int, int], int] = {}
    spot, token, slot = [], [], []
    most = 1 if only_gold else max((len(example.entries) for example in examples), default=0)
    counts = torch.zeros(len(examples), most)
    for number, example in enumerate(examples):
        answers = (example.entries[example.gold],) if only_gold else example.entries
        moved: dict[int, int] = {}
        for sequence in sorted({entry[0] for answer in answers for entry in answer}) or range(len(example.sequences)):
            moved[sequence] = len(rows)
            rows.append(example.sequences[sequence])
            types.append(example.types)
        for answer_number, answer in enumerate(answers):
            counts[number, answer_number] = len(answer)
            for sequence, position, ident in answer:
                place = moved[sequence], position
                spot.append(spots.setdefault(place, len(spots)))
                token.append(ident)
                slot.append(number * most + answer_number)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    pairs = None
    if any(types):
        pairs = torch.zeros_like(ids)
        for number, sides in enumerate(types):
            pairs[number, : len(sides)] = torch.tensor(sides, dtype=torch.long)
    positions = sorted({position for _, position in spots})
    column = {position: number for number, position in enumerate(positions)}
    gold = [0 if only_gold else example.gold for example in examples]
    whole = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    return Batch(
        ids, mask, pairs, whole(positions), whole([r for r, _ in spots]), whole([column[p] for _, p in spots]), whole(spot),
        whole(token), whole(slot), counts, whole(gold), sum(map(len, rows)), only_gold,
    )  # fmt: skip


def scores(model: nn.Module, kind: Kind, batch: Batch) -> Tensor:
    """The score of every answer, fp32 [n, c]; -inf where an example has fewer answers."""
    inner = getattr(model, "module", model)  # of DDP's wrapper
    own = getattr(inner, "get_base_model", lambda: inner)()  # an adapter's wrapper hands on what it does not name
    takes = inspect.signature(own.forward).parameters
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if batch.types is not None and "token_type_ids" in takes:
        inputs["token_type_ids"] = batch.types
    if kind == "causal":
        inputs["use_cache"] = False
    if kind == "classifier":
        logits: Tensor = model(**inputs).logits
        return logits.float()
    if "logits_to_keep" in takes:
        logits = model(**inputs, logits_to_keep=batch.positions).logits[batch.row, batch.column]
    else:
        logits = model(**inputs).logits[batch.row, batch.positions[batch.column]]
    logp = F.log_softmax(logits.float(), dim=-1)[batch.spot, batch.token]
    total = logp.new_zeros(batch.counts.numel()).index_add(0, batch.slot, logp).view_as(batch.counts)
    return torch.where(batch.counts > 0, total / batch.counts.clamp(min=1), -torch.inf)


def loss_of(found: Tensor, batch: Batch) -> Tensor:
    """The loss of scores. Answers side by side: cross-entropy of the right one. The right answer alone: mean -log p over its tokens."""
    if batch.only_gold:
        return -(found * batch.counts).sum() / batch.counts.sum()
    return F.cross_entropy(found, batch.gold)


def accuracy(predicted: Tensor, gold: Tensor) -> float:
    """The share of right predictions."""
    return float((predicted == gold).double().mean())


def macro_f1(predicted: Tensor, gold: Tensor, classes: int) -> float:
    """The mean over classes of F1 = 2 tp / (2 tp + fp + fn); a class that is neither there nor predicted does not count.

    >>> round(macro_f1(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]), 3), 4)
    0.7333
    """
    found = []
    for number in range(classes):
        right = int(((predicted == number) & (gold == number)).sum())
        either = int((predicted == number).sum()) + int((gold == number).sum())
        if either:
            found.append(2 * right / either)
    return sum(found) / len(found)
