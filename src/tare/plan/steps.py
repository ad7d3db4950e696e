"""What an optimizer keeps and what its step needs for a moment, from the real optimizer running on fake tensors.

State bytes are the optimizer's own exact account. Temporaries are tracked on one leaf of each kind: the engine steps leaf by
leaf, so the largest one decides; dense fp32 leaves go through fused kernels together and need none.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn

from tare.core.optimizer import Optimizer
from tare.core.random import normal
from tare.kernels import native
from tare.plan.activations import fake_tensors
from tare.plan.cache import cached
from tare.plan.models import DTYPES, build_skeleton
from tare.plan.resolve import Choice
from tare.plan.tracker import MemoryTracker

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAR = 10**9  # updates: past the period of any calendar, so that a refresh is due


@dataclass(frozen=True)
class StepCost:
    """Bytes of one optimizer on one model."""

    state: int
    by_kind: dict[str, int]
    ordinary: dict[str, int]  # leaf name -> temporaries of its step
    refresh: dict[str, int]  # leaf name -> temporaries of its step when its basis is computed anew


def step_cost(choice: Choice, config: "PretrainedConfig", dtype: str) -> StepCost:
    """State and temporaries of a method on a model whose weights are `dtype`, from disk if known."""
    what = {
        "kind": "optimizer",
        "config": config.to_dict(),
        "dtype": dtype,
        "key": choice.key,
        "options": repr(sorted(choice.options.items())),
        "storage": repr(choice.storage),
        "native": native.available(),
    }
    return cached(what, lambda: _run(choice, config, dtype), _encode, _decode)


def _run(choice: Choice, config: "PretrainedConfig", dtype: str) -> StepCost:
    normal(0, (1,))  # its table is made once and kept: it must not be made of fake tensors
    with fake_tensors(), native_on_paper():
        model = build_skeleton(config, DTYPES[dtype])
        optimizer = Choice(choice.key, choice.lr, choice.options, choice.storage).build(model)
        return measure_steps(optimizer, model)


@contextmanager
def native_on_paper() -> Iterator[None]:
    """Native kernels refuse fake tensors. Where they exist they will do the work without temporaries, so say that they did."""
    names = ("adamw8bit_", "lion8bit_", "write_stochastic_", "encode_into", "decode_into")
    with ExitStack() as stack:
        if native.available():
            for name in names:
                stack.enter_context(patch.object(native, name, _takes_all))
        yield


def _takes_all(*tensors: Any, **options: Any) -> bool:
    return all(x.is_contiguous() for x in (*tensors, *options.values()) if isinstance(x, torch.Tensor))


def measure_steps(optimizer: Optimizer, model: nn.Module) -> StepCost:
    """Step one leaf of each (shape, dtype, role): first, ordinary and refresh steps. Call inside fake tensors."""
    parameters = dict(model.named_parameters())
    tracker = MemoryTracker()
    tracker.mark(parameters.values(), "parameter")
    tracker.mark((v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)), "state")
    seen: dict[Any, tuple[int, int]] = {}
    ordinary, refresh = {}, {}
    for leaf in optimizer.leaves:
        kind = (leaf.shape, leaf.dtype, leaf.role)
        if kind not in seen:
            seen[kind] = _leaf_cost(optimizer, parameters[leaf.name], tracker)
        ordinary[leaf.name], refresh[leaf.name] = seen[kind]
    account = optimizer.state_bytes()
    return StepCost(account.total, dict(account.by_kind), ordinary, refresh)


def _leaf_cost(optimizer: Optimizer, parameter: torch.Tensor, tracker: MemoryTracker) -> tuple[int, int]:
    parameter.grad = torch.zeros_like(parameter)
    tracker.mark([parameter.grad], "gradient")
    extra = {}
    for phase in ("first", "ordinary", "refresh"):
        if phase == "refresh":
            optimizer.state[parameter]["step"] += FAR
        before = tracker.total
        with tracker, tracker.phase(f"{id(parameter)} {phase}"):
            optimizer.step()
        extra[phase] = tracker.peak(f"{id(parameter)} {phase}").total - before
    parameter.grad = None
    return extra["ordinary"], max(extra.values())


def _encode(cost: StepCost) -> dict[str, Any]:
    return {"state": cost.state, "by_kind": cost.by_kind, "ordinary": cost.ordinary, "refresh": cost.refresh}


def _decode(data: dict[str, Any]) -> StepCost:
    cost = StepCost(**data)
    numbers = [cost.state, *cost.by_kind.values(), *cost.ordinary.values(), *cost.refresh.values()]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("damaged cache entry")
    return cost
