"""A plan of a large model is little work, and the same to the byte as if all of it had been done."""

import copy
import json
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import tare
from tare.core.errors import InputError
from tare.core.leaf import named_roles
from tare.kernels import native, paper
from tare.methods import registry
from tare.plan import quick, search, steps
from tare.plan.models import build_skeleton, config_for, identity, plannable
from tare.plan.outline import Outline
from tare.plan.resolve import resolve
from tare.plan.rows import Settings, plan_row
from tare.plan.shapes import MODELS, ModelShape
from tare.plan.tracker import MemoryTracker

MANY_BLOCKS = ModelShape(
    1024, 2736, 16, 1, vocab=4096
)  # 4 and 11 blocks of 2^18 elements to a matrix, uneven ones among them
MOST = 5000  # operators of one method on all kinds of leaves of a 7B model; block by block some have 200,000


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each operator ran under the tracker."""
    seen: Counter = Counter()
    dispatch = MemoryTracker.__torch_dispatch__

    def counting(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.prim.device.default:
            seen[str(func)] += 1
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(MemoryTracker, "__torch_dispatch__", counting)
    return seen


def cost_of(key: str, config: Any, dtype: str = "fp32", storage: dict | None = None) -> steps.StepCost:
    """Computed, never read from disk."""
    choice = resolve(key, dtype=dtype, hyper={"rank": 64} if "rank" in registry.options(key) else {}, storage=storage)  # type: ignore[arg-type]
    return steps._run(choice, steps.on_paper(choice, config, dtype))


def in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of every loop, every operator asked of torch."""
    init = quick.QuickFakeMode.__init__
    monkeypatch.setattr(quick.QuickFakeMode, "__init__", lambda self, quick=True: init(self, False))
    monkeypatch.setattr(paper, "sparing", lambda wanted=True: nullcontext())


@pytest.mark.parametrize("key", registry.keys("gradient"))
def test_the_work_does_not_grow_with_the_matrices(key: str, calls: Counter) -> None:
    choice = resolve(key, "llama-7b")
    steps._run(choice, steps.on_paper(choice, MODELS["llama-7b"], "fp32"))
    assert 0 < sum(calls.values()) < MOST


CASES = [
    ("q-galore", "bf16", None), ("gradnorm-lorp", "fp32", None), ("galore-plus", "fp32", None), ("muon", "fp32", None),
    ("lanton", "fp32", None), ("swan", "fp32", None), ("fira", "bf16", {"weight": "split24"}), ("trion", "fp32", None),
    ("apollo", "bf16", {"weight": "stochastic", "moment": "int8"}), ("galore", "fp32", {"moment": "int4"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "dtype", "storage"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("kernels", [True, False], ids=["native", "plain"])
def test_a_part_of_a_loop_stands_for_all_of_it(
    key: str, dtype: str, storage: dict | None, kernels: bool, calls: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
        monkeypatch.setattr("tare.kernels.library.available", lambda: False)
    quickly = cost_of(key, MANY_BLOCKS, dtype, storage)
    few = sum(calls.values())
    calls.clear()
    in_full(monkeypatch)
    assert cost_of(key, MANY_BLOCKS, dtype, storage) == quickly
    assert sum(calls.values()) >= few


def test_loops_are_walked_in_part_only_on_paper() -> None:
    assert list(paper.few(range(9))) == list(range(9))
    with native.on_paper():
        assert list(paper.few(range(9))) == list(range(9))  # real tensors
        with FakeTensorMode():
            assert list(paper.few(range(9))) == [0, 1, 8]
            assert list(paper.few(range(3))) == [0, 1, 2]
            assert list(paper.few([])) == []
            with unset_fake_temporarily():  # a table that is kept is made whole
                assert list(paper.few(range(9))) == list(range(9))
    with FakeTensorMode():
        assert list(paper.few(range(9))) == list(range(9))


def program(mode: FakeTensorMode) -> list[tuple]:
    """What a step may do with matrices, twice over, and what came of it."""
    results: list[Any] = []
    with mode:
        for _ in range(2):
            a, b = torch.empty(64, 48), torch.empty(64, 48, dtype=torch.bfloat16)
            flat, square = a.view(-1), torch.empty(64, 64)
            for start in (0, 16, 32):
                part = a[start : start + 16]
                results += [
                    part,
                    part.mT,
                    part * 2,
                    part.to(torch.bfloat16),
                    part.mul_(2.0),
                    b[start : start + 16] + part,
                ]
                results += [flat[start * 48 :], part @ part.mT, part.sum(0), part.sum(), part.amax(1, keepdim=True)]
                results += [torch.addmm(square[:16, :16], part, part.mT, out=square[:16, :16]), part.t().contiguous()]
                results += [*part.split(5), *part.topk(3), *part.sort(dim=-1), part.unsqueeze(1), part.select(0, 3)]
                results += [part.view(torch.int32), part.view(torch.int32) >> 3, part.bool(), part.expand(2, 16, 48)]
                results += [part.as_strided((2, 3), (5, 1)), part.as_strided((2, 3), (5, 1), 7), part.diagonal()]
            results += [a.T[5:9], a[::3, 1::2], a.flatten(), a.reshape(32, 96), a.T.reshape(-1), a.permute(1, 0)]
            results += [torch.cat((a, a)), torch.stack((a, a)), torch.where(a > 0, a, 0.0), a.clone(), a.new_zeros(3)]
            results += [
                torch.linalg.vector_norm(a),
                torch.linalg.vector_norm(a, dim=0),
                torch.linalg.vecdot(a, a, dim=0),
            ]
            results += [*torch.linalg.svd(a, full_matrices=False), *torch.linalg.qr(a), torch.tensor(3.0) * 2, a / 3]
            results += [a * 1, a * True, a * 1.0, a.long() * 2, a.long() * 2.0, a.long() / 2, torch.ones(()).add_(1)]
            results += [
                torch.fft.fft(a, dim=-1).real,
                a.T.clone(),
                torch.empty_like(a.T),
                a.T * a.T,
                a.expand(2, 64, 48) + 1,
            ]
    places: dict[int, int] = {}
    return [
        (tuple(x.shape), x.stride(), x.dtype, x.device.type, x.storage_offset(), x.untyped_storage().nbytes(),
         places.setdefault(x.untyped_storage()._cdata, len(places)))
        for x in results
    ]  # fmt: skip


def test_remembered_answers_are_those_of_torch() -> None:
    mode = quick.QuickFakeMode()
    assert (
        program(mode)
        == program(quick.QuickFakeMode(quick=False))
        == program(FakeTensorMode(allow_non_fake_inputs=True))
    )
    assert mode.answered > 200


def test_a_copied_layer_keeps_the_mode() -> None:
    """Else the copy holds weak references to storages twice, and the heap is broken some time after (adapters copy heads)."""
    with quick.QuickFakeMode() as mode:
        layer = nn.Linear(3, 4)
        copied = copy.deepcopy(layer)
        assert copied.weight.fake_mode is mode  # type: ignore[union-attr]
        assert copied(torch.empty(2, 3)).shape == (2, 4)
        assert copied.weight.untyped_storage()._cdata != layer.weight.untyped_storage()._cdata


def test_answers_depend_on_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    found = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            for _ in range(2):
                with quick.QuickFakeMode():
                    found.append((torch.empty(4, 4, dtype=torch.int32) / 2).dtype)
    finally:
        torch.set_default_dtype(before)
    assert found == [torch.float32, torch.float32, torch.float64, torch.float64]


@pytest.mark.parametrize("order", [("dct-adamw", "trion"), ("trion", "dct-adamw")])
def test_a_plan_does_not_depend_on_what_was_planned_before(order: tuple[str, str]) -> None:
    shape = ModelShape(
        96 if order[0] == "trion" else 104, 160, 4, 1, vocab=256
    )  # sizes whose tables no other test has made
    first = {key: cost_of(key, shape).refresh for key in order}
    assert {key: cost_of(key, shape).refresh for key in reversed(order)} == first


@pytest.mark.parametrize("name", ["llama-tiny", "llama-1b", "llama-7b"])
def test_an_outline_has_the_parameters_of_the_model(name: str) -> None:
    with torch.device("meta"):
        whole = build_skeleton(config_for(name), torch.bfloat16)
    leaves = [
        [(n, tuple(p.shape), p.dtype, role) for n, p, role in named_roles(m)]
        for m in (Outline(MODELS[name], torch.bfloat16), whole)
    ]
    assert leaves[0] == leaves[1]


@pytest.mark.parametrize("key", registry.keys("gradient"))
def test_state_is_counted_alike_with_and_without_transformers(key: str) -> None:
    choice = resolve(key, "llama-60m")
    assert steps.state_bytes(choice, plannable("llama-60m"), "fp32") == steps.state_bytes(
        choice, config_for("llama-60m"), "fp32"
    )


def test_a_config_stays_what_it_was() -> None:
    config = config_for("llama-tiny")
    before = json.dumps(identity(config), sort_keys=True, default=str)
    tare.plan(config, batch=1, seq=16, methods=["adamw"])
    assert json.dumps(identity(config), sort_keys=True, default=str) == before


def test_what_is_known_is_read_without_transformers() -> None:
    code = (
        "import sys, tare; tare.plan('llama-tiny', budget='1GiB', batch=1, seq=16, methods=['adamw', 'galore']);"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode in (0, 1)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_impossible_budget_is_seen_early(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[str] = []

    def counted(settings: Settings, key: str, budget: int | None = None) -> Any:
        planned.append(key)
        return plan_row(settings, key, budget)

    monkeypatch.setattr(search, "plan_row", counted)
    settings = Settings(plannable("llama-tiny"), "llama-tiny", 4, 256, alone=False)
    keys = registry.keys("gradient")
    advice = search.advise(settings, keys, 1 << 20)
    assert not advice.fits
    assert len(planned) < 8
    peaks = []
    for key in keys:
        changed = max(search._combinations(settings, key), key=lambda both: both[0])[1]
        row = plan_row(changed, key)
        peaks += [] if row.note else [row.peak]
    assert advice.peak == min(peaks)


def test_settings_that_no_step_can_have_are_refused_before_anything_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("tare.plan.api.plan_row", never)
    with pytest.raises(InputError, match="1024 positions"):
        tare.plan("llama-tiny", seq=5000)


def test_progress_names_what_is_looked_at() -> None:
    news: list[str] = []
    tare.plan("llama-tiny", budget="5MiB", batch=1, seq=16, methods=["adamw", "lion"], progress=news.append)
    assert [word for word in news if "of 2" in word] == ["adamw (1 of 2)", "lion (2 of 2)"]
    assert any("nothing fits" in word for word in news)
