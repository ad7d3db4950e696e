"""A plan for many ranks: what torch's own engine does in a pretended group is what arithmetic says; state of all ranks is that of one."""

import json
import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tare
from tare.cli.main import main
from tare.core.errors import InputError
from tare.core.shard import apart_steps
from tare.core.shard.layout import local
from tare.methods import registry
from tare.parallel.wrap import cut
from tare.plan import links, traffic
from tare.plan.activations import Tokens, fake_tensors, profile_model
from tare.plan.models import build_model, build_skeleton, full
from tare.plan.onegroup import RankTracker, can_follow, pretended, track_shards
from tare.plan.rank_rows import cut_moments
from tare.plan.ranks import Ranks
from tare.plan.resolve import resolve
from tare.plan.rows import Settings
from tare.plan.search import advise
from tare.plan.shapes import MODELS, ModelShape
from tare.plan.sharded import pieces, sharded
from tare.plan.shares import shares
from tare.plan.steps import StepCost, model_on_paper, on_paper, step_cost
from tare.plan.units import units

SMALL = ModelShape(96, 260, 4, 3, vocab=301)  # no dimension but the first divides by 8
HELD = {"rank": 16}
FOLLOWS = pytest.mark.skipif(not can_follow(), reason="this torch has no collectives on fake tensors")


def settings_of(gpus: int, parallel: str = "fsdp", **own: Any) -> Settings:
    shards = own.pop("shards", None)
    return Settings(SMALL, "small", 2, 32, ranks=Ranks(gpus, parallel, shards), **own)  # type: ignore[arg-type]


@FOLLOWS
@pytest.mark.parametrize(
    ("dtype", "checkpointing", "cut", "replicas"),
    [
        ("fp32", False, 1, 1), ("fp32", False, 2, 1), ("fp32", True, 8, 1), ("bf16", False, 2, 2), ("bf16", True, 8, 1),
        ("fp32", True, 64, 1),
    ],
)  # fmt: skip
def test_arithmetic_is_what_torch_does(dtype: Any, checkpointing: bool, cut: int, replicas: int) -> None:
    profile = profile_model(SMALL, 2, 32, dtype=dtype, checkpointing=checkpointing)
    of = pieces(model_on_paper(SMALL, dtype), cut)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    weights, seen = track_shards(
        full(SMALL), 2, 32, kind, dtype, shards=cut, replicas=replicas, checkpointing=checkpointing
    )
    found = sharded(profile.stretches, of, replicas=replicas)
    assert weights - sum(piece.shard for piece in of.values()) == profile.weights - sum(p.weights for p in of.values())
    assert found.gradients == seen.gradients
    for event in ("forward", "backward", "evaluation"):
        assert getattr(found, event).total == pytest.approx(getattr(seen, event).total, rel=0.001), event
    assert seen.backward.gathered > 0


@pytest.mark.slow
@FOLLOWS
def test_seven_billion_on_eight_ranks() -> None:
    shape = MODELS["llama-7b"]
    profile = profile_model(shape, 1, 2048, dtype="bf16", checkpointing=True)
    _, seen = track_shards(full(shape), 1, 2048, torch.bfloat16, "bf16", shards=8, checkpointing=True)
    found = sharded(profile.stretches, pieces(model_on_paper(shape, "bf16"), 8))
    for event in ("forward", "backward", "evaluation"):
        assert getattr(found, event).total == getattr(seen, event).total, event


@pytest.mark.parametrize("key", registry.keys("gradient"))
def test_the_state_of_all_ranks_is_that_of_one_process(key: str) -> None:
    choice = resolve(key, hyper={name: 16 for name in HELD if name in registry.options(key)})
    optimizer = on_paper(choice, SMALL, "fp32")
    total = int(optimizer.state_bytes())
    for size in (1, 2, 3, 8, 64):
        found = shares(optimizer, StepCost(0, {}, {}, {}), size)
        assert sum(found.states) == total
        assert found.first.state - optimizer.state_bytes().shared == found.states[0]


@pytest.mark.parametrize(("key", "hyper"), [("adamw", {}), ("galore", HELD), ("muon", {})])
def test_what_a_step_needs_on_a_rank(key: str, hyper: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine itself on rank 0 of a pretended group, every leaf: bases computed, bases sent, an ordinary step."""
    choice = resolve(key, hyper=hyper)
    book = shares(on_paper(choice, SMALL, "fp32"), step_cost(choice, SMALL, "fp32"), 2).first
    flag = 0

    def flags(own: Any, counts: Any, group: Any, device: Any) -> Any:  # which a pretended group does not bring
        return [[flag] * count for count in counts]

    monkeypatch.setattr(apart_steps, "flags_of_all", flags)
    monkeypatch.setattr(dist, "all_to_all_single", lambda got, *sent, **group: got.zero_())
    with pretended(2) as mesh:
        model = build_model(full(SMALL))
        cut(model, [part for _, part in units(model)], mesh)
        optimizer = choice.build(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        tracker = RankTracker()
        state = [local(v) for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
        tracker.mark(map(local, model.parameters()), "parameter")
        tracker.mark((local(p.grad) for p in model.parameters()), "gradient")
        tracker.mark(state, "state")
        assert sum(t.numel() * t.element_size() for t in state) == book.state
        before, held = tracker.total, 0
        with tracker:
            for flag in (apart_steps.WHOLE, apart_steps.BASIS, apart_steps.APART):
                with tracker.phase(str(flag)):
                    optimizer.step()
                held = tracker.total - before
        del model, optimizer
    assert held == pytest.approx(book.held, abs=4096)
    largest = 260 * 96 * 4
    ordinary = tracker.peak(str(apart_steps.APART)).total - before - held
    assert ordinary == pytest.approx(book.ordinary.total, abs=largest)
    if book.held:
        refresh = tracker.peak(str(apart_steps.WHOLE)).total - before
        assert refresh == pytest.approx(book.refresh.total, abs=largest)


class Counting(TorchDispatchMode):
    """Counts collectives and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        name = func._schema.name
        for kind, at in (("_allgather_base_", 0), ("_reduce_scatter_base_", 1), ("allreduce_", 0)):
            if name == f"c10d::{kind}":
                tensors = args[at] if isinstance(args[at], list) else [args[at]]
                self.calls[kind] += 1
                self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


@FOLLOWS
@pytest.mark.parametrize(("gpus", "parallel", "shards"), [(8, "fsdp", None), (8, "hsdp", 4)])
def test_messages_are_those_that_torch_sends(gpus: int, parallel: str, shards: int | None) -> None:
    settings = settings_of(gpus, parallel, shards=shards)
    choice = resolve("adamw")
    found = cut_moments(settings, choice, step_cost(choice, SMALL, "fp32"), settings.profile(), None)
    ranks = settings.ranks
    assert ranks is not None
    with pretended(ranks.cut, ranks.replicas) as mesh, fake_tensors():
        model = build_skeleton(full(SMALL), torch.float32).train()
        cut(model, [part for _, part in units(model)], mesh)
        work = Tokens(torch.zeros(2, 32, dtype=torch.long))
        with Counting() as seen:
            work.loss(model, work.tokens).backward()
        del model
    sent = {message.collective: message for message in found.messages if message.what != "norms of gradients"}
    names = {"all-gather": "_allgather_base_", "reduce-scatter": "_reduce_scatter_base_", "all-reduce": "allreduce_"}
    assert {kind: (m.count, m.bytes) for kind, m in sent.items()} == {
        kind: (seen.calls[name], seen.bytes[name]) for kind, name in names.items() if seen.calls[name]
    }


def test_many_ranks_cost_nothing() -> None:
    shape = MODELS["llama-7b"]
    model, choice = model_on_paper(shape, "bf16"), resolve("galore", "llama-7b", dtype="bf16")
    optimizer = on_paper(choice, shape, "bf16")
    stretches = profile_model(SMALL, 2, 32).stretches
    start = time.process_time()
    of = pieces(model, 1024)
    sharded(stretches, {number: of[number] for number in (-1, 0, 1, 2)})
    found = shares(optimizer, StepCost(0, {}, {}, {}), 1024)
    assert time.process_time() - start < 2.0
    assert sum(found.states) == int(optimizer.state_bytes())
    assert found.anew.count == 3


def test_more_ranks_need_less() -> None:
    rows = {
        gpus: tare.plan("llama-tiny", batch=1024, seq=32, methods=["galore"], gpus=gpus, parallel="fsdp").row("galore")
        for gpus in (64, 1024)
    }
    assert rows[64].ranks.how == rows[1024].ranks.how == "computed"  # type: ignore[union-attr]
    assert rows[1024].weights < rows[64].weights / 3
    for row in rows.values():
        parts = row.weights + row.gradients + row.state + row.activations + row.temporaries + row.gathered
        assert parts == row.peak == row.events[row.event] == row.ranks.worst.peak  # type: ignore[union-attr]
        assert row.ranks.first.peak <= row.ranks.worst.peak  # type: ignore[union-attr]


def test_whole_models() -> None:
    one = tare.plan("llama-tiny", batch=2, seq=64, methods=["adamw"]).row("adamw")
    both = tare.plan("llama-tiny", batch=4, seq=64, methods=["adamw", "badam"], gpus=2)
    row = both.row("adamw")
    assert (row.weights, row.state) == (one.weights, one.state)
    assert (
        row.events["end of forward"] == one.events["end of forward"] + one.weights - 128
    )  # buckets; buffers have none
    assert [m.collective for m in row.ranks.traffic] == ["all-reduce"]  # type: ignore[union-attr]
    turns = both.row("badam").ranks
    assert turns is not None
    assert turns.traffic[0].bytes < row.ranks.traffic[0].bytes  # type: ignore[union-attr]
    assert "ranks" not in json.dumps(tare.plan("llama-tiny", seq=8, methods=["adamw"]).to_json()["advice"])


def test_micro_batches() -> None:
    rows = {
        sync: tare.plan(
            "llama-tiny", batch=4, seq=16, methods=["adamw"], gpus=2, parallel="fsdp", accumulate=2, sync=sync
        )
        for sync in ("batch", "step")
    }
    often, once = (rows[sync].row("adamw") for sync in ("batch", "step"))
    assert often.events["end of forward"] < once.events["end of forward"]
    bytes_of = {sync: {m.collective: m.bytes for m in plan.rows[0].ranks.traffic} for sync, plan in rows.items()}
    assert bytes_of["batch"]["reduce-scatter"] == 2 * bytes_of["step"]["reduce-scatter"]
    assert bytes_of["batch"]["all-gather"] == bytes_of["step"]["all-gather"]


def test_buckets() -> None:
    mib = 2**20
    assert traffic.buckets([]) == 0
    assert traffic.buckets([mib]) == 1
    assert traffic.buckets([mib, mib]) == 2
    assert traffic.buckets([mib, 24 * mib, mib, mib]) == 3


def test_speeds() -> None:
    inner, outer = links.parse_links("nvlink4,infiniband-ndr")
    both = (inner, outer)
    assert traffic.speed("all", Ranks(8), both) == 450e9
    assert traffic.speed("all", Ranks(64), both) == 400e9  # eight adapters of 50 GB/s
    assert traffic.speed("all", Ranks(64, node=4), both) == 200e9
    hsdp = Ranks(64, "hsdp", 8)
    assert traffic.speed("shards", hsdp, both) == 450e9
    assert traffic.speed("replicas", hsdp, both) == 50e9
    assert traffic.speed("replicas", Ranks(8, "hsdp", 4), both) == 450e9  # two groups on one machine
    assert (
        traffic.speed("replicas", Ranks(64, "hsdp", 2), both) == 200e9
    )  # four replicas of each machine share its links
    each = traffic.message("gradients", "all-reduce", 1, 64 * 10**9, 64, "all")
    assert each.sent == 2 * 63 * 10**9
    assert traffic.seconds(each, Ranks(64), both) == pytest.approx(2 * 63 / 400)


def test_a_model_that_does_not_fit_whole_is_cut() -> None:
    settings = settings_of(8, "ddp")
    row = tare.plan(full(SMALL), batch=16, seq=32, methods=["adamw"], gpus=8).row("adamw")
    found = advise(settings, ["adamw"], int(row.peak * 0.6))
    assert found.fits
    assert "--parallel fsdp" in found.flags


BAD = [
    ({"gpus": 0}, "gpus"), ({"gpus": "8"}, "gpus"), ({"gpus": 8, "batch": 4}, "batch 4 is smaller than 8 ranks"),
    ({"gpus": 8, "batch": 12}, "batch 12 does not divide among 8"), ({"gpus": 8, "parallel": "pipe"}, "parallel"),
    ({"gpus": 8, "parallel": "hsdp"}, "shards: missing"), ({"gpus": 8, "parallel": "hsdp", "shards": 3}, "use one of 1, 2, 4, 8"),
    ({"gpus": 8, "parallel": "fsdp", "shards": 2}, "goes with hsdp"), ({"parallel": "fsdp"}, "give --gpus"),
    ({"link": "nvlink4"}, "give --gpus"), ({"gpus": 2, "link": "nvlin"}, "nvlink"), ({"gpus": 2, "link": "1GB/s,1GB/s,1GB/s"}, "3 links"),
    ({"gpus": 2, "link": "0GB/s"}, "neither a speed"), ({"gpus": 2, "gpus_per_node": 0}, "gpus_per_node"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(own: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as fault:
        tare.plan("llama-tiny", **{"seq": 16, "methods": ["adamw"], **own})
    assert "\n" not in str(fault.value)


def test_what_cannot_be_cut_is_said() -> None:
    found = tare.plan("llama-tiny", seq=16, methods=["mezo", "galore"], gpus=2, parallel="fsdp", release=True)
    assert "--workers" in found.row("mezo").note
    assert "no --release" in found.row("galore").note
    assert tare.plan("llama-tiny", seq=16, methods=["adamw"], gpus=2, parallel="fsdp", release=True).rows[0].note == ""


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    asked = [
        "plan",
        "llama-tiny",
        "--methods",
        "adamw",
        "--seq",
        "16",
        "--gpus",
        "16",
        "--parallel",
        "fsdp",
        "--link",
        "nvlink4",
    ]
    assert main([*asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["batch"], said["batch_of_rank"], said["ranks"]["gpus"]) == (16, 1, 16)  # one sequence a rank
    ranks = said["rows"][0]["ranks"]
    assert ranks["how"] == "computed"
    assert len(ranks["seconds"]) == len(ranks["traffic"])
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "16 ranks by fsdp" in shown
    assert "all-gather of weights" in shown
    assert "gathered" in shown
    assert main([*asked, "--batch", "4"]) == 2
    assert "batch 4 is smaller than 16 ranks" in capsys.readouterr().err
