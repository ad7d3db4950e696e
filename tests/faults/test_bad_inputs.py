"""Table F through both doors: the command line and `train(config)` say the same one line, and nothing is written.

Rows that only the command line can get wrong are in tests/cli/test_cli_bad_input.py; bad files of text, tables and tokenizers, one by one,
in tests/train/test_sources_bad.py, test_tasks.py and test_tokenizer.py.
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_runs import config, corpus, model

from tare.cli.flags import FLAGS
from tare.cli.main import main
from tare.core.errors import CheckpointError, DoesNotFit, InputError
from tare.train.configfile import build, flag
from tare.train.loop import train

SHORT = {path: name for name, path in FLAGS.items()}
BASE = {
    "model.name": "{model}", "data.source": "{corpus}", "data.seq": "32", "train.batch": "2", "train.steps": "2", "run.device": "cpu",
    "run.threads": "1", "run.out": "{out}", "method.key": "adamw",
}  # fmt: skip
ROWS = "{f}/rows.jsonl"
TASK = {"task.name": "classify", "data.source": ROWS}
ERRORS = {2: InputError, 3: DoesNotFit, 4: CheckpointError}

# What is changed of BASE, the kind of error (2 input, 3 does not fit, 4 checkpoint), and what its line says.
TABLE: dict[str, tuple[dict[str, str], int, str]] = {
    # method
    "unknown method": ({"method.key": "adam"}, 2, r"method: 'adam' is unknown.*known: adamw"),
    "option of another method": ({"method.options.update_gap": "5"}, 2, r"method 'adamw' has no option 'update_gap'"),
    "nothing matched": ({"method.key": "galore", "method.options.targets": "conv*"}, 2, r"'conv\*' matches no parameter"),
    "beta of 1": ({"method.options.betas": "[1.0, 0.9]"}, 2, r"beta"),
    "negative eps": ({"method.options.eps": "-1"}, 2, r"eps"),
    "momentum as text": ({"method.options.betas": "fast"}, 2, r"betas"),
    "moment in bits": ({"method.storage.moment": "int2"}, 2, r"'int2' is not one of fp32, bf16, int8"),
    "weights in bits with bf16": ({"method.storage.weight": "split24"}, 2, r"split24"),
    "release with its clipping": ({"method.release": "true", "train.clip": "1.0"}, 2, r"train\.clip: method\.release frees"),
    "no gradient": ({**TASK, "task.objective": "accuracy"}, 2, r"task\.objective: accuracy has no gradient.*mezo"),
    "quantised for gradients": ({"model.quantize": "int4"}, 2, r"model\.quantize"),
    # model
    "no such model": ({"model.name": "{f}/none"}, 2, r"model .*none.*named models: llama-tiny"),
    "pictures for text": (
        {"model.name": "{f}/encoder", "model.tokenizer": "{f}/tokenizer.json"}, 2, r"encoder.*no causal language model",
    ),
    "a shard that is not there": ({"model.name": "{f}/shards"}, 2, r"index\.json: names 'absent\.safetensors', which is not in the folder"),
    "a weight of another shape": ({"model.name": "{f}/shape"}, 2, r"weight .*up_proj\.weight is \[171, 64\] there and \[172, 64\]"),
    "a weight that is missing": ({"model.name": "{f}/missing"}, 2, r"missing: missing weight"),
    "a weight that is NaN": ({"model.name": "{f}/nan"}, 2, r"nan: weight .* holds NaN or infinite values"),
    "torn weights": ({"model.name": "{f}/torn"}, 2, r"torn: the weights cannot be read"),
    "a base quantised elsewhere": ({"model.name": "{f}/quantised"}, 2, r"quantised"),
    "longer than the model": ({"data.seq": "65"}, 2, r"(data\.)?seq.*65 .*64 positions"),
    "a vocabulary too small": ({"model.tokenizer": "{f}/tokenizer.json", "model.name": "{f}/small"}, 2, r"tokenizer: .*has \d+ ids.*is 10"),
    # data
    "no such data": ({"data.source": "{f}/none.txt"}, 2, r"data: .*none\.txt' does not exist; allowed"),
    "one sentence": ({"data.source": "{f}/one.txt"}, 2, r"data: "),
    "fewer than a batch": ({"data.source": "{f}/few.txt", "train.batch": "512"}, 2, r"fewer than one batch of 512.*train\.batch to \d+"),
    "noise": ({"data.source": "{f}/noise.txt"}, 2, r"noise\.txt:1: not UTF-8 text"),
    "a bad line": ({"data.source": "{f}/bad.jsonl"}, 2, r"bad\.jsonl:2: malformed JSON"),
    "another column": ({"data.text_column": "body"}, 2, r"corpus\.jsonl:1: no column 'body'; present: text; set data\.text_column"),
    "bad evaluation data": ({"data.eval_source": "{f}/bad.jsonl"}, 2, r"bad\.jsonl:2: malformed JSON"),
    "text for a task": ({"task.name": "classify"}, 2, r"corpus\.jsonl"),
    "no template for the rows": ({**TASK, "data.source": "{f}/odd.jsonl"}, 2, r"template"),
    "a label without a word": ({**TASK, "task.template": "sst2", "data.source": "{f}/label.jsonl"}, 2, r"label\.jsonl:2: label '7'"),
    "a row without its label": ({**TASK, "task.template": "sst2", "data.source": "{f}/bare.jsonl"}, 2, r"'label' is missing"),
    "more shots than rows": ({**TASK, "task.template": "sst2", "task.shots": "500"}, 2, r"task\.shots: 500 of each class"),
    # output
    "a file in its place": ({"run.out": "{f}/one.txt"}, 2, r"run\.out: .*one\.txt is a file; give a folder"),
    "a folder of others": ({"run.out": "{f}/encoder"}, 2, r"run\.out: .*encoder is not empty; resume the run in it"),
    "nothing to resume": ({"run.resume": "true"}, 4, r"run\.resume: there is no run in"),
    "no place to write": ({"run.out": "/proc/tare/run"}, 2, r"run\.out: /proc/tare/run cannot be written.*choose another folder"),
    # device and budget
    "no such device": ({"run.device": "cuda:7"}, 2, r"run\.device|--device"),
    "a budget below all": ({"run.budget": "10KiB"}, 3, r"10\.00 KiB.*needs .*least that is possible"),
    "a budget too small": ({"run.budget": "2300KiB", "train.batch": "8"}, 3, r"2\.25 MiB.*smallest change that fits: --method adamw --"),
    # numbers
    "a rate of NaN": ({"method.lr": "nan"}, 2, r"expected a number > 0, or none, got"),
    "spikes of nothing": ({"train.spike": "0"}, 2, r"train\.spike: expected a number > 0, or none, got 0"),
    "no patience": ({"run.patience": "-1"}, 2, r"run\.patience: expected a number >= 0, got -1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and model folders that are wrong, each in its own way."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # as the command does by its environment, before the first import

    place = tmp_path_factory.mktemp("wrong")
    row = lambda **cells: json.dumps(cells) + "\n"  # noqa: E731
    texts = {
        "one.txt": "a b c.\n",
        "few.txt": "the cat sat on the mat. " * 90 + "\n\n" + "it rains. " * 90,
        "bad.jsonl": '{"text": "one"}\n{"text": \n',
        "odd.jsonl": row(a="x", label=1) * 9,
        "rows.jsonl": "".join(row(sentence=f"it is {n}", label=n % 2) for n in range(40)),
        "label.jsonl": row(sentence="x", label=0) + row(sentence="y", label=7),
        "bare.jsonl": row(sentence="x") + row(sentence="y"),
    }
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "noise.txt").write_bytes(bytes(range(128, 256)) * 9)
    (place / "encoder").mkdir()
    (place / "encoder" / "config.json").write_text('{"model_type": "vit"}')
    train(config(place / "run", steps=1))
    good = place / "run" / "model"
    shutil.copy(good / "tokenizer.json", place)
    tensors = load_file(good / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = {
        "shape": {**tensors, name: tensors[name][:-1].contiguous()},
        "missing": {key: value for key, value in tensors.items() if key != name},
        "nan": {**tensors, name: torch.full_like(tensors[name], torch.inf)},
    }
    for kind in ("shape", "missing", "nan", "torn", "shards", "small", "quantised"):
        shutil.copytree(good, place / kind)
        weights = place / kind / "model.safetensors"
        if kind in wrong:
            save_file(wrong[kind], weights, {"format": "pt"})
        elif kind == "torn":
            weights.write_bytes(weights.read_bytes()[:-99])
        else:
            weights.unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "absent.safetensors"}}
    (place / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    for kind, change in (
        ("small", {"vocab_size": 10}),
        ("quantised", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ):
        about = json.loads((place / kind / "config.json").read_text())
        (place / kind / "config.json").write_text(json.dumps({**about, **change}))
    save_file(tensors, place / "quantised" / "model.safetensors", {"format": "pt"})
    return place


def snapshot(place: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size if path.is_file() else 0 for path in place.rglob("*")}


@pytest.fixture
def given(files: Path, tmp_path: Path) -> Callable[[dict[str, str]], dict[str, str]]:
    names = {"f": files, "model": model(), "corpus": corpus(), "out": tmp_path / "new" / "run"}
    return lambda changes: {path: value.format(**names) for path, value in {**BASE, **changes}.items()}


@pytest.mark.parametrize("row", TABLE)
def test_both_doors_say_the_same(row: str, given: Any, files: Path, tmp_path: Path) -> None:
    changes, kind, pattern = TABLE[row]
    settings = given(changes)
    before = snapshot(files)
    argv = [word for path, value in settings.items() for word in (f"--{path}", value)]
    err, out, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main(["train", *argv])
    os.environ.clear()
    os.environ.update(environment)
    said = err.getvalue()
    assert code == min(kind, 3) if kind != 4 else 2, said
    assert out.getvalue() == ""
    assert said.count("\n") == 1, said
    assert len(said) < 900, said
    assert re.search(pattern, said), said
    with pytest.raises(ERRORS[kind]) as caught:
        train(build([flag(path, value, f"--{path}") for path, value in settings.items()]))
    assert "\n" not in str(caught.value)
    assert re.search(pattern, " ".join(str(caught.value).split())), caught.value
    assert snapshot(files) == before
    assert not (tmp_path / "new").exists()


def test_half_of_what_a_launcher_gives_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        InputError, match=r"RANK=1, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing; start with torchrun"
    ):
        train(config(tmp_path / "run", steps=1))
    assert not (tmp_path / "run").exists()


def test_evaluating_on_training_data_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="evaluation reads training data"):
        train(config(tmp_path / "run", steps=1, eval_source=corpus()))
