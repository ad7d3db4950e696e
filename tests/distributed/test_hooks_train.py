"""`train.compress`: a run of two processes over a slow link, resumed bit for bit, and settings that do not go together."""

import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ranks import Ranks

ROOT = Path(__file__).parents[2]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = _load(ROOT / "tests" / "train" / "train_runs.py")  # what the tests of runs in one process share
CASES: dict[str, dict[str, Any]] = {
    "randk": {"compress": "randk", "compress_fraction": 0.05},
    "topk": {"compress": "topk", "compress_fraction": 0.05},
    "projected": {"compress": "projected", "method": "galore", "rank": 8, "clip": None},
}


@pytest.mark.parametrize(
    "kind", ["randk", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("topk", "projected"))]
)
def test_a_compressed_run_is_resumed_bit_for_bit(ranks2: Ranks, tmp_path: Path, kind: str) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    settings = {**CASES[kind], "parallel": "ddp", "steps": 5, "keep": 5, "eval_every": 5}
    found = ranks2.run("work_hooks_train", "run", config=runs.config(out, **settings))
    assert all(math.isfinite(loss) for loss in found[0]["losses"])
    assert len(found[0]["losses"]) == 5
    assert any(line.startswith("gradients go between processes as ") for line in found[0]["said"])
    shutil.copytree(out, again)
    for part in (again / "checkpoints").glob("step-[45]"):
        shutil.rmtree(part)
    shutil.rmtree(again / "model", ignore_errors=True)
    found = ranks2.run("work_hooks_train", "run", config=runs.config(again, **{**settings, "resume": True}))
    assert len(found[0]["losses"]) == 2
    assert runs.fingerprint(out) == runs.fingerprint(again)


def test_settings_that_do_not_go_together(ranks2: Ranks, tmp_path: Path) -> None:
    for number, (changes, words) in enumerate(
        (
            ({"compress": "projected", "method": "galore", "parallel": "ddp"}, "set train.clip none"),
            ({"compress": "projected", "clip": None, "parallel": "ddp"}, "adam goes element by element"),
            ({"compress": "projected", "method": "galore", "clip": None}, "rank 128 > 64"),
            ({"compress": "randk", "parallel": "fsdp"}, "it goes with train.parallel ddp"),
            ({"compress": "topk", "compress_rank": 2}, "has no option 'rank'"),
            ({"compress_fraction": 0.1}, "set train.compress too"),
            ({"compress": "randk", "method": "galore", "release": True, "clip": None}, "method.release false"),
            ({"compress": "randk", "accumulate": 2, "sync": "batch"}, "train.sync"),
            ({"compress": "randk", "method": "badam"}, "leaf by leaf"),
        )
    ):
        found = ranks2.run("work_hooks_train", "run", config=runs.config(tmp_path / str(number), **changes))
        lines = [each["refused"] for each in found if "refused" in each]
        assert len(lines) == 1, found
        assert words in lines[0]
        assert lines[0].startswith("train.")
        assert "\n" not in lines[0]


def test_the_page_has_the_table_of_the_file() -> None:
    links = _load(ROOT / "bench" / "links.py")
    result = json.loads((ROOT / "bench" / "results" / "links.json").read_text("utf-8"))
    assert links.BEGIN + links.table(result) + links.END in (ROOT / "docs" / "links.md").read_text("utf-8")
    whole, projected = (
        next(r for r in result["rows"] if r["row"] == f"galore {how}") for how in ("whole", "projected")
    )
    assert projected["bytes_a_step"] < whole["bytes_a_step"]
    # fp32: sums in another order, and singular vectors and Adam magnify the last bit; in fp64 they are equal (test_hooks_projected)
    assert abs(projected["loss"] - whole["loss"]) < 5e-3
