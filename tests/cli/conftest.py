"""A command line inside this process: what it printed, how it ended; and something small to train."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tare.cli.main import main

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a machine takes decides nothing here."""
    monkeypatch.setattr("tare.cli.waiting.PATIENCE", 1e6)


@pytest.fixture
def tare() -> Iterator[Callable[..., Outcome]]:
    """Runs `tare` with the arguments. `main` sets environment variables and the warning hook; they are put back."""
    environment, hook = dict(os.environ), warnings.showwarning

    def call(*argv: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in argv])
        return Outcome(code, out.getvalue(), err.getvalue())

    yield call
    os.environ.clear()
    os.environ.update(environment)
    warnings.showwarning = hook


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text with structure that can be learned, in a dozen documents."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        lines = (f"{number} times {other} is {number * other}." for other in range(200))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a LLaMA of 30 thousand parameters."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def job(text: Path, tiny: Path) -> list[str]:
    """The flags of a run of a second; `--out`, `--method` and `--steps` are to be added."""
    words = f"--model {tiny} --data {text} --batch 2 --eval-every 2 --checkpoint-every 2 --data.eval_tokens 300"
    return words.split()
