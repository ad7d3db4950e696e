"""Forward-only methods in real processes: models that ranks share (DDP, FSDP2), and `fzoos` with a process for each client."""

from pathlib import Path
from typing import Any

import pytest
import torch
import work_forward
import work_fzoos
from ranks import Ranks

import tare
from tare.methods import registry
from tare.testing.forward import ForwardSubject


def close(found: list[dict[str, Any]], wanted: dict[str, Any], bound: float = 1e-12) -> None:
    """Losses and whole weights of every rank are those of one process."""
    for one in found:
        assert one["losses"] == pytest.approx(wanted["losses"], rel=bound, abs=bound)
        assert one["weights"].keys() == wanted["weights"].keys()
        for name, weights in wanted["weights"].items():
            assert one["weights"][name] == pytest.approx(weights, rel=bound, abs=bound), name
        assert one["after"] == pytest.approx(wanted["after"], rel=1e-9), "a forward does not see the step"


WORKS = {"mezo", "zo-sah", "eggroll", "zo-rank", "consensus"}
KEYS = [key for key in registry.keys("forward") if ForwardSubject(key).problem().module is not None]
QUICK = {
    ("mezo", "ddp"),
    ("zo2", "ddp"),
    *((key, "fsdp") for key in KEYS if key not in ("zo-rank", "zo-sah", "eggroll")),
}


def marked(cases: list[Any], quick: Any) -> list[Any]:
    """Those that are not quick are slow."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("key", "wrap"), marked([(key, wrap) for key in KEYS for wrap in ("ddp", "fsdp")], QUICK))
def test_every_method_is_that_of_one_process_or_says_why_not(key: str, wrap: str, ranks2: Ranks) -> None:
    found = ranks2.run("work_forward", "together", key=key, wrap=wrap)
    refused = [one.get("refused", "") for one in found]
    assert refused[0] == refused[1]
    if refused[0]:
        assert wrap == "ddp" or key not in WORKS
        assert "\n" not in refused[0]
        assert "whole" in refused[0] or "the model itself" in refused[0]
        return
    close(found, work_forward.alone(2, key))


FORMS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-2, "n": 2, "rule": "adam", "weight_decay": 0.1},
    "one-sided on the sphere": {"lr": 1e-2, "probe": "one-sided", "directions": "sphere"},
    "momentum by replay": {"lr": 1e-2, "rule": "momentum", "momentum": 0.5, "moments": "replay", "directions": "rademacher"},
    "one coordinate": {"lr": 1e-3, "n": 3, "directions": "coordinate"}, "some leaves": {"lr": 1e-2, "targets": "tail.*"},
}  # fmt: skip


@pytest.mark.parametrize("form", marked([(form,) for form in FORMS], [("adam",), ("momentum by replay",)]))
def test_forms_of_mezo_on_uneven_and_empty_pieces(form: str, ranks2: Ranks) -> None:
    """Every number of a rank's rows is that of the whole leaf's, but for what a vector's tail rounds otherwise."""
    own = FORMS[form]
    found = ranks2.run("work_forward", "together", key="mezo", wrap="fsdp", form=own)
    wanted = work_forward.alone(2, "mezo", own)
    assert wanted["losses"][0] != wanted["losses"][-1]
    close(found, wanted)
    shown = found[0]["explained"]
    assert "perturbed in place on this rank's rows, put back exactly" in shown
    assert "2 workers, 2 parts of data, 1 to share the points of a step" in shown
    if form == "adam":
        assert found[0]["state"]["exp_avg"] == "DTensor"


@pytest.mark.parametrize("storage", marked([("stochastic",), ("split24",), ("master",)], [("split24",)]))
def test_weights_of_16_bits_round_as_in_one_process(storage: str, ranks2: Ranks) -> None:
    own = {"lr": 1e-2, "n": 2, "storage": {"weight": storage}}
    found = ranks2.run("work_forward", "together", key="mezo", wrap="fsdp", form=own, dtype=torch.bfloat16)
    wanted = work_forward.alone(2, "mezo", own, torch.bfloat16)
    for one in found:
        assert one["weights"] == wanted["weights"]
        assert one["losses"] == wanted["losses"]


def test_copies_of_the_rows_take_the_same_steps_and_a_run_can_be_cut(ranks2: Ranks) -> None:
    own = {"lr": 1e-2, "rule": "adam"}
    wanted = work_forward.alone(2, "mezo", own)
    for more in ({"wrap": "hsdp"}, {"wrap": "fsdp", "stop": 1}):
        close(ranks2.run("work_forward", "together", key="mezo", form=own, **more), wanted)


def test_a_log_of_any_rank_is_replayed_in_one_process(ranks2: Ranks, tmp_path: Path) -> None:
    wanted, same = ranks2.run("work_forward", "logged", folder=str(tmp_path))
    assert wanted == same
    for rank in (0, 1):
        net = work_forward.Uneven()
        assert tare.replay(tmp_path / f"{rank}.seeds", net).exact
        assert {name: work_forward.whole(p) for name, p in net.named_parameters()} == wanted


def test_what_cannot_be_is_told_in_a_line(ranks2: Ranks) -> None:
    for found in ranks2.run("work_forward", "faults"):
        for name, words in (
            ("points", "use tare.Workers(data=2), or none"), ("forward", "use 'auto' or 'in-place-exact'"),
            ("in-place", "use 'auto' or 'in-place-exact'"), ("no model", "give the model itself as params, or as model="),
            ("mask", "need the whole weight, and fully_shard has cut it"), ("rule", "steps it as a whole"),
            ("tangent", "cut by fully_shard"), ("together", "use together=1"), ("zo2", "ZO2: it must see whole weights"),
            ("share", "share the model before it is cut"),
            ("ddp zo2", "ZO2: it works on the model itself"), ("rates", "steps, rates, seeds or probe of worker 1"),
        ):  # fmt: skip
            assert words in found[name], (name, found[name])
            assert "\n" not in found[name]
        assert found["with model"] == ""


@pytest.mark.slow
def test_three_ranks(ranks3: Ranks) -> None:
    own = {"lr": 1e-2, "n": 2, "rule": "adam"}
    wanted = work_forward.alone(3, "mezo", own)
    for wrap in ("ddp", "fsdp"):
        close(ranks3.run("work_forward", "together", key="mezo", wrap=wrap, form=own), wanted)


# -- a process for each client of fzoos -------------------------------------------------------------------------------------


def same_rounds(found: list[dict[str, Any]], rounds: int, **own: Any) -> dict[str, Any]:
    """Weights of all processes, and each one's queries, are those of one process, bit for bit."""
    whole = work_fzoos.alone(len(found), rounds, **own)
    for rank, one in enumerate(found):
        assert one["weights"] == whole["weights"]
        assert one["losses"] == pytest.approx(whole["losses"], rel=1e-13)
        assert torch.equal(one["queries"][0], whole["queries"][rank])
        assert torch.equal(one["values"][0], whole["values"][rank])
        assert one["asked"] == whole["asked"]
        assert one["queries"].shape[0] == one["values"].shape[0] == 1, "others' queries are not here"
    return whole


ROUNDS: dict[str, dict[str, Any]] = {
    "plain": {}, "weights, bf16": {"weights": (3.0, 1.0), "dtype": torch.bfloat16}, "averaging": {"correction": 0.0},
    "constant correction": {"correction": 0.5, "kernel": "rbf", "active": 0, "seed": 5},
}  # fmt: skip


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if "bf16" in form else ()) for form in ROUNDS]
)
def test_two_clients_are_the_simulation(form: str, ranks2: Ranks) -> None:
    own = ROUNDS[form]
    whole = same_rounds(ranks2.run("work_fzoos", "together", rounds=2, **own), 2, **own)
    if form != "averaging":
        other = work_fzoos.alone(2, 2, **{**own, "correction": 0.0})
        assert whole["weights"] != other["weights"], "nothing was exchanged"


def test_a_run_can_be_cut(ranks2: Ranks) -> None:
    """Each process saves what is its own."""
    same_rounds(ranks2.run("work_fzoos", "together", rounds=2, cut=1), 2)


def test_bytes_are_counted(ranks2: Ranks) -> None:
    """A round: twice 24 bytes, the features, 7 weights and a mean loss."""
    for rank, one in enumerate(ranks2.run("work_fzoos", "together", rounds=2)):
        a_round = 2 * 24 + 8 * 120 + 8 * (7 + 1)
        assert (one["sent"], one["rounds"], one["messages"]) == (2 * a_round, 2, 8)
        assert f"2 clients, a process each: this is client {rank}; {a_round} bytes sent a round by each" in one["shown"]
        assert one["evaluations"] == 8 + 3 + 2 * 2
        assert one["evaluated"] - 2 * one["evaluations"] in (0, 1), "each asks its own client only"
    averaging = ranks2.run("work_fzoos", "together", rounds=1, correction=0.0)
    assert [one["sent"] for one in averaging] == [24 + 64] * 2, "no features where there is no correction"


def test_one_client_that_fails_stops_all_and_the_next_round_is_well(ranks2: Ranks) -> None:
    first, second = ranks2.run("work_fzoos", "faults")
    for when in ("first", "later"):
        for found, kind, words in ((first, "WorkersFailed", "worker 1 failed"), (second, "KeyError", "no such column")):
            raised, message, unchanged, steps = found[f"raised {when}"]
            assert (raised, unchanged, steps) == (kind, True, 0)
            assert words in message
            assert found[f"nan {when}"] == [True, True, 1, 1]
        assert first[f"after {when}"] == second[f"after {when}"]
    assert first["closure"][0] == "WorkersFailed"
    assert "expected one for each of 1 clients here, got 2" in second["closure"][1]
    for found in (first, second):
        for what, words in (
            ("weights", "the weights of worker 1 are not those of worker 0"),
            ("settings", "the steps, rates, seeds or probe of worker 1"),
            ("clients", "clients: 3, but there are 2 processes; give clients=2, or start 3"),
        ):
            assert found[what][0] == "InputError", found[what]
            assert words in found[what][1]
            assert "\n" not in found[what][1]
        assert found["mended"] == ["", ""]


def test_the_example_learns_and_is_the_simulation(ranks2: Ranks) -> None:
    losses, prompt = work_fzoos.example(2, 2)
    assert losses[-1] < 0.9 * losses[0]
    for found, place in ranks2.run("work_fzoos", "example_here", rounds=2):
        assert found == pytest.approx(losses, rel=1e-6)
        assert place == prompt


@pytest.mark.slow
def test_three_clients_are_the_simulation(ranks3: Ranks) -> None:
    own: dict[str, Any] = {"weights": (1.0, 0.0, 2.5), "capacity": 12}
    same_rounds(ranks3.run("work_fzoos", "together", rounds=5, **own), 5, **own)
