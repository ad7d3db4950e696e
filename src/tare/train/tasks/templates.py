"""Templates: how a row of a table becomes a text with a gap, and which word stands for which label.

The built-in ones are the prompts of MeZO's experiments (arXiv 2305.17333): those for large causal models, and for masked models those of
its RoBERTa experiments (LM-BFF, arXiv 2012.15723) where there is one. No torch here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, Literal

from tare.core.errors import InputError, nearest

Row = dict[str, Any]
TaskName = Literal["classify", "choice"]
GAP = {"classify": "label", "choice": "choice"}


@dataclass(frozen=True)
class Label:
    """One class. names: what may stand in the label column, the first being its name. word: what the model says for it."""

    names: tuple[str, ...]
    word: str


@dataclass(frozen=True)
class Text:
    """A row with a gap: what stands before and after it, and the single texts, for models that classify without a prompt."""

    before: str
    after: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """How rows of one kind are read.

    text: with `{column}` for values and one `{label}` (`{choice}`) for the gap. masked: the same for masked models, where it differs.
    labels: of classify; empty: those of the data. renames: other names under which columns are known. prepare: changes a row before it is
    filled in. options: columns that hold the answers of a choice.
    """

    name: str
    task: TaskName
    text: str
    masked: str = ""
    labels: tuple[Label, ...] = ()
    renames: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Row], Row] = dict
    options: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def adapt(self, row: Row) -> Row:
        """The row under the names that the template uses."""
        return {
            self.renames.get(name, name) if self.renames.get(name) not in row else name: v for name, v in row.items()
        }

    def missing(self, row: Row) -> list[str]:
        """Columns that the template needs and the row lacks."""
        there = self.adapt(row)
        return [name for name in self.columns if name not in there]

    def fill(self, row: Row, masked: bool = False) -> Text:
        """The text of a row."""
        row = self.prepare(self.adapt(row))
        pieces, names = _parse(self.masked if masked and self.masked else self.text, GAP[self.task], self.name)
        sides = ["", ""]
        at = 0
        for kind, piece in pieces:
            if kind == "gap":
                at = 1
            else:
                sides[at] += piece if kind == "text" else str(row[piece]).strip()
        return Text(sides[0], sides[1], tuple(str(row[name]).strip() for name in names))

    def answers(self, row: Row) -> tuple[str, ...]:
        """The answers of a row of a choice."""
        row = self.prepare(self.adapt(row))
        if self.options:
            return tuple(str(row[name]).strip() for name in self.options)
        return tuple(str(answer).strip() for answer in row["choices"])


def own(text: str, task: TaskName, words: dict[str, Any], columns: list[str]) -> Template:
    """The template of a text that the user gives. columns: of the data, among which a choice finds its answers.

    Raises:
        InputError: no gap or two, a placeholder that is no name, no answers.
    """
    text = text.replace("\\n", "\n")
    _, names = _parse(text, GAP[task], "template")
    options: tuple[str, ...] = ()
    if task == "choice" and "choices" not in columns:
        options = tuple(sorted(name for name in columns if name.startswith("choice") and name[6:].isdigit()))
        if len(options) < 2:
            raise InputError(
                f"task.template: a choice needs columns choice1, choice2, ... or a list in choices; present: {', '.join(columns)}"
            )
    needed = (*names, *(options or (("choices",) if task == "choice" else ())))
    labels = tuple(Label((spelling(name),), str(word).strip()) for name, word in words.items())
    return Template("template", task, text, labels=labels, options=options, columns=needed)


def with_words(template: Template, words: dict[str, Any]) -> Template:
    """The template with other words for its labels. Raises InputError for a label that it does not have."""
    if not words or not template.labels:
        return template
    found = {}
    for name, word in words.items():
        label = next((label for label in template.labels if spelling(name) in label.names), None)
        if label is None:
            known = ", ".join(label.names[0] for label in template.labels)
            raise InputError(f"task.words: {template.name} has no label {name!r}; labels: {known}")
        found[label.names] = str(word).strip()
    missing = [label.names[0] for label in template.labels if label.names not in found]
    if missing:
        raise InputError(f"task.words: no word for {', '.join(missing)}; give one for every label")
    return replace(template, labels=tuple(Label(label.names, found[label.names]) for label in template.labels))


def spelling(value: object) -> str:
    """A label as text: true and false in lower case, whole numbers without a point.

    >>> spelling(True), spelling(1.0), spelling(" Yes ")
    ('true', '1', 'Yes')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _parse(text: str, gap: str, name: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The pieces of a template, (`text` | `column` | `gap`, content), and its columns in their order."""
    pieces: list[tuple[str, str]] = []
    names: list[str] = []
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as fault:
        raise InputError(f"task.template: {text!r}: {fault}; write {{{{ and }}}} for braces") from None
    for literal, column, spec, conversion in parsed:
        if literal:
            pieces.append(("text", literal))
        if column is None:
            continue
        if spec or conversion or not column.replace("_", "a").replace("-", "a").isalnum():
            raise InputError(f"task.template: {{{column}}} is no column name; write {{column}}")
        if column == gap:
            pieces.append(("gap", ""))
        else:
            pieces.append(("column", column))
            names += [column] if column not in names else []
    gaps = sum(kind == "gap" for kind, _ in pieces)
    if gaps != 1:
        raise InputError(
            f"task.template: {name} needs {{{gap}}} once, where the answer stands, found {gaps} times in {text!r}"
        )
    return pieces, names


def _question(row: Row) -> Row:
    """BoolQ's question with a capital and a question mark."""
    question = str(row["question"]).strip()
    question = question if question.endswith("?") else question + "?"
    return {**row, "question": question[:1].upper() + question[1:]}


def _cause(row: Row) -> Row:
    """COPA: the premise without its full stop, so or because, the answers beginning small (but not I)."""
    connector = "so" if str(row["question"]).strip() == "effect" else "because"
    answers = {}
    for name in ("choice1", "choice2"):
        text = str(row[name]).strip()
        answers[name] = (
            text if text.split(" ")[0] in ("I", "I'm", "I'd", "I'll", "I've") else text[:1].lower() + text[1:]
        )
    return {**row, **answers, "premise": str(row["premise"]).strip().removesuffix("."), "connector": connector}


_PAIR = {"sentence1": "premise", "sentence2": "hypothesis"}

BUILT_IN: dict[str, Template] = {
    found.name: found
    for found in (
        Template(
            "sst2", "classify", "{sentence} It was {label}", "{sentence} It was {label}.",
            (Label(("0", "negative"), "terrible"), Label(("1", "positive"), "great")), {"text": "sentence"},
            columns=("sentence",),
        ),
        Template(
            "rte", "classify", '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{label}',
            "{premise}? {label}, {hypothesis}",
            (Label(("entailment", "0"), "Yes"), Label(("not_entailment", "1"), "No")), _PAIR,
            columns=("premise", "hypothesis"),
        ),
        Template(
            "boolq", "classify", "{passage} {question} {label}", "",
            (Label(("false", "0", "False"), "No"), Label(("true", "1", "True"), "Yes")), {}, _question,
            columns=("passage", "question"),
        ),
        Template(
            "cb", "classify", 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n{label}',
            "{premise}? {label}, {hypothesis}",
            (Label(("entailment", "0"), "Yes"), Label(("contradiction", "1"), "No"), Label(("neutral", "2"), "Maybe")), _PAIR,
            columns=("premise", "hypothesis"),
        ),
        Template(
            "copa", "choice", "{premise} {connector} {choice}", "", (), {}, _cause, ("choice1", "choice2"),
            ("premise", "question", "choice1", "choice2"),
        ),
    )
}  # fmt: skip


def choose(
    wanted: str | None, task: TaskName, words: dict[str, Any], rows: list[Row], label_column: str, source: str
) -> Template:
    """The template that the settings ask for, or the built-in one that fits columns and labels of the rows.

    Raises:
        InputError: a name that is none, a template of another task; none given, and none or several fit.
    """
    columns = list(rows[0])
    if wanted is not None and "{" in wanted:
        return own(wanted, task, words, columns)
    names = [name for name, template in BUILT_IN.items() if template.task == task]
    if wanted is not None:
        if wanted not in BUILT_IN:
            raise InputError(
                f"task.template: {wanted!r} is unknown{nearest(wanted, names)}; built in for {task}: {', '.join(names)}; or a text with "
                f'{{{GAP[task]}}}, e.g. "{{sentence}} It was {{{GAP[task]}}}"'
            )
        found = BUILT_IN[wanted]
        if found.task != task:
            raise InputError(f"task.template: {wanted} is for the task {found.task}, not {task}")
        return with_words(found, words)
    spellings = {spelling(row.get(label_column)) for row in rows}
    fitting = []
    for name in names:
        template = BUILT_IN[name]
        known = {known for label in template.labels for known in label.names}
        if not template.missing(rows[0]) and (task == "choice" or spellings <= known):
            fitting.append(name)
    named = [name for name in fitting if name in source.lower().replace("-", "").replace("_", "")]
    if len(named) == 1:
        fitting = named
    if len(fitting) != 1:
        what = f"{', '.join(fitting)} all fit" if fitting else "no built-in template fits"
        raise InputError(
            f"task.template: {what} the columns {', '.join(columns)} (labels {', '.join(sorted(spellings)[:6])}); give one of "
            f'{", ".join(names)}, or a text such as "{{{columns[0]}}} It was {{{GAP[task]}}}"'
        )
    return with_words(BUILT_IN[fitting[0]], words)
