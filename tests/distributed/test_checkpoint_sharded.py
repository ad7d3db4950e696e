"""Checkpoints of sharded runs: any kind of run goes on from any kind's, with the numbers of one that was never interrupted."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import work_checkpoint as work
from ranks import Ranks

from tare.core.errors import CheckpointError
from tare.train import checkpoint, integrity, sharded

# block=5: the blocks of int8 state end where rows of the first layer do, so they are cut; those of the others are kept whole by an owner
METHODS = (
    "torch",
    "adamw:block=5",
    "galore:rank=2,period=3",
    pytest.param("adamw", marks=pytest.mark.slow),
    pytest.param("muon", marks=pytest.mark.slow),
)


def furthest(found: list[list[float]], wanted: list[float]) -> float:
    """The largest difference on any rank."""
    assert all(len(row) == len(wanted) > 0 for row in found)
    return max(abs(a - b) for row in found for a, b in zip(row, wanted, strict=True))


def train(ranks: Ranks | None, **job: Any) -> list[list[float]]:
    """On every rank of a pool, or in this process."""
    return [work.train(0, 1, **job)] if ranks is None else ranks.run("work_checkpoint", "train", **job)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_go_on_bit_for_bit_and_others_to_the_last_digits(
    method: str, ranks2: Ranks, ranks3: Ranks, tmp_path: Path
) -> None:
    folder = str(tmp_path / "c")
    alone = train(None, how="plain", method=method, last=6)[0]
    train(ranks2, how="fsdp", method=method, last=3, folder=folder, save=True)
    ((_, place),) = checkpoint.found(tmp_path / "c")
    assert integrity.verify(place)["format"] == integrity.SHARDED
    on = {"method": method, "folder": folder, "first": 3, "last": 6}
    resumed, whole = train(ranks2, how="fsdp", **on), train(ranks2, how="fsdp", method=method, last=6)
    assert resumed == whole
    assert furthest(whole, alone) < 1e-12
    for pool, how in ((None, "plain"), (ranks2, "ddp"), (ranks3, "fsdp"), (ranks2, "hsdp")):
        assert furthest(train(pool, how=how, **on), alone) < 1e-12, how


@pytest.mark.parametrize("method", METHODS)
def test_a_single_process_may_become_sharded_and_come_back(
    method: str, ranks2: Ranks, ranks3: Ranks, tmp_path: Path
) -> None:
    folder = str(tmp_path / "c")
    alone = train(None, how="plain", method=method, last=9)[0]
    train(None, how="plain", method=method, last=2, folder=folder, save=True)
    assert not checkpoint.load(tmp_path / "c" / "step-2", 2).content.sharded
    on = {"method": method, "folder": folder, "save": True}
    train(ranks2, how="fsdp", first=2, last=4, **on)
    train(ranks3, how="fsdp", first=4, last=6, **on)
    train(ranks2, how="hsdp", first=6, last=7, **on)
    train(ranks2, how="ddp", first=7, last=8, **on)
    assert furthest(train(None, how="plain", first=8, last=9, **on), alone) < 1e-12


@pytest.mark.parametrize("method", ["adamw", "adamw:block=5", "adamw:block=16", "galore:rank=2,period=3"])
def test_the_whole_state_is_that_of_one_process_bit_for_bit(method: str, ranks2: Ranks, tmp_path: Path) -> None:
    """One step from equal weights: what is written by two ranks, put together, is what one process has, every dtype kept."""
    job = {"method": method, "dtype": "float32", "last": 1, "save": True}
    train(None, how="plain", folder=str(tmp_path / "one"), **job)
    train(ranks2, how="fsdp", folder=str(tmp_path / "two"), **job)
    one, two = (checkpoint.load_latest(tmp_path / name) for name in ("one", "two"))
    assert one is not None
    assert two is not None
    a, b = one.content.state, two.content.state
    kinds = {stored.dtype for raw in a.values() for stored in raw.values() if not isinstance(stored, int)}
    assert (torch.uint8 in kinds) is ("block" in method)
    assert a.keys() == b.keys()
    for leaf in a:
        assert a[leaf].keys() == b[leaf].keys()
        for key, stored in a[leaf].items():
            other = b[leaf][key]
            if isinstance(stored, int):
                assert stored == other
                continue
            assert (stored.dtype, stored.shape) == (other.dtype, other.shape)
            assert torch.equal(stored.whole(), other.whole()), (leaf, key)


def test_a_rank_reads_its_own_part_and_no_more(ranks2: Ranks, tmp_path: Path) -> None:
    train(None, how="plain", last=1, method="adamw", folder=str(tmp_path / "c"), save=True)
    whole, parts = work.read_bytes(0, 1, "plain", str(tmp_path / "c")), ranks2.run(
        "work_checkpoint", "read_bytes", how="fsdp", folder=str(tmp_path / "c")
    )  # fmt: skip
    assert sum(parts) == whole
    assert max(parts) < 0.75 * whole  # 7 rows are cut into 4 and 3; a single row lies on one


def test_the_folder_holds_no_pickle_and_stock_readers_read_it(ranks2: Ranks, tmp_path: Path) -> None:
    train(ranks2, how="fsdp", last=2, folder=str(tmp_path / "c"), save=True)
    place = tmp_path / "c" / "step-2"
    for file in place.iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert file.read_bytes()[:2] not in (b"\x80\x04", b"\x80\x02", b"PK")
    wanted = checkpoint.load(place, 2).weights
    assert work.stock_weights(place, ours=False) == {name: tensor.tolist() for name, tensor in wanted.items()}
    assert work.stock_weights(place, ours=True) == {name: tensor.tolist() for name, tensor in wanted.items()}


@pytest.fixture(scope="module")
def pair(ranks2: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sharded checkpoints, of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("pair") / "c"
    train(ranks2, how="fsdp", last=2, folder=str(folder), save=True)
    train(ranks2, how="fsdp", first=2, last=4, folder=str(folder), save=True)
    return folder


FILES = (
    "weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors", "optimizer-00001-of-00002.safetensors",
    "optimizer-00002-of-00002.safetensors", "layout.json", "optimizer.json", "trainer.json", "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_cut_or_missing_file_is_named_and_the_older_one_used(
    name: str, pair: Path, tmp_path: Path, tally: Any
) -> None:
    shutil.copytree(pair, tmp_path / "c")
    file = tmp_path / "c" / "step-4" / name
    good = file.read_bytes()

    def told(what: str) -> None:
        snapshot = checkpoint.load_latest(tmp_path / "c")
        assert snapshot is not None
        assert snapshot.step == 2
        assert len(snapshot.skipped) == 1
        assert f"step-4/{name}: {what}" in snapshot.skipped[0]

    for position in {*range(0, len(good), max(1, len(good) // 25)), len(good) - 1}:
        bad = bytearray(good)
        bad[position] ^= 0x21
        file.write_bytes(bad)
        told("damaged")
        tally("changed bytes, found", 1)
    for share in (0.0, 0.5, 0.99):
        file.write_bytes(good[: int(len(good) * share)])
        told("damaged")
    file.unlink()
    told("missing")
    file.write_bytes(good)
    (file.parent / "weights-00003-of-00003.safetensors").write_bytes(good)
    name = "weights-00003-of-00003.safetensors"
    told("does not belong")


def test_ranks_agree_on_what_to_fall_back_to(ranks2: Ranks, pair: Path, tmp_path: Path) -> None:
    """Each reads the content of half of the files; the one that finds the damage is heard by the other."""
    for name in FILES:
        shutil.copytree(pair, tmp_path / name)
        file = tmp_path / name / "step-4" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    told = ranks2.run("work_checkpoint", "latest", folders=[str(tmp_path / name) for name in FILES])
    assert told[0] == told[1]
    for name, (step, skipped) in zip(FILES, told[0], strict=True):
        assert step == 2
        assert f"step-4/{name}: damaged" in skipped[0]


def test_a_layout_that_leaves_holes_or_points_outside_is_refused(pair: Path, tmp_path: Path) -> None:
    def change(alter: Any) -> None:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(pair / "step-4", tmp_path / "c" / "step-4")
        place = tmp_path / "c" / "step-4"
        layout = json.loads((place / "layout.json").read_text())
        alter(layout)
        revouch(place, "layout.json", json.dumps(layout).encode())
        with pytest.raises(CheckpointError, match=r"layout\.json: damaged"):
            checkpoint.load(place, 4)

    change(lambda layout: layout["weights"]["0.weight"]["pieces"].pop())
    change(lambda layout: layout["weights"]["0.weight"]["pieces"][1].__setitem__(1, [0, 0]))
    change(lambda layout: layout["weights"]["0.weight"].__setitem__("shape", [9, 5]))
    change(lambda layout: layout["weights"]["0.weight"].__setitem__("dtype", "F32"))
    change(lambda layout: layout["weights"]["0.weight"]["pieces"][0].__setitem__(0, "../secret.safetensors"))
    change(lambda layout: layout["weights"]["0.weight"]["pieces"][0].__setitem__(1, [1, 0]))
    change(lambda layout: layout.pop("optimizer"))


def revouch(place: Path, name: str, data: bytes) -> None:
    """Replace a file under a manifest that vouches for the new one."""
    (place / name).write_bytes(data)
    manifest = integrity.read_manifest(place)
    manifest.pop("sha256")
    manifest["files"][name] = {"size": len(data), "sha256": integrity.sha256_file(place / name)}
    (place / "manifest.json").write_bytes(integrity._manifest(manifest))


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_code_planted_in_any_file_never_runs(name: str, pair: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    place = tmp_path / "c" / "step-4"
    shutil.copytree(pair / "step-4", place)
    revouch(place, name, pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        checkpoint.load_latest(tmp_path / "c")
    assert not marker.exists()


def test_a_background_save_is_the_state_at_the_request(ranks2: Ranks, tmp_path: Path) -> None:
    told = ranks2.run("work_checkpoint", "background", folder=str(tmp_path))
    assert told[0] == told[1] == [(2, "step-2"), (4, "step-4")]
    for step in (2, 4):
        now, then = (checkpoint.load(tmp_path / name / f"step-{step}", step) for name in ("async", "sync"))
        assert now.weights.keys() == then.weights.keys()
        assert all(torch.equal(tensor, then.weights[name]) for name, tensor in now.weights.items())
        flat = checkpoint.flatten(then.optimizer)[1]
        assert all(torch.equal(tensor, flat[name]) for name, tensor in checkpoint.flatten(now.optimizer)[1].items())


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_cannot_write_is_told_of_on_all_and_nothing_is_left(
    who: int, ranks2: Ranks, tmp_path: Path
) -> None:
    told = ranks2.run("work_checkpoint", "full_disk", folder=str(tmp_path / "c"), who=who)
    for text in told:
        assert "step-4: could not be saved: no space left" in text
        assert f"(rank {who})" in text
        assert "\n" not in text
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-2"]
    integrity.verify(tmp_path / "c" / "step-2")


def test_ranks_that_disagree_save_nothing(ranks2: Ranks, tmp_path: Path) -> None:
    told = ranks2.run("work_checkpoint", "disagree", folder=str(tmp_path / "c"))
    assert all("disagree on" in text and "nothing is saved" in text for text in told)
    assert not checkpoint.found(tmp_path / "c")


def test_the_newest_and_the_best_are_kept(ranks2: Ranks, tmp_path: Path) -> None:
    ranks2.run("work_checkpoint", "many", folder=str(tmp_path / "c"), losses=[5.0, 2.0, 4.0, 3.0])
    assert [step for step, _ in checkpoint.found(tmp_path / "c")] == [3, 2, 1]


def test_state_of_another_model_or_method_is_refused_by_name(ranks2: Ranks, pair: Path) -> None:
    told = ranks2.run("work_checkpoint", "foreign", folder=str(pair))
    assert all("belongs to another model" in text for text in told)
    snapshot = checkpoint.load_latest(pair)
    assert snapshot is not None
    model = work.build()
    from tare.methods import registry

    with pytest.raises(CheckpointError, match=r"another method|lacks|unknown"):
        sharded.restore(model, registry.build("lion", model, lr=0.1), snapshot)
