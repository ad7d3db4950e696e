"""Methods that evaluate losses are for loops of one's own: the commands say so in one line."""

from typing import Any

import pytest


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "llama-tiny", "--methods", "adamw,mezo"),
        ("train", "--model", "llama-tiny", "--method", "mezo", "--steps", "1"),
        ("bench", "step", "--methods", "mezo", "--no-peers"),
    ],
)
def test_forward_methods_are_refused_in_one_line(
    tare: Any, tmp_path: Any, monkeypatch: Any, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = tare(*words)
    assert shown.code == 2
    assert "method 'mezo' evaluates losses in opt.step(closure)" in shown.err
    assert len(shown.err.strip().splitlines()) == 1
