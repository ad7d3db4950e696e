"""tare.plan: rows that add up, the choice of a method, and advice that holds when it is followed."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

import tare
from tare.core.errors import DoesNotFit, InputError
from tare.methods import registry
from tare.plan.api import Plan, choose, require_fit
from tare.plan.rows import plan_row


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tare.plan("llama-tiny", budget="16MiB", batch=2, seq=64)


def test_every_method_has_a_row_whose_parts_add_up(plan: Plan) -> None:
    assert sorted(row.method for row in plan.rows) == registry.keys("gradient")
    for row in plan.rows:
        assert row.peak == row.weights + row.gradients + row.state + row.activations + row.temporaries
        assert row.peak == row.events[row.event] == max(row.events.values())
        assert row.fits == (row.peak <= 16 * 2**20)


def test_auto_takes_the_preferred_method_that_fits(plan: Plan) -> None:
    fitting = [row.method for row in plan.rows if row.fits]
    assert fitting
    assert not plan.row("adamw").fits
    assert choose(plan) == min(fitting, key=lambda key: registry.card(key).auto_rank)
    assert choose(tare.plan("tiny", batch=2, seq=64)) == "adamw"


def plan_keys(plan: Plan) -> list[str]:
    return [row.method for row in plan.rows]


def test_json_and_table(plan: Plan) -> None:
    data = json.loads(json.dumps(plan.to_json()))
    assert data["budget"] == 16 * 2**20
    assert data["rows"][0]["peak"] == plan.rows[0].peak
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.table())
    text = console.export_text()
    assert all(key in text for key in plan_keys(plan))
    assert "fits" in text
    assert "MiB" in text


@pytest.mark.parametrize("budget", ["12MiB", "8MiB", "6MiB"])
def test_advice_fits_when_followed(budget: str) -> None:
    plan = tare.plan("tiny", budget=budget, batch=4, seq=256)
    assert plan.advice is not None
    assert plan.advice.fits
    flags = plan.advice.flags.split()
    value = {flag: flags[i + 1] for i, flag in enumerate(flags[:-1])}
    hyper = {"rank": int(value["--rank"])} if "--rank" in flags else {}
    followed = tare.plan(
        "tiny",
        budget=budget,
        batch=int(value.get("--batch", 4)),
        seq=int(value.get("--seq", 256)),
        methods=[plan.advice.method],
        checkpointing="--checkpointing" in flags,
        release="--release" in flags,
        precision=value.get("--precision", "fp32"),
        storage={"moment": "int8"} if "--method.storage.moment" in flags else None,
        hyper=hyper,
    )
    assert followed.rows[0].fits
    assert followed.rows[0].peak == plan.advice.peak


def test_the_gentlest_change_is_preferred() -> None:
    full = tare.plan("tiny", batch=4, seq=256)
    light = tare.plan("tiny", batch=4, seq=256, checkpointing=True)
    budget = min(row.peak for row in full.rows) - 1
    assert min(row.peak for row in light.rows) <= budget
    advice = tare.plan("tiny", budget=budget, batch=4, seq=256).advice
    assert advice is not None
    assert advice.flags == "--checkpointing"


def test_impossible_budget_names_the_minimum() -> None:
    plan = tare.plan("tiny", budget="1MiB", batch=4, seq=256)
    assert plan.advice is not None
    assert not plan.advice.fits
    with pytest.raises(DoesNotFit) as error:
        choose(plan)
    message = str(error.value)
    assert "\n" not in message
    assert "1.00 MiB" in message
    assert "least that is possible" in message


def test_a_chosen_method_that_does_not_fit(plan: Plan) -> None:
    assert require_fit(plan, "apollo-mini").fits
    with pytest.raises(DoesNotFit, match=r"adamw needs .* --method adamw --.* apollo-mini.* would fit"):
        require_fit(plan, "adamw")


def test_release_needs_whole_gradients_where_the_method_does() -> None:
    plan = tare.plan("tiny", budget="1GiB", batch=1, seq=32, release=True, accumulate=2)
    assert not plan.row("apollo").fits
    assert "--release" in plan.row("apollo").note
    assert plan.row("galore").fits


def test_options_reach_the_methods_that_have_them() -> None:
    plan = tare.plan("tiny", batch=1, seq=32, hyper={"rank": 8}, methods=["adamw", "galore"])
    assert plan.row("galore").options["rank"] == 8
    assert "rank" not in plan.row("adamw").options
    small = dataclasses.replace(plan.settings, hyper={"rank": 4})
    assert plan_row(small, "galore").state < plan.row("galore").state


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "llama-8b"}, ["llama-7b"]),
        ({"budget": "8"}, ["unit"]),
        ({"budget": -1}, ["budget"]),
        ({"methods": ["galor"]}, ["galore"]),
        ({"hyper": {"rnak": 8}}, ["rank"]),
        ({"hyper": {"rank": 0}}, ["rank"]),
        ({"storage": {"moments": "int8"}}, ["moment"]),
        ({"storage": {"moment": "int3"}}, ["int8"]),
        ({"accumulate": 0}, ["accumulate"]),
        ({"seq": 5000}, ["1024"]),
    ],
)
def test_bad_input(arguments: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        tare.plan(**{"model": "tiny", "batch": 1, "seq": 16, "methods": ["galore"], **arguments})
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_model_in_hand_can_be_planned() -> None:
    from tare.plan.models import build_model

    plan = tare.plan(build_model("tiny", dtype="bf16"), batch=1, seq=16, methods=["lion"])
    assert plan.settings.precision == "bf16"
    with pytest.raises(InputError, match="config"):
        tare.plan(__import__("torch").nn.Linear(2, 2))


def test_importing_the_planner_is_light() -> None:
    code = "import sys, tare.plan; assert callable(tare.plan); sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
