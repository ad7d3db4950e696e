"""TaskData: the examples of a run, in an order that is computed; batches, losses, objectives and evaluations of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.parallel.group import Crew
from tare.plan.activations import autocast
from tare.plan.kinds import Kind, kind_of
from tare.plan.models import config_for
from tare.plan.shapes import named
from tare.train.config import Precision, RunConfig, TaskConfig
from tare.train.data import Order
from tare.train.evaluate import evaluating
from tare.train.tasks import rows as tables
from tare.train.tasks.encoding import Encoder, Example
from tare.train.tasks.scoring import Batch, accuracy, collate, loss_of, macro_f1, scores
from tare.train.tasks.templates import Label, Template, choose
from tare.train.tokenizer import check_fits, id_count, load_tokenizer, tokenizer_hash, train_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tare.train.tokenizer import Progress


@dataclass(frozen=True)
class TaskScores:
    """An evaluation. loss: mean over examples; accuracy; f1: macro, None for a choice. examples: how many."""

    loss: float
    accuracy: float
    f1: float | None
    examples: int

    def numbers(self) -> dict[str, float]:
        """The scores that there are, by name."""
        return {"accuracy": self.accuracy} | ({} if self.f1 is None else {"f1": self.f1})


@dataclass(frozen=True)
class TaskData:
    """Training and evaluation examples of a run, with the tokenizer that made them. notes: what a user should know, a line each."""

    config: TaskConfig
    template: Template
    kind: Kind
    tokenizer: "PreTrainedTokenizerFast"
    tokenizer_hash: str
    fingerprint: str
    vocab_size: int
    train: list[Example]
    eval: list[Example]
    order: Order
    notes: list[str] = field(default_factory=list)
    tokens_hash: str = ""  # nothing is kept as files

    @property
    def outputs(self) -> int | None:
        """Of a classifier's head; None for other kinds."""
        return len(self.template.labels) if self.kind == "classifier" else None

    @property
    def classes(self) -> int:
        """How many labels there are; of a choice the most answers."""
        return len(self.template.labels) or max(len(example.entries) for example in self.train + self.eval)

    def batch(self, position: int, count: int) -> Batch:
        """The `count` training examples from `position` on, as `loss` or `objective` wants them."""
        chosen = [self.train[int(index)] for index in self.order.indices(position, count)]
        alone = self.template.task == "choice" and self.config.objective == "loss"
        return collate(chosen, int(self.tokenizer.pad_token_id or 0), alone)

    def widest(self, count: int) -> tuple[Batch, Batch]:
        """Batches of the longest examples, for planning: of training and of evaluation."""
        longest = sorted(self.train, key=lambda e: e.width, reverse=True)[:count]
        held = sorted(self.eval, key=lambda e: e.width, reverse=True)[:count]
        pad = int(self.tokenizer.pad_token_id or 0)
        alone = self.template.task == "choice" and self.config.objective == "loss"
        return collate(longest, pad, alone), collate(held, pad)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch, differentiable."""
        return loss_of(scores(model, self.kind, batch), batch)

    def objective(self, model: nn.Module, batch: Batch) -> Tensor:
        """What forward-only methods make smaller: the loss, 1 - accuracy or 1 - F1 of the batch."""
        found = scores(model, self.kind, batch)
        if self.config.objective == "loss":
            return loss_of(found, batch)
        if not bool(found.isfinite().any(dim=1).all()):
            return found.new_tensor(math.nan)  # an argmax of NaN would be an answer
        predicted = found.argmax(dim=1)
        if self.config.objective == "accuracy":
            return found.new_tensor(1.0 - accuracy(predicted, batch.gold))
        return found.new_tensor(1.0 - macro_f1(predicted, batch.gold, self.classes))

    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision,
        batch: int,
        crew: Crew | None = None,
        in_step: bool = False,
    ) -> TaskScores:
        """Loss, accuracy and F1 on the first `eval_examples` held-out examples, in eval mode and without gradients.

        crew, in_step: workers that share the examples, see `train.evaluate`; they all get the whole result.
        """
        crew = crew or Crew()
        held = self.eval[: self.config.eval_examples]
        rows: list[tuple[int, float, list[int], list[int]]] = []
        pad = int(self.tokenizer.pad_token_id or 0)
        with evaluating(model), torch.no_grad():
            for _, start, counts in crew.dealt(range(0, len(held), batch), in_step):
                some = collate(held[start : start + batch], pad).to(device)
                with autocast(precision, device.type):
                    found = scores(model, self.kind, some)
                if not counts:
                    continue
                if self.template.task == "choice":
                    loss = -float(found.gather(1, some.gold[:, None]).double().sum())
                else:
                    loss = float(loss_of(found.double(), some)) * len(found)
                rows.append((start, loss, found.argmax(dim=1).tolist(), some.gold.tolist()))
        everything = sorted(row for part in crew.gather(rows) for row in part)
        total = sum(row[1] for row in everything)
        guesses = torch.tensor([answer for row in everything for answer in row[2]])
        right_ones = torch.tensor([answer for row in everything for answer in row[3]])
        f1 = macro_f1(guesses, right_ones, self.classes) if self.template.task == "classify" else None
        return TaskScores(total / len(held), accuracy(guesses, right_ones), f1, len(held))


def open_task(config: RunConfig, progress: "Progress | None" = None) -> TaskData:
    """Read and encode the data of a task.

    Raises:
        InputError: whatever is wrong with data, template, words or tokenizer, in one line.
    """
    task, data = config.task, config.data
    assert task.name != "lm"
    shape = config_for(config.model.name, heads=True)
    kind = kind_of(shape, config.model.kind)
    vocab = int(shape.vocab_size)
    table = tables.read_table(data.source, task.name)
    held = tables.read_table(data.eval_source, task.name) if data.eval_source is not None else None
    for each in filter(None, (table, held)):
        tables.require_label(each, task.label_column)
    template = choose(task.template, task.name, task.words, table.rows, task.label_column, data.source)
    template = _with_labels(template, table, task, kind)
    for each in filter(None, (table, held)):
        tables.require_columns(each, template)
    if held is None:
        kept, out = tables.held_out(table, data.eval_fraction)
        table, held = tables.subset(table, kept), tables.subset(table, out)
    gold = tables.labels_of(table, template, task.label_column)
    if task.shots is not None:
        names = [label.names[0] for label in template.labels]
        kept = tables.few(table, gold, task.shots, config.run.seed, task.name == "classify", names)
        table, gold = tables.subset(table, kept), [gold[index] for index in kept]
    if progress:
        progress(f"encoding {len(table.rows):,} examples of {data.source}")
    tokenizer = _tokenizer(config, template, table, vocab, kind, progress)
    check_fits(tokenizer, vocab, config.model.tokenizer or config.model.name)
    encode = Encoder(template, tokenizer, kind, data.seq)
    held = tables.subset(held, list(range(min(len(held.rows), task.eval_examples))))
    train = encode.encode(table, gold)
    evaluation = encode.encode(held, tables.labels_of(held, template, task.label_column))
    if len(train) < config.train.batch:
        raise InputError(
            f"data: {data.source!r} has {len(train)} training examples, fewer than one batch of {config.train.batch}; set train.batch to "
            f"{len(train)} or less"
        )
    notes = [
        f"task {task.name}: template {template.name}, {kind} model, {len(train):,} examples, {len(evaluation):,} to evaluate"
    ]
    cut = sum(example.cut for example in train + evaluation)
    if cut:
        notes.append(f"{cut:,} examples are longer than data.seq = {data.seq} tokens and were cut; raise --seq")
    return TaskData(
        task, template, kind, tokenizer, tokenizer_hash(tokenizer), tables.fingerprint([table, held]), id_count(tokenizer),
        train, evaluation, Order(len(train), config.run.seed), notes,
    )  # fmt: skip


def _with_labels(template: Template, table: tables.Table, task: TaskConfig, kind: Kind) -> Template:
    """The user's template with the data's own labels, where none are given. Texts stand for themselves; a classifier needs no words."""
    if template.task == "choice" or template.labels:
        return template
    names = tables.label_names(table, task.label_column)
    if len(names) < 2:
        raise InputError(
            f"task.label_column: {task.label_column!r} holds {len(names)} different labels; two are needed"
        )
    if kind != "classifier" and any(name.lstrip("-").isdigit() for name in names):
        some = ", ".join(names[:6])
        raise InputError(
            f"task.words: missing, and the labels {some} are no words; give e.g. --words '{{{names[0]}: terrible, ...}}'"
        )
    return replace(template, labels=tuple(Label((name,), name) for name in names))


def _tokenizer(
    config: RunConfig, template: Template, table: tables.Table, vocab: int, kind: Kind, progress: "Progress | None"
) -> "PreTrainedTokenizerFast":
    """The tokenizer that is given, else the model folder's own, else (for fresh weights) a BPE of the training texts."""
    from tare.plan.weights import has_weights

    folder = None if named(config.model.name) is not None else Path(config.model.name).expanduser()
    given = config.model.tokenizer
    if given is None and folder is not None and (folder / "tokenizer.json").is_file():
        given = str(folder)
    if given is not None:
        return load_tokenizer(given, vocab, documents=False)
    if folder is not None and folder.is_dir() and has_weights(folder):
        raise InputError(
            f"model.tokenizer: {config.model.name} has weights and no tokenizer.json; give the tokenizer they were trained with"
        )
    if kind == "masked":
        raise InputError("model.tokenizer: a masked model needs a tokenizer with a mask token; give one")
    if progress:
        progress(f"training a tokenizer of {vocab} ids on {config.data.source}")
    from transformers import PreTrainedTokenizerFast

    from tare.train.tokenizer import EOS, PAD

    bpe = train_bpe(_texts(template, table), vocab)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def _texts(template: Template, table: tables.Table) -> Iterator[str]:
    words = [label.word for label in template.labels]
    for row in table.rows:
        text = template.fill(row)
        for word in words or template.answers(row):
            yield text.before + word + text.after
