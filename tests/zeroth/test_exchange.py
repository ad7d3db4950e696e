"""Workers in real processes over gloo: the steps of one process, bit for bit; faults that all of them survive alike."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tare
from tare.core.errors import InputError
from tare.methods import registry
from tare.testing.subject import Net, loss_of
from tare.zeroth.exchange import Workers

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("exchange_worker.py")
SHARING = [key for key in registry.keys("forward") if "exchange" in registry.options(key)]


def launch(folder: Path, *more: str, workers: int = 2) -> list[int]:
    """Exit codes of the workers, each a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    base |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers)}
    started = []
    for rank in range(workers):
        environment = (
            {**base, "RANK": str(rank)} if workers > 1 else {k: v for k, v in base.items() if k != "WORLD_SIZE"}
        )
        command = [sys.executable, str(WORKER), str(folder), *more]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    codes = []
    for process in started:
        _, errors = process.communicate(timeout=300)
        codes.append(process.returncode)
        if process.returncode > 0:
            print(errors)
    return codes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workers")
    assert launch(folder, workers=1) == [0]
    assert launch(folder) == [0, 0]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("alone", "0", "1")}


def same_steps(results: dict[str, Any], *where: str) -> tuple[Any, Any, Any]:
    """Losses and weights of both workers are those of one process. Returns the three results."""
    found = []
    for name in ("alone", "0", "1"):
        at = results[name]
        for key in where:
            at = at[key]
        found.append(at)
    alone, first, second = found
    assert first[:2] == second[:2] == alone[:2]
    return alone, first, second


@pytest.mark.parametrize("key", SHARING)
def test_shared_points_are_the_step_of_one_process(key: str, results: dict[str, Any]) -> None:
    alone, first, second = same_steps(results, "methods", key)
    assert max(first[2], second[2]) < alone[2], "nothing was shared"


FORMS = ["plus and minus", "n=3", "adam", "one-sided", "forward gradient", "in place"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_probe_can_be_shared(form: str, results: dict[str, Any]) -> None:
    alone, first, second = same_steps(results, "points", form)
    assert first[2] + second[2] <= alone[2] + 2  # each first perturbed evaluation may be repeated under watch


def test_dropout_falls_alike_on_all_workers(results: dict[str, Any]) -> None:
    same_steps(results, "dropout")


def test_shared_data_is_the_step_on_the_mean(results: dict[str, Any]) -> None:
    alone, first, second = same_steps(results, "data")
    assert first[2] == second[2] == alone[2]


def test_a_closure_that_raises_on_one_worker_stops_the_step_on_all(results: dict[str, Any]) -> None:
    for rank, kind, words in (("0", "WorkersFailed", "worker 1 failed"), ("1", "KeyError", "no such column")):
        found, message, unchanged, steps = results[rank]["faults"]["raised"]
        assert (found, unchanged, steps) == (kind, True, 0)
        assert words in message
        assert "\n" not in message


def test_a_loss_that_is_nan_on_one_worker_is_skipped_by_all(results: dict[str, Any]) -> None:
    for rank in ("0", "1"):
        assert results[rank]["faults"]["nan"] == [True, True, 1]
    assert results["0"]["faults"]["after"] == results["1"]["faults"]["after"]
    assert results["0"]["faults"]["after"][0]


def test_bytes_are_counted_and_shown(results: dict[str, Any]) -> None:
    for rank in ("0", "1"):
        sent, questions, shown = results[rank]["faults"]["bytes"]
        assert (sent, questions) == (24 + 2 * 8, 1)  # four points, two of them here
        assert "exchange: 2 workers, 2 to share the points of a step; 40 bytes sent per question by each" in shown


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("too many", "2 workers share the points of a step, and there are 1"),
        ("divisor", "Invalid data: 3; it must divide the 2 workers: 1, 2"),
        ("weights", "the weights of worker 1 are not those of worker 0"),
        ("rates", "the steps, rates, seeds or probe of worker 1 are not those of worker 0"),
        ("drift", "the weights of worker 1 are not those of worker 0"),
    ],
)
def test_workers_that_cannot_work_together_are_told(what: str, words: str, results: dict[str, Any]) -> None:
    for rank in ("0", "1"):
        kind, message = results[rank]["faults"][what]
        assert kind == "InputError"
        assert words in message
        assert "\n" not in message


def test_shared_weights_mend_it(results: dict[str, Any]) -> None:
    assert results["0"]["faults"]["mended"] == results["1"]["faults"]["mended"]
    assert results["0"]["faults"]["mended"][:2] == ["", ""]


def test_a_killed_worker_is_noticed(tmp_path: Path) -> None:
    codes = launch(tmp_path, "killed")
    assert codes == [0, -9]
    kind, message = json.loads((tmp_path / "0.json").read_text())["killed"]
    assert kind == "WorkersFailed"
    assert "a worker is gone" in message


def test_without_a_group_it_says_how_to_start() -> None:
    net = Net()
    with pytest.raises(InputError, match=r"torch.distributed is not set up; start with torchrun"):
        tare.MeZO(net, 1e-2, exchange=Workers()).step(lambda: loss_of(net))


def test_the_example_under_torchrun() -> None:
    script, environment = str(ROOT / "examples" / "share_points.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True).stdout
        for command in ([*launcher, script, "--steps", "5"], [sys.executable, script, "--alone", "--steps", "5"])
    )
    assert "bytes sent in 5 steps" in first
    assert first.splitlines()[0] == second.splitlines()[0]
