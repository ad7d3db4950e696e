"""Checkpoints written by every release: they load, their configuration is understood, and their runs go on as they would have then."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tare.methods import registry
from tare.methods.replay import replay
from tare.train import checkpoint, convert, integrity, run, sharded
from tare.train.loop import _counters
from tare.train.seeds import restore_arithmetic, restore_random_state
from tare.zeroth.log import SeedLog
from tare.zeroth.logfile import read

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASES = ("0.1.0",)  # every one that has golden checkpoints: none may vanish
# Another processor may round matrix products otherwise; six steps of lr 0.05 on weights of order 0.3.
TOLERANCE = 2e-5


def maker() -> Any:
    """The script that made them."""
    spec = importlib.util.spec_from_file_location("make_checkpoints", GOLDEN / "make_checkpoints.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MAKE = maker()
CASES = [(version, case) for version in RELEASES for case in MAKE.CASES]
FORMS = [(v, c, form) for v, c in CASES for form in ("single", "sharded") if not (form == "sharded" and c == "mezo")]


@pytest.fixture(autouse=True)
def clean_generators() -> Any:
    """What is loaded sets the global generators."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def loaded(version: str, case: str, form: str) -> checkpoint.Snapshot:
    folder = GOLDEN / "checkpoints" / version / case / form
    snapshot = checkpoint.load_latest(folder)
    assert snapshot is not None
    assert snapshot.skipped == ()
    return snapshot


def test_every_release_is_there_and_no_folder_is_forgotten() -> None:
    assert sorted(path.name for path in (GOLDEN / "checkpoints").iterdir()) == sorted(RELEASES)
    sizes = [path.stat().st_size for path in (GOLDEN / "checkpoints").rglob("*") if path.is_file()]
    assert max(sizes) < 64 << 10


@pytest.mark.parametrize(("version", "case", "form"), FORMS)
def test_it_loads_and_goes_on_to_the_weights_of_then(version: str, case: str, form: str) -> None:
    snapshot = loaded(version, case, form)
    assert snapshot.step == MAKE.BEFORE
    kept = load_file(GOLDEN / "checkpoints" / version / case / "continuation.safetensors")
    key, options = MAKE.CASES[case]
    net = MAKE.model()
    optimizer = registry.build(key, net, **options)
    sharded.restore(net, optimizer, snapshot)
    assert all(raw["step"] == MAKE.BEFORE for raw in optimizer.state.values())
    for number in range(MAKE.BEFORE, MAKE.BEFORE + MAKE.AFTER):
        MAKE.step(net, optimizer, kept[f"batch.{number}"])
    moved = 0.0
    for name, p in net.named_parameters():
        assert (p - kept[f"end.{name}"]).abs().max() < TOLERANCE, name
        moved = max(moved, float((kept[f"end.{name}"] - snapshot.weights[name]).abs().max()))
    assert moved > 100 * TOLERANCE, "the steps must matter"


@pytest.mark.parametrize(("version", "case"), CASES)
def test_its_configuration_counters_and_generators_are_understood(version: str, case: str) -> None:
    snapshot = loaded(version, case, "single")
    saved = snapshot.trainer["config"]
    config = convert.config_of(snapshot)
    assert run.changes(saved, run.inherit(saved, config)) == []
    assert config.method.key == MAKE.CASES[case][0]
    assert _counters(snapshot.trainer["counters"]).step == MAKE.BEFORE
    if "random" in snapshot.trainer:
        restore_random_state(snapshot.trainer["random"])
    restore_arithmetic(snapshot.trainer["arithmetic"], torch.device("cpu"))


@pytest.mark.parametrize("version", RELEASES)
def test_its_seed_log_is_replayed_and_continued(version: str, tmp_path: Path) -> None:
    place = GOLDEN / "checkpoints" / version / "mezo"
    shutil.copy(place / "run.seeds", tmp_path)
    kept = load_file(place / "continuation.safetensors")
    net = MAKE.model()
    net.load_state_dict(
        {name.removeprefix("base."): tensor for name, tensor in kept.items() if name.startswith("base.")}
    )
    replay(read(place / "run.seeds"), net)
    snapshot = loaded(version, "mezo", "single")
    for name, p in net.named_parameters():
        assert (p - snapshot.weights[name]).abs().max() < TOLERANCE
    key, options = MAKE.CASES["mezo"]
    net = MAKE.model()
    optimizer = registry.build(key, net, **options)
    sharded.restore(net, optimizer, snapshot)
    with SeedLog(tmp_path / "run.seeds") as log:
        optimizer.on_step = log  # type: ignore[attr-defined]
        MAKE.step(net, optimizer, kept[f"batch.{MAKE.BEFORE}"])
    assert read(tmp_path / "run.seeds").steps == MAKE.BEFORE + 1


@pytest.mark.parametrize(("version", "case", "form"), FORMS)
def test_a_flipped_byte_in_it_would_be_seen(version: str, case: str, form: str, tmp_path: Path) -> None:
    """The folders must be under their checksums as they were written, whatever a version control system does to line ends."""
    ((step, place),) = checkpoint.found(GOLDEN / "checkpoints" / version / case / form)
    assert integrity.verify(place)["tare"] == version
    shutil.copytree(place, tmp_path / place.name)
    file = next((tmp_path / place.name).glob("optimizer*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / place.name, step)
