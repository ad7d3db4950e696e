"""`tare bench soak`: what it sees in a short run, and that it would see a leak."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from train_runs import corpus, model

from tare.cli.main import main
from tare.core.errors import InputError
from tare.report.soak import Sample, thinned, verdict

FLAT = Sample(0.0, 0.0, 1, 64, 500 << 20, 10, 2, 3 << 20, 3, 1 << 20, 200)


def series(**slopes: float) -> list[Sample]:
    """A hundred looks, a second apart; what grows, by how much a look."""
    found = []
    for number in range(100):
        one = replace(
            FLAT,
            seconds=float(number),
            cpu=float(number),
            step=1 + number,
            tokens=64 * (1 + number),
            log=200 * (1 + number),
        )
        changed = {name: getattr(one, name) + slope * number for name, slope in slopes.items()}
        found.append(replace(one, **{name: type(getattr(one, name))(value) for name, value in changed.items()}))
    return found


def failing(samples: list[Sample]) -> list[str]:
    found = verdict(samples, keep=2)
    assert found["steady"] == all(row["holds"] for row in found["figures"].values())
    return [name for name, row in found["figures"].items() if not row["holds"]]


def test_a_steady_run_is_steady_and_each_growth_is_seen() -> None:
    assert failing(series()) == []
    assert failing(series(resident=1 << 20)) == ["resident_bytes"]
    assert verdict(series(resident=1 << 20), keep=2)["resident_bytes_an_hour"] == pytest.approx(3600 * 2**20)
    assert failing(series(open_files=0.2)) == ["open_files"]
    assert failing(series(threads=0.2)) == ["threads"]
    assert failing(series(folder=1 << 16)) == ["run_folder_bytes"]
    assert failing(series(checkpoints=0.1)) == ["checkpoints"]
    assert failing(series(log=300.0)) == ["log_bytes_a_step"]
    slowing = [replace(sample, tokens=int(64 * number**0.7)) for number, sample in enumerate(series())]
    assert failing(slowing) == ["tokens_a_cpu_second"]
    with pytest.raises(InputError, match="too few looks"):
        verdict(series()[:5], keep=2)
    assert len(thinned(series() * 9)) <= 200


@pytest.mark.slow
def test_the_command_trains_resumes_and_judges(tmp_path: Path) -> None:
    words = f"--model {model()} --data {corpus()} --seq 32 --batch 2 --method galore --rank 8 --threads 1 --checkpoint-every 5"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(
            [
                "bench",
                "soak",
                "--minutes",
                "1",
                "--resumes",
                "1",
                "--every",
                "0.2",
                *words.split(),
                "--out",
                str(tmp_path / "a.json"),
            ]
        )
    found = json.loads((tmp_path / "a.json").read_text())
    assert code == (0 if found["steady"] else 1)
    assert found["minutes"] == 1
    assert found["resumes"] == 1
    assert found["command"].startswith("tare bench soak --minutes 1")
    assert all(row["holds"] for name, row in found["figures"].items() if name != "tokens_a_cpu_second"), out.getvalue()


def test_it_is_told_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("--minutes 0", "--minutes 0.1 --every 9", "--resumes -1"):
        assert main(["bench", "soak", *words.split(), "--model", "llama-tiny"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("tare: --")
        assert said.count("\n") == 1
