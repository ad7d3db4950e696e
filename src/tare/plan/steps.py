"""What an optimizer keeps and what its step needs for a moment, from the real optimizer running on fake tensors.

State bytes are the optimizer's own exact account. Temporaries are tracked on one leaf of each kind: the engine steps leaf by
leaf, so the largest one decides; dense fp32 leaves go through fused kernels together and need none.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn

from tare.core.leaf import Leaf
from tare.core.optimizer import Optimizer
from tare.core.random import normal
from tare.core.write import CHUNK
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


def state_bytes(choice: Choice, config: "PretrainedConfig", dtype: str) -> int:
    """Bytes of optimizer state, exact, from the transforms' specs; nothing is allocated and no step is run."""
    return _on_paper(choice, config, dtype).state_bytes().total


def weight_bytes(config: "PretrainedConfig", dtype: str) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in _shapes(_text(config), dtype).parameters())


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
    return cached(what, lambda: _run(choice, _on_paper(choice, config, dtype)), _encode, _decode)


def _text(config: "PretrainedConfig") -> str:
    return json.dumps([config.model_type, config.to_dict()], sort_keys=True, default=str)


@lru_cache(maxsize=4)
def _shapes(config: str, dtype: str) -> nn.Module:
    """The model on the meta device."""
    from transformers import CONFIG_MAPPING

    kind, content = json.loads(config)
    with torch.device("meta"):
        return build_skeleton(CONFIG_MAPPING[kind].from_dict(content), DTYPES[dtype])


def _on_paper(choice: Choice, config: "PretrainedConfig", dtype: str) -> Optimizer:
    """The optimizer of the whole model on the meta device: it has leaves and an account, and no state."""
    return Choice(choice.key, choice.lr, choice.options, choice.storage).build(_shapes(_text(config), dtype))


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


def _run(choice: Choice, whole: Optimizer) -> StepCost:
    """Step one leaf of each kind: first, ordinary and refresh steps."""
    normal(0, (1,))  # its table is made once and kept: it must not be made of fake tensors
    kinds: dict[Leaf, list[str]] = {}
    first: dict[Any, Leaf] = {}
    for leaf in whole.leaves:
        sort = (leaf.shape, leaf.dtype, leaf.role, whole.recipe.find(leaf))
        kinds.setdefault(first.setdefault(sort, leaf), []).append(leaf.name)
    ordinary, refresh = {}, {}
    with fake_tensors(), native_on_paper():
        stand_ins = {leaf: nn.Parameter(_stand_in(leaf, whole)) for leaf in kinds}
        groups = [{"params": [(leaf.name, p)], "role": leaf.role} for leaf, p in stand_ins.items()]
        optimizer = Choice(choice.key, choice.lr, choice.options, choice.storage).build(groups)
        for leaf, names in kinds.items():
            common, rare = leaf_temporaries(optimizer, stand_ins[leaf])
            ordinary.update(dict.fromkeys(names, common))
            refresh.update(dict.fromkeys(names, rare))
    account = whole.state_bytes()
    return StepCost(account.total, dict(account.by_kind), ordinary, refresh)


def _stand_in(leaf: Leaf, optimizer: Optimizer) -> torch.Tensor:
    """A tensor for the leaf. Element-wise rules work in chunks, so a few chunks of a huge leaf show all there is to see."""
    transform, _ = optimizer.recipe.entries[optimizer.recipe.find(leaf)][1].resolve(leaf)
    shape = leaf.shape
    if transform.sharding == "elementwise" and len(shape) == 2 and leaf.numel > 4 * CHUNK:
        shape = (-(-4 * CHUNK // shape[1]), shape[1])
    return torch.empty(shape, dtype=leaf.dtype)


def leaf_temporaries(optimizer: Optimizer, parameter: torch.Tensor) -> tuple[int, int]:
    """Bytes that a step of this leaf needs beyond weight, gradient and state: ordinarily, and when a basis is computed."""
    parameter.grad = torch.zeros_like(parameter)
    optimizer.init_state()
    tracker = MemoryTracker()
    tracker.mark([parameter], "parameter")
    tracker.mark([parameter.grad], "gradient")
    tracker.mark((v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)), "state")
    extra = {}
    for phase in ("first", "ordinary", "refresh"):
        if phase == "refresh":
            optimizer.state[parameter]["step"] += FAR
        before = tracker.total
        with tracker, tracker.phase(phase):
            optimizer.step()
        extra[phase] = tracker.peak(phase).total - before
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
