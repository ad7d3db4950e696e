"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop_learns() -> None:
    before, after = example("own_loop").main()
    assert after < 0.7 * before


def test_every_composition_learns_and_a_senseless_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("compose_your_own").main()
    assert len(found) == 4
    for name, (before, after) in found.items():
        assert after < 0.5 * before, name
    assert "refused: residual:" in capsys.readouterr().out


def same_weights(one: Any, other: Any) -> bool:
    a, b = (dict(net.named_parameters()) for net in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_state(one: Any, other: Any) -> bool:
    """Of two optimizers, bit for bit; and part of it in 8 bits."""
    a, b = (optimizer.state_dict()["state"] for optimizer in (one, other))
    for number, raw in a.items():
        for name, value in raw.items():
            kept = b[number][name]
            if isinstance(value, torch.Tensor) and not (value.dtype == kept.dtype and torch.equal(value, kept)):
                return False
            if not isinstance(value, torch.Tensor) and value != kept:
                return False
    codes = [v.dtype for raw in b.values() for name, v in raw.items() if name.endswith("_codes")]
    return a.keys() == b.keys() and bool(codes) and set(codes) == {torch.uint8}


@pytest.mark.parametrize("release", [False, True])
def test_a_trainer_resumes_from_its_own_checkpoint(release: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole, resumed = example("hf_trainer").main(tmp_path, release)
    assert whole.state.global_step == resumed.state.global_step == 8
    assert same_weights(whole.model, resumed.model)
    assert same_state(whole.optimizer, resumed.optimizer)
    steps = {entry["step"] for entry in whole.optimizer.state_dict()["state"].values()}
    assert steps == {8}  # not one for each micro-batch
    logged = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert logged[1] < logged[0]


@pytest.mark.parametrize("release", [False, True])
def test_a_loop_of_accelerate_resumes(release: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole, resumed = example("hf_accelerate").main(tmp_path, release)
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("release", [False, True])
def test_lightning_resumes(release: bool, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    whole, resumed = example("lightning_module").main(tmp_path, release)
    assert same_weights(whole, resumed)
    assert same_state(*(net.trainer.optimizers[0] for net in (whole, resumed)))
    assert {entry["step"] for entry in whole.trainer.optimizers[0].state_dict()["state"].values()} == {12}


def test_an_adapter_in_a_loop_of_ones_own_learns_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    losses, whole, resumed = example("peft_loop").main(tmp_path)
    assert losses[-1] < 0.96 * losses[0]
    assert same_weights(whole, resumed)


def test_an_adapter_by_tare_train_is_read_by_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    before, after, model = example("adapter_run").main(tmp_path)
    assert after < 0.97 * before
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(factors) == 14
    assert all(bool((p != 0).any()) for p in factors)
