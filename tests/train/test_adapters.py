"""Fine-tuning of adapters and of chosen leaves: trained, planned, resumed, saved as PEFT reads it, merged, evaluated, replayed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from task_models import bert, copa, job, llama, table

from tare.core.errors import CheckpointError, InputError
from tare.plan.models import build_model
from tare.train import loop, progress, session
from tare.train.adapter_layers import attach
from tare.train.adapters import AdapterConfig
from tare.train.config import RunConfig
from tare.train.matching import keep_matching
from tare.train.replaying import replay_folder

peft = pytest.importorskip("peft")


def adapted(config: RunConfig, kind: Any = "lora", **more: Any) -> RunConfig:
    return replace(config, adapter=AdapterConfig(kind, **more))


def files(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def data(tmp_path: Path, task: str = "classify") -> str:
    return copa(tmp_path / "t.jsonl") if task == "choice" else table(tmp_path / "t.jsonl", 30)


@pytest.mark.parametrize(
    ("kind", "method", "task"),
    [("lora", "galore", "classify"), ("lora", "mezo", "choice"), ("ia3", "mezo", "classify"), ("prefix", "mezo", "classify"),
     ("prefix", "adamw", "choice"), ("ia3", "adamw", "classify")],
)  # fmt: skip
def test_it_is_trained_planned_and_saved_as_peft_reads_it(kind: str, method: str, task: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "m", weights=True)
    more = {"options": {"scale": 1.0}, "rank": 4} if method == "galore" else {}
    done = loop.train(
        adapted(job(tmp_path / "r", base, data(tmp_path, task), method, task=task, steps=3, **more), kind)
    )
    saved = files(tmp_path / "r")
    fresh = attach(build_model(base), AdapterConfig(kind), "causal", 0)
    plain = peft.PeftModel.from_pretrained(build_model(base), str(done.out / "model"))
    job_ = session.build(session.resolve(done.config), {})
    trained = {name: p for name, p in job_.model.named_parameters() if p.requires_grad}
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trained.keys()
    mine = peft.get_peft_model_state_dict(plain)
    assert same({name: tensor.contiguous() for name, tensor in mine.items()}, saved)
    before = peft.get_peft_model_state_dict(fresh)
    assert before.keys() == saved.keys()
    assert any(not torch.equal(before[name], saved[name]) for name in saved)
    assert done.predicted["peak"] >= 0.95 * done.measured["peak"]
    assert done.predicted["weights"] == pytest.approx(done.measured["weights"], rel=0.01)
    assert done.measured["state"] == (0 if method == "mezo" else done.predicted["state"])
    assert json.loads((done.out / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == base


@pytest.mark.parametrize(("kind", "architecture"), [("classifier", "BertModel"), ("masked", "BertForMaskedLM")])
def test_encoders_too_and_a_classifiers_head_goes_with_it(kind: str, architecture: str, tmp_path: Path) -> None:
    """A head that the base lacks is trained and saved beside the factors; a pooler that the base has stays as it is."""
    base = bert(tmp_path / "m", architecture)
    done = loop.train(adapted(job(tmp_path / "r", base, data(tmp_path), "adamw", steps=3), targets="query, value"))
    saved = files(tmp_path / "r")
    heads = {name for name in saved if "lora_" not in name}
    assert heads == (
        {f"base_model.model.classifier.{part}" for part in ("weight", "bias")} if kind == "classifier" else set()
    )
    assert sum("lora_A" in name for name in saved) == 4
    assert done.predicted["peak"] >= 0.95 * done.measured["peak"]
    if kind == "classifier":
        plain = peft.PeftModel.from_pretrained(
            build_model(base, kind="classifier", labels=2, seed=77), str(done.out / "model")
        )
        head = plain.base_model.model.classifier.modules_to_save["default"]
        assert torch.equal(head.weight, saved["base_model.model.classifier.weight"])


@pytest.mark.parametrize("method", ["galore", "mezo"])
def test_a_run_that_broke_off_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    base, rows = llama(tmp_path / "m", weights=True), data(tmp_path)
    more: dict[str, Any] = {"rank": 4} if method == "galore" else {"options": {"rule": "adam", "eps": 1e-2}}

    def run(name: str, **how: Any) -> RunConfig:
        return adapted(job(tmp_path / name, base, rows, method, steps=5, **more, **how), dropout=0.3)

    heard: list[Any] = []
    loop.train(run("whole"), on_event=heard.append)
    notes = [event.text for event in heard if isinstance(event, progress.Note)]
    assert any(text.startswith("adapter lora: 1,024 of ") for text in notes)

    def fail(event: Any) -> None:
        if isinstance(event, progress.StepDone) and event.step == 5:
            raise OSError("the power is out")

    with pytest.raises(OSError, match="power"):
        loop.train(run("cut"), on_event=fail)
    loop.train(run("cut", resume=True))
    assert same(files(tmp_path / "cut"), files(tmp_path / "whole"))
    log = tmp_path / "whole" / "run.seeds"
    assert log.exists() == (method == "mezo")
    changed = adapted(run("cut", resume=True), rank=4)
    with pytest.raises(CheckpointError, match=r"adapter.rank: the run was started with 8, not 4"):
        loop.train(changed)
    if method == "mezo":
        assert (tmp_path / "cut" / "run.seeds").read_bytes() == log.read_bytes()
        done = replay_folder(log, Path(base), tmp_path / "again", adapter=AdapterConfig("lora"), seed=0)
        assert done.exact
        assert same(load_file(tmp_path / "again" / "adapter_model.safetensors"), files(tmp_path / "whole"))
        with pytest.raises(InputError, match="the run began from other weights"):
            replay_folder(log, Path(base), tmp_path / "no", adapter=AdapterConfig("lora"), seed=1)
        with pytest.raises(InputError, match="give the model that the run was of, adapters included"):
            replay_folder(log, Path(base), tmp_path / "no")


def test_merged_it_is_a_whole_model_that_says_the_same(tmp_path: Path) -> None:
    base, rows = llama(tmp_path / "m", weights=True), data(tmp_path)
    apart = loop.train(adapted(job(tmp_path / "a", base, rows, "adamw", steps=4, lr=1e-2)))
    whole = loop.train(adapted(job(tmp_path / "b", base, rows, "adamw", steps=4, lr=1e-2), merge=True))
    assert not (whole.out / "model" / "adapter_config.json").exists()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        merged = build_model(whole.out / "model").eval()(input_ids=ids).logits
        plain = peft.PeftModel.from_pretrained(build_model(base), str(apart.out / "model")).eval()(input_ids=ids).logits
        before = build_model(base).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-5)
    assert float((plain - before).abs().max()) > 1e-3
    assert whole.scores == apart.scores


def test_fresh_weights_are_saved_beside_their_adapter_and_both_are_evaluated(tmp_path: Path, capsys: Any) -> None:
    """Text, and a base that is in no folder: `base/` holds it."""
    import train_runs

    from tare.cli.main import main

    done = loop.train(adapted(train_runs.config(tmp_path / "r", "adamw", steps=3)))
    assert done.predicted["peak"] == pytest.approx(done.measured["peak"], rel=0.05)
    assert main(["eval", str(done.out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(done.loss, rel=1e-3)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(done.out / "model"))
    with torch.no_grad():
        tokens = torch.arange(20)[None]
        loss = auto.eval()(input_ids=tokens, labels=tokens).loss
        bare = build_model(done.config.model.name, seed=0).eval()(input_ids=tokens, labels=tokens).loss
    assert 0 < abs(float(loss - bare)) < 1e-2  # the base is the one that the run began from
    moved = (done.out / "model").rename(tmp_path / "elsewhere")
    few = ["--data", train_runs.corpus(), "--tokens", "500"]
    assert main(["eval", str(moved), *few, "--json"]) == 0
    capsys.readouterr()
    for path in (moved / "base").iterdir():
        path.unlink()
    (moved / "base").rmdir()
    assert main(["eval", str(moved), *few]) == 2
    assert "is no folder of a transformers model here" in capsys.readouterr().err


def test_a_task_is_evaluated_with_its_adapter(tmp_path: Path, capsys: Any) -> None:
    from tare.cli.main import main

    rows = data(tmp_path)
    for name, base in (
        ("causal", llama(tmp_path / "m", weights=True)),
        ("classifier", bert(tmp_path / "b", "BertModel")),
    ):
        done = loop.train(adapted(job(tmp_path / name, base, rows, "adamw", steps=6, lr=3e-2), targets="all-linear"))
        assert main(["eval", str(done.out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["accuracy"], found["f1"]) == (done.scores["accuracy"], done.scores["f1"])
        assert found["loss"] == pytest.approx(done.history[-1].get("loss", found["loss"]), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "match"), [("adamw", "layers.*.mlp, norm"), ("mezo", "lm_head"), ("badam", "self_attn")]
)
def test_only_the_leaves_that_match_are_trained(method: str, match: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "m", weights=True)
    done = loop.train(job(tmp_path / "r", base, data(tmp_path), method, steps=3, match=match))
    before, after = (load_file(place / "model.safetensors") for place in (Path(base), done.out / "model"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    wanted = {
        "adamw": {name for name in after if ".mlp." in name or "norm" in name},
        "mezo": {"lm_head.weight"}, "badam": {name for name in after if "self_attn" in name},
    }[method]  # fmt: skip
    assert moved == wanted
    assert done.predicted["peak"] >= 0.95 * done.measured["peak"]
    weights = checkpoint_state(done.out)
    assert method == "mezo" or sorted(weights) == sorted(wanted)


def checkpoint_state(out: Path) -> list[str]:
    """Names of the leaves that have state in the last checkpoint."""
    from tare.train import checkpoint

    snapshot = checkpoint.load_latest(out / "checkpoints")
    assert snapshot is not None
    groups = snapshot.optimizer["param_groups"]
    names = [name for group in groups for name in group["param_names"]]
    return [names[int(number)] for number, raw in snapshot.optimizer["state"].items() if raw.get("step")]


def test_patterns_are_paths_or_roles() -> None:
    model = build_model("llama-tiny")
    assert set(keep_matching(model, "layers.0.self_attn.*_proj.weight")) == {
        f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"
    }
    assert keep_matching(model, "head") == ["lm_head.weight"]
    assert all("norm" in name for name in keep_matching(model, "norm"))
    with pytest.raises(InputError, match=r"train.match: 'layer' matches no parameter \(did you mean 'layers'\?\)"):
        keep_matching(model, "layer")


@pytest.mark.parametrize(
    ("adapter", "more", "words"),
    [
        ({"kind": "lora", "targets": "qproj"}, {}, r"adapter.targets: 'qproj' matches no layer \(did you mean 'q_proj'\?\); its linear"),
        ({"kind": "lora", "targets": "norm"}, {}, r"adapter.targets: .*not supported.*; its linear layers are"),
        ({"kind": "lora"}, {"match": "mlp"}, r"train.match: an adapter is trained whole"),
        ({"kind": "lora"}, {"method": "q-galore"}, r"adapter.kind: q-galore steps int8 weights"),
        ({"kind": "lora"}, {"method": "qzo", "quantize": "int4"}, r"adapter.kind: is not for models in few bits"),
        ({"kind": "prefix"}, {"checkpointing": True}, r"model.checkpointing: recomputed layers get no keys"),
        ({}, {"match": " , "}, r"train.match: expected patterns of names"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(
    adapter: Any, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = dict(more)
    config = job(
        tmp_path / "r", llama(tmp_path / "m", weights=True), data(tmp_path), given.pop("method", "adamw"), **given
    )
    with pytest.raises(InputError, match=words) as caught:
        loop.train(replace(config, adapter=AdapterConfig(**adapter)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_settings_say_what_they_are_for() -> None:
    for given, words in (
        ({"rank": 4}, r"adapter.rank: there is no adapter; set adapter.kind \(--adapter lora\)"),
        ({"kind": "prefix", "rank": 4}, r"adapter.rank: is for lora; prefix has none"),
        ({"kind": "ia3", "dropout": 0.1}, r"adapter.dropout: is for lora; ia3 has none"),
        ({"kind": "prefix", "merge": True}, r"adapter.merge: is for lora and ia3; prefix has none"),
        ({"kind": "lora", "rank": 0}, r"adapter.rank: expected a whole number >= 1, or none, got 0"),
        ({"kind": "lora", "targets": ","}, r"adapter.targets: expected names of layers, separated by commas"),
        ({"kind": "dora"}, r"adapter.kind: expected one of lora, ia3, prefix, or none, got 'dora'"),
    ):
        with pytest.raises(InputError, match=words):
            AdapterConfig(**given)  # type: ignore[arg-type]


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    config = adapted(job(tmp_path / "r", llama(tmp_path / "m"), data(tmp_path), "adamw"))
    with pytest.raises(InputError, match=r'adapter.kind: PEFT is not installed; pip install "tare\[peft\]"'):
        loop.train(config)


PEAKS = [
    ("adamw", {"kind": "lora"}, {}), ("galore", {"kind": "lora", "targets": "all-linear"}, {"rank": 4}), ("mezo", {"kind": "lora"}, {}),
    ("adamw", {"kind": "ia3"}, {}), ("mezo", {"kind": "prefix"}, {}), ("adamw", {"kind": "prefix"}, {}), ("badam", {"kind": "lora"}, {}),
    ("adamw", {"kind": "lora", "dropout": 0.1}, {"precision": "bf16"}), ("mezo", {"kind": "lora"}, {"precision": "bf16"}),
    ("adamw", {"kind": "lora"}, {"release": True, "accumulate": 2, "clip": None}), ("adamw", {"kind": "lora"}, {"checkpointing": True}),
    ("adamw", None, {"match": "layers.*.mlp"}), ("badam", None, {"match": "mlp"}), ("mezo", None, {"match": "layers.1"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "adapter", "more"),
    [pytest.param(*case, marks=() if n in (1, 2, 11) else pytest.mark.slow) for n, case in enumerate(PEAKS)],
)
def test_the_peak_is_planned_within_five_percent(
    method: str, adapter: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    import train_runs

    config = train_runs.config(tmp_path / "r", method, steps=3, seq=64, batch=4, **more)
    done = loop.train(replace(config, adapter=AdapterConfig(**adapter)) if adapter else config)
    assert done.predicted["peak"] == pytest.approx(done.measured["peak"], rel=0.05)
    assert done.predicted["weights"] == pytest.approx(done.measured["weights"], rel=0.01)


def test_by_command(tmp_path: Path, capsys: Any) -> None:
    from tare.cli.main import main

    base, rows = llama(tmp_path / "m", weights=True), data(tmp_path)
    how = ["--model", base, "--data", rows, "--task", "classify", "--method", "mezo", "--lr", "1e-2", "--warmup", "0"]
    how += ["--seq", "32", "--batch", "4", "--steps", "2", "--seed", "3", "--device", "cpu"]
    lora = ["--adapter", "lora", "--adapter.rank", "4", "--adapter.targets", "q_proj,v_proj"]
    assert main(["train", *how, *lora, "--out", str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["adapter"]["alpha"] == 16.0
    log = str(tmp_path / "r" / "run.seeds")
    assert main(["replay", log, "--model", base, *lora, "--seed", "3", "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True
    assert (
        main(
            ["replay", log, "--model", base, *lora, "--adapter.merge", "--seed", "3", "--out", str(tmp_path / "whole")]
        )
        == 0
    )
    assert (tmp_path / "whole" / "config.json").is_file()
    capsys.readouterr()
    assert main(["train", *how, "--adapter", "lora", "--adapter.rank", "0", "--out", str(tmp_path / "no")]) == 2
    assert "--adapter.rank: expected a whole number >= 1, or none, got 0" in capsys.readouterr().err
    assert main(["train", *how, *lora[2:], "--out", str(tmp_path / "no")]) == 2
    assert "adapter.rank: there is no adapter; set adapter.kind (--adapter lora)" in capsys.readouterr().err
