"""Tasks: templates, rows and words; scores against a slow twin; what is wrong with data or words in one line."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from task_models import bert, copa, job, llama, table, tokenizer
from torch.nn import functional as F

from tare.core.errors import InputError
from tare.plan.models import build_model
from tare.train.config import TaskConfig
from tare.train.session import check_task
from tare.train.tasks.data import open_task
from tare.train.tasks.encoding import Encoder
from tare.train.tasks.rows import Table, few, held_out, labels_of, read_table
from tare.train.tasks.scoring import collate, loss_of, macro_f1, scores
from tare.train.tasks.templates import BUILT_IN, Label, Template, choose

# The prompts as arXiv 2305.17333 prints them: row -> text with the answers of the model in place.
PROMPTS = [
    ("sst2", {"sentence": "a charming journey . "}, ["a charming journey . It was terrible", "a charming journey . It was great"]),
    (
        "rte", {"sentence1": "It rained.", "sentence2": "It was wet."},
        [f'It rained.\nDoes this mean that "It was wet." is true? Yes or No?\n{word}' for word in ("Yes", "No")],
    ),
    ("boolq", {"passage": "Ice melts.", "question": "does ice melt"}, [f"Ice melts. Does ice melt? {w}" for w in ("No", "Yes")]),
    (
        "cb", {"premise": "He left.", "hypothesis": "He was gone"},
        [f'Suppose He left. Can we infer that "He was gone"? Yes, No, or Maybe?\n{w}' for w in ("Yes", "No", "Maybe")],
    ),
    (
        "copa", {"premise": "I ironed my shirt.", "choice1": "It was clean.", "choice2": "I sat.", "question": "cause"},
        ["I ironed my shirt because it was clean.", "I ironed my shirt because I sat."],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "texts"), PROMPTS, ids=[name for name, *_ in PROMPTS])
def test_built_in_prompts(name: str, row: dict[str, str], texts: list[str]) -> None:
    template = BUILT_IN[name]
    answers = [label.word for label in template.labels] or template.answers(row)
    text = template.fill(row)
    assert [text.before + answer + text.after for answer in answers] == texts


def test_masked_prompts() -> None:
    text = BUILT_IN["rte"].fill({"premise": "A", "hypothesis": "B"}, masked=True)
    assert (text.before, text.after) == ("A? ", ", B")
    assert BUILT_IN["sst2"].fill({"sentence": "A"}, masked=True).after == "."


def test_the_template_is_found_by_columns_and_labels() -> None:
    pair = {"premise": "a", "hypothesis": "b"}
    assert choose(None, "classify", {}, [{**pair, "label": "neutral"}], "label", "x").name == "cb"
    assert choose(None, "classify", {}, [{**pair, "label": "not_entailment"}], "label", "x").name == "rte"
    assert choose(None, "classify", {}, [{**pair, "label": 0}], "label", "data/RTE/dev.tsv").name == "rte"
    assert choose("boolq", "classify", {"true": "yes", "false": "no"}, [{}], "label", "x").labels[1].word == "yes"
    own = choose("{a} is {label}!", "classify", {"0": "bad", "1": "good"}, [{"a": 1}], "label", "x")
    assert (own.columns, own.fill({"a": "It"}).after) == (("a",), "!")


def test_tables_in_every_form(tmp_path: Path) -> None:
    import lzma

    rows = [{"sentence": 'he said "no', "label": "0"}, {"sentence": "a, b", "label": "1"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nhe said "no\t0\na, b\t1\n')
    (tmp_path / "a.csv").write_text('sentence,label\n"he said ""no",0\n"a, b",1\n')
    assert all(read_table(str(path), "classify").rows == rows for path in tmp_path.iterdir())


def test_few_rows_of_each_class_depend_on_content_and_seed(tmp_path: Path) -> None:
    whole = read_table(table(tmp_path / "t.jsonl"), "classify")
    gold = labels_of(whole, BUILT_IN["sst2"], "label")
    chosen = few(whole, gold, 8, 0, True, ["0", "1"])
    assert sum(gold[n] for n in chosen) == 8
    assert len(chosen) == 16
    assert few(whole, gold, 8, 1, True, ["0", "1"]) != chosen
    order = random.Random(0).sample(range(60), 60)
    moved = Table("x", [whole.rows[n] for n in order], [whole.places[n] for n in order])
    again = few(moved, [gold[n] for n in order], 8, 0, True, ["0", "1"])
    assert sorted(moved.rows[n]["sentence"] for n in again) == sorted(whole.rows[n]["sentence"] for n in chosen)
    train, held = held_out(whole, 0.2)
    assert (len(held), sorted(train + held)) == (12, list(range(60)))


def twin(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The mean log-likelihood of an answer, by itself and without padding, one token after the other."""
    ids = torch.tensor([prompt + answer])
    logp = F.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    return float(sum(logp[len(prompt) + n - 1, token] for n, token in enumerate(answer)) / len(answer))


@pytest.mark.parametrize("long", [False, True], ids=["one token", "several tokens"])
def test_causal_scores_are_length_averaged_likelihoods(long: bool, tmp_path: Path) -> None:
    model = build_model(llama(tmp_path / "m", weights=True)).eval()
    words = tokenizer(tmp_path / "m", special=False)
    labels = (
        Label(("0",), "terrible film" if long else "terrible"),
        Label(("1",), "great and clever . It" if long else "great"),
    )
    template = replace(BUILT_IN["sst2"], labels=labels)
    rows = read_table(table(tmp_path / "t.jsonl", 6), "classify")
    gold = labels_of(rows, template, "label")
    examples = Encoder(template, words, "causal", 32).encode(rows, gold)
    assert all(len(example.sequences) == (2 if long else 1) for example in examples)
    batch = collate(examples, 0)
    with torch.no_grad():
        found = scores(model, "causal", batch)
        wanted = [
            [
                twin(model, words(row["sentence"] + " It was").input_ids, words(label.word).input_ids)
                for label in labels
            ]
            for row in rows.rows
        ]  # fmt: skip
        assert torch.allclose(found, torch.tensor(wanted), atol=1e-5)
        assert torch.allclose(
            loss_of(found, batch), F.cross_entropy(torch.tensor(wanted), torch.tensor(gold)), atol=1e-5
        )
        model.forward = lambda input_ids, attention_mask, use_cache: type(model).forward(
            model, input_ids, attention_mask
        )
        assert torch.allclose(scores(model, "causal", batch), found, atol=1e-6)  # a model that cannot leave logits out


def test_a_choice_is_taught_by_the_right_answer_alone(tmp_path: Path) -> None:
    model = build_model(llama(tmp_path / "m")).eval()
    task = open_task(
        job(tmp_path / "r", llama(tmp_path / "m"), copa(tmp_path / "c.jsonl"), task="choice", template="copa")
    )
    chosen = task.train[:3]
    alone, both = collate(chosen, 0, only_gold=True), collate(chosen, 0)
    assert (len(alone.ids), len(both.ids)) == (3, 6)
    with torch.no_grad():
        found = scores(model, "causal", both)
        right = found.gather(1, both.gold[:, None])[:, 0]
        assert torch.allclose(scores(model, "causal", alone)[:, 0], right, atol=1e-6)
        counts = both.counts.gather(1, both.gold[:, None])[:, 0]
        assert torch.allclose(
            loss_of(scores(model, "causal", alone), alone), -(right * counts).sum() / counts.sum(), atol=1e-6
        )


def test_masked_scores_stand_at_the_mask(tmp_path: Path) -> None:
    model = build_model(bert(tmp_path / "m", "BertForMaskedLM"), kind="masked").eval()
    words = tokenizer(tmp_path / "m")
    rows = read_table(table(tmp_path / "t.jsonl", 5), "classify")
    encode = Encoder(BUILT_IN["sst2"], words, "masked", 32)
    examples = encode.encode(rows, labels_of(rows, BUILT_IN["sst2"], "label"))
    ids = words(rows.rows[0]["sentence"] + " It was [MASK] .").input_ids
    assert list(examples[0].sequences[0]) == ids
    with torch.no_grad():
        logp = F.log_softmax(model(torch.tensor([ids])).logits[0, ids.index(words.mask_token_id)], dim=-1)
        wanted = logp[words.convert_tokens_to_ids(["terrible", "great"])]
        assert torch.allclose(scores(model, "masked", collate(examples, 0))[0], wanted, atol=1e-5)


def test_long_rows_are_cut_on_the_left(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    rows = Table("x", [{"sentence": "the " * 40 + "film", "label": 1}], ["x:1"])
    for kind in ("causal", "masked"):
        (example,) = Encoder(BUILT_IN["sst2"], words, kind, 16).encode(rows, [1])  # type: ignore[arg-type]
        assert example.cut
        assert len(example.sequences[0]) == 16
        assert example.sequences[0][0] == words.cls_token_id
    assert words.mask_token_id in example.sequences[0]


def test_f1_against_the_definition() -> None:
    predicted, gold = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 2, 2, 1, 1])
    assert macro_f1(predicted, gold, 3) == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert macro_f1(gold, gold, 3) == 1.0
    assert macro_f1(torch.zeros(4), torch.ones(4), 2) == 0.0


def refused(tmp_path: Path, said: str, /, **changes: Any) -> None:
    data = changes.pop("data", None) or table(tmp_path / "t.jsonl", 20)
    model = changes.pop("model", None) or llama(tmp_path / "m")

    def attempt() -> None:
        config = job(tmp_path / "r", model, data, **changes)
        check_task(config)
        open_task(config)

    with pytest.raises(InputError) as caught:
        attempt()
    assert said in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_data_is_refused_in_one_line(tmp_path: Path) -> None:
    some = [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}]
    (tmp_path / "raw.txt").write_text("text")
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "bad.tsv").write_text("sentence\tlabel\na\n")
    for words, changes in (
        ("raw text", {"data": str(tmp_path / "raw.txt")}),
        ("raw text", {"data": "stdlib"}),
        ("does not exist", {"data": str(tmp_path / "nothing.jsonl")}),
        ("holds no rows", {"data": str(tmp_path / "none.jsonl")}),
        ("holds no rows", {"eval_source": str(tmp_path / "none.jsonl")}),
        ("1 cells, and 2 columns", {"data": str(tmp_path / "bad.tsv")}),
        ("column 'label' is missing; present: sentence", {"data": write(tmp_path / "a.jsonl", {"sentence": "a"})}),
        ("column 'label' is missing", {"data": write(tmp_path / "b.jsonl", *some, {"sentence": "c"})}),
        ("no column 'passage', 'question'", {"template": "boolq"}),
        ("present: label, text_", {"data": write(tmp_path / "c.jsonl", {"label": 0, "text_": ""}), "template": "sst2"}),
        ("label '7' has no word in sst2; labels: 0, 1", {
            "data": write(tmp_path / "d.jsonl", *some, {"sentence": "x", "label": 7}), "template": "sst2",
        }),
        ("no built-in template fits the columns a, label", {"data": write(tmp_path / "e.jsonl", {"a": "x", "label": 0})}),
        ("too few different rows", {"data": write(tmp_path / "f.jsonl", some[0], some[0])}),
        ("fewer than one batch of 400", {"batch": 400}),
        ("8 of each class", {"shots": 8, "data": write(tmp_path / "g.jsonl", *some, *({**r, "n": n} for n in range(4) for r in some))}),
    ):  # fmt: skip
        refused(tmp_path, words, **changes)


def test_bad_templates_and_words_are_refused_in_one_line(tmp_path: Path) -> None:
    masked = bert(tmp_path / "bert", "BertForMaskedLM")
    causal = llama(tmp_path / "words", weights=True)
    for words, changes in (
        ("'sst' is unknown (did you mean 'sst2'?)", {"template": "sst"}),
        ("copa is for the task choice", {"template": "copa"}),
        ("needs {label} once", {"template": "{sentence}"}),
        ("needs {label} once", {"template": "{sentence} {label} {label}"}),
        ("is no column name", {"template": "{sentence!r} {label}"}),
        ("some text before the answer", {"template": "{label}: {sentence}", "words": {"0": "bad", "1": "good"}, "model": causal}),
        ("task.words: missing", {"template": "{sentence} {label}"}),
        ("sst2 has no label '2'", {"words": {"2": "x"}}),
        ("no word for 1", {"words": {"0": "x"}}),
        ("'great' stands for two labels", {"words": {"0": "great", "1": "great"}, "model": causal}),
        ("'great film' and 'great' begin with the same tokens", {"words": {"0": "great", "1": "great film"}, "model": causal}),
        ("'great film' is 2 tokens", {"words": {"0": "bad", "1": "great film"}, "model": masked}),
        ("'wonderful' is unknown to this tokenizer", {"words": {"0": "bad", "1": "wonderful"}, "model": masked}),
        ("choice needs a causal model", {
            "task": "choice", "template": "copa", "model": masked, "data": copa(tmp_path / "c.jsonl"),
        }),
        ("f1 is for classify", {"task": "choice", "objective": "f1"}),
        ("task.words: is for classify", {"task": "choice", "words": {"0": "x"}}),
        ("task.template: is for the tasks", {"task": "lm", "template": "sst2"}),
        ("expected one of lm, classify, choice", {"task": "sort"}),
    ):  # fmt: skip
        refused(tmp_path, words, **changes)


def test_settings_have_plain_defaults() -> None:
    assert TaskConfig().name == "lm"
    assert isinstance(BUILT_IN["cb"], Template)
