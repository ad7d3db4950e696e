"""Methods that evaluate losses on the command line: planned, trained and evaluated; what measures gradients refuses them in one line."""

import json
from typing import Any


def test_the_bench_of_steps_refuses_them_in_one_line(tare: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shown = tare("bench", "step", "--methods", "mezo", "--no-peers")
    assert shown.code == 2
    assert "method 'mezo' evaluates losses in opt.step(closure)" in shown.err
    assert len(shown.err.strip().splitlines()) == 1


def test_plan(tare: Any) -> None:
    shown = tare("plan", "llama-tiny", "--methods", "adamw,mezo", "--batch", 2, "--seq", 32, "--json")
    rows = {row["method"]: row for row in json.loads(shown.out)["rows"]}
    assert shown.code == 0
    assert rows["mezo"]["state"] == rows["mezo"]["gradients"] == 0
    assert rows["mezo"]["peak"] < rows["adamw"]["peak"] / 3
    assert rows["mezo"]["remark"] == "2 forward passes a step"


def test_text_is_trained_and_evaluated(tare: Any, job: list[str], tmp_path: Any) -> None:
    out = tmp_path / "run"
    shown = tare("train", *job, "--out", out, "--method", "mezo", "--steps", 3, "--seq", 32, "--lr", 1e-4, "--json")
    document = json.loads(shown.out)
    assert (shown.code, document["forwards"], document["state_bytes"]) == (0, 6, 0)
    assert "dropout off" in shown.err
    assert (out / "run.seeds").is_file()
    assert document["config"]["train"]["clip"] is None
    again = tare("eval", out, "--tokens", 300, "--json")
    assert json.loads(again.out)["loss"] == document["loss"]


def test_a_task_is_trained_evaluated_and_resumed(tare: Any, tiny: Any, tmp_path: Any) -> None:
    rows = [{"sentence": f"row {n} is {'good' if n % 2 else 'bad'}", "label": n % 2} for n in range(24)]
    data, out = tmp_path / "sst2.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--model", tiny, "--data", data, "--task", "classify", "--method", "mezo", "--batch", 4, "--seq", 32)
    shown = tare("train", *words, "--out", out, "--steps", 2, "--json")
    document = json.loads(shown.out)
    assert (shown.code, document["forwards"], set(document["zero_shot"])) == (0, 4, {"accuracy", "f1"})
    assert "step 0 (zero-shot): evaluation loss" in shown.err
    found = json.loads(tare("eval", out, "--json").out)
    assert (found["accuracy"], found["template"]) == (document["scores"]["accuracy"], "sst2")
    assert found["loss"] == document["loss"]
    everything = json.loads(tare("eval", out / "model", "--task", "classify", "--data", data, "--json").out)
    assert everything["examples"] == 24
    again = tare("train", "--resume", "--out", out, "--steps", 3, "--json")
    assert json.loads(again.out)["forwards"] == 6
    for argv, said in (
        (("--task", "sort"), "--task: expected one of lm, classify, choice"),
        (("--objective", "accuracy", "--method", "adamw"), "accuracy has no gradient, and adamw steps with gradients"),
        (("--words", "{2: x}"), "sst2 has no label '2'"),
        (("--data", "stdlib"), "raw text"),
    ):
        given = dict(zip(words[::2], words[1::2], strict=True)) | dict(zip(argv[::2], argv[1::2], strict=True))
        refused = tare("train", *(word for pair in given.items() for word in pair), "--out", tmp_path / "no")
        assert refused.code == 2
        assert said in refused.err
        assert len(refused.err.strip().splitlines()) == 1
        assert not (tmp_path / "no").exists()
