"""What the tests of tasks share: a table with a rule in it, and tiny models of each kind with tokenizers of its words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tare.train.config import DataConfig, MethodConfig, ModelConfig, RunConfig, RunSection, TaskConfig, TrainConfig

GOOD, BAD = ("fine", "lovely", "funny", "clever"), ("dull", "awful", "boring", "silly")
THINGS = ("film", "plot", "cast", "music", "story")


def table(path: Path, count: int = 60) -> str:
    """Rows with a sentence and a label that one of its words decides."""
    rows = []
    for number in range(count):
        words = (GOOD, BAD)[number % 2]
        text = (
            f"the {THINGS[number % 5]} is {words[number % 4]} and the {THINGS[number % 3]} is {words[number // 4 % 4]}"
        )
        rows.append({"sentence": f"{text} {number}", "label": 1 - number % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def copa(path: Path, count: int = 12) -> str:
    rows = [
        {
            "premise": f"The {THINGS[n % 5]} was {GOOD[n % 4]}.", "choice1": f"I liked the {THINGS[n % 5]}.", "choice2": "They left it.",
            "question": ("effect", "cause")[n % 2], "label": n % 2, "idx": n,
        }
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer(folder: Path, special: bool = True) -> Any:
    """A tokenizer that splits at spaces and marks, with a mask, a start and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "is",
        "and",
        "it",
        "It",
        "was",
        "terrible",
        "great",
        ".",
        "good",
        "bad",
    ]
    words += [*GOOD, *BAD, *THINGS, *map(str, range(60))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    found.save_pretrained(folder)
    return found


def bert(folder: Path, architecture: str, **more: Any) -> str:
    """A BERT of some thousand fresh weights, saved with its tokenizer."""
    import torch
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **shape, vocab_size=120, max_position_embeddings=48, hidden_dropout_prob=0.5, **more
    )
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def llama(folder: Path, weights: bool = False) -> str:
    """A LLaMA of 20 thousand weights: only its config, or saved with fresh weights and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=300, max_position_embeddings=64)
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer(folder, special=False)
    return str(folder)


def job(out: Path, model: str, data: str, method: str = "mezo", **changes: Any) -> RunConfig:
    """A run of a second. `changes`: settings of any section, by their bare names; `task` for `task.name`."""
    base = RunConfig(
        ModelConfig(model),
        DataConfig(data, seq=32, eval_fraction=0.2),
        MethodConfig(method, lr=1e-3),
        TrainConfig(steps=4, batch=4),
        RunSection(str(out), device="cpu", threads=1, checkpoint_every=2, eval_every=2),
        TaskConfig(changes.pop("task", "classify")),
    )
    for name, value in changes.items():
        owner = next(
            part for part in ("task", "data", "train", "run", "method", "model") if hasattr(getattr(base, part), name)
        )
        base = replace(base, **{owner: replace(getattr(base, owner), **{name: value})})
    return base
