"""What an optimizer keeps and what its step needs for a moment, from the real optimizer running on fake tensors.

State bytes are the optimizer's own exact account. Temporaries are tracked on one leaf of each kind: the engine steps leaf by
leaf, so the largest one decides; dense fp32 leaves go through fused kernels together and need none.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tare.core import weights
from tare.core.int8_weight import Int8Weight
from tare.core.leaf import Leaf
from tare.core.optimizer import Optimizer
from tare.core.random import normal
from tare.core.write import CHUNK
from tare.kernels import native
from tare.plan.activations import Workload, fake_tensors
from tare.plan.cache import cached
from tare.plan.kinds import Kind
from tare.plan.models import DTYPES, build_skeleton, identity
from tare.plan.outline import Outline
from tare.plan.resolve import Choice
from tare.plan.shapes import ModelShape
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
    parts: dict[str, int] = field(
        default_factory=dict
    )  # leaf name -> its projected gradient, where micro-batches sum it
    gather: dict[str, int] = field(default_factory=dict)  # the same leaves -> temporaries of projecting one micro-batch
    prepare: dict[str, int] = field(default_factory=dict)  # the same leaves -> temporaries of computing the basis alone
    turns: dict[str, int] = field(default_factory=dict)  # the same leaves -> at which update of a period they refresh
    drawn: tuple[str, ...] = ()  # of these, those whose basis is drawn from a key, and needs no gradient
    # Where not all leaves have gradients at once: those that do, at the turns that may need most memory.
    trained: tuple[tuple[str, ...], ...] = ()
    dense: dict[str, int] = field(default_factory=dict)  # why matrices have no subspace after all -> how many


def state_bytes(choice: Choice, config: "PretrainedConfig | ModelShape", dtype: str, kind: Kind = "causal") -> int:
    """Bytes of optimizer state, exact, from the transforms' specs; nothing is allocated and no step is run."""
    account = on_paper(choice, config, dtype, kind).state_bytes()
    return account.total + account.shared


def weight_bytes(config: "PretrainedConfig | ModelShape", dtype: str, quantized: bool = False) -> int:
    """Bytes of the parameters; quantized: the linear ones are int8."""
    return weights.weight_bytes(_shapes(_hashable(config), dtype, quantized))


def trained_sets(choice: Choice, config: "PretrainedConfig | ModelShape", dtype: str) -> tuple[tuple[str, ...], ...]:
    """Names of the leaves that have gradients, at the turns that may need most memory; nothing where all always have."""
    return on_paper(choice, config, dtype).trained_sets()


def step_cost(
    choice: Choice, config: "PretrainedConfig | ModelShape", dtype: str, kind: Kind = "causal", work: Workload | None = None
) -> StepCost:  # fmt: skip
    """State and temporaries of a method on a model whose weights are `dtype`, from disk if known. work: what changes its layers."""
    layers, alter = (None, None) if work is None else (work.layers(), work.alter)
    what = {
        "kind": "optimizer",
        "config": identity(config),
        "dtype": dtype,
        "key": choice.key,
        "options": repr(sorted(choice.options.items())),
        "storage": repr(choice.storage),
        "native": native.available(),
    }
    if kind != "causal":
        what["model"] = kind
    if layers is not None:
        what["layers"] = layers
        return cached(what, lambda: _run(choice, on_paper(choice, config, dtype, kind, alter)), _encode, _decode)
    return cached(what, lambda: _run(choice, on_paper(choice, config, dtype, kind)), _encode, _decode)


def accumulation_refused(
    choice: Choice, config: "PretrainedConfig | ModelShape", dtype: str, by_previous: bool, work: Workload | None = None
) -> str:  # fmt: skip
    """Why release mode cannot step on several micro-batches with this method, or nothing; see `Optimizer`."""
    kind, alter = ("causal", None) if work is None or work.layers() is None else (work.kind, work.alter)
    return on_paper(choice, config, dtype, kind, alter).accumulation_refused(by_previous)  # type: ignore[arg-type]


def _hashable(config: "PretrainedConfig | ModelShape") -> str | ModelShape:
    return config if isinstance(config, ModelShape) else json.dumps(identity(config), sort_keys=True, default=str)


@lru_cache(maxsize=4)
def _shapes(config: str | ModelShape, dtype: str, quantized: bool = False, kind: Kind = "causal") -> nn.Module:
    """The model on the meta device."""
    if isinstance(config, ModelShape):
        model: nn.Module = Outline(config, DTYPES[dtype])
    else:
        from transformers import CONFIG_MAPPING

        content = json.loads(config)
        with torch.device("meta"):
            model = build_skeleton(CONFIG_MAPPING[content["model_type"]].from_dict(content), DTYPES[dtype], kind)
    if quantized:
        weights.quantize_weights_(model)
    return model


def on_paper(
    choice: Choice, config: "PretrainedConfig | ModelShape", dtype: str, kind: Kind = "causal",
    alter: Callable[[nn.Module], nn.Module | None] | None = None,
) -> Optimizer:  # fmt: skip
    """The optimizer of the whole model on the meta device: it has leaves and an account, and no state. alter: changes the model first."""
    model = model_on_paper(config, dtype, choice.storage.weight == "int8", kind, alter)
    return Choice(choice.key, choice.lr, choice.options, choice.storage).build(model)


def model_on_paper(
    config: "PretrainedConfig | ModelShape", dtype: str, quantized: bool = False, kind: Kind = "causal",
    alter: Callable[[nn.Module], nn.Module | None] | None = None,
) -> nn.Module:  # fmt: skip
    """The parameters of a model, on the meta device. alter: changes it first."""
    model = _shapes(_hashable(config), dtype, quantized, kind)
    if alter is None:
        return model
    model = copy.deepcopy(model)  # the other is kept
    altered = alter(model)
    return model if altered is None else altered


def _run(choice: Choice, whole: Optimizer) -> StepCost:
    """Step one leaf of each kind: first, ordinary and refresh steps."""
    normal(0, (1,))  # its table is made once and kept: it must not be made of fake tensors
    kinds: dict[Leaf, list[str]] = {}
    first: dict[Any, Leaf] = {}
    quantized, frozen = set(), set()
    for leaf, p in zip(whole.leaves, (p for group in whole.param_groups for p in group["params"]), strict=True):
        if not (p.requires_grad or (whole._turns and p in whole._turns.off)):
            frozen.add(leaf.name)
            continue
        int8 = isinstance(p, Int8Weight)
        sort = (leaf.shape, leaf.dtype, leaf.role, whole.recipe.find(leaf), int8)
        kinds.setdefault(first.setdefault(sort, leaf), []).append(leaf.name)
        if int8:
            quantized.add(leaf.name)
    ordinary: dict[str, int] = {}
    refresh: dict[str, int] = {}
    parts: dict[str, int] = {}
    gather: dict[str, int] = {}
    prepare: dict[str, int] = {}
    with fake_tensors(), native.on_paper():
        for recipe in whole.phases():
            stand_ins = {leaf: nn.Parameter(_stand_in(leaf, whole, leaf.name in quantized)) for leaf in kinds}
            groups = [{"params": [(leaf.name, p)], "role": leaf.role} for leaf, p in stand_ins.items()]
            if recipe is whole.recipe:
                optimizer = Choice(choice.key, choice.lr, choice.options, choice.storage).build(groups)
            else:  # of leaves that take turns, all on, then all off
                optimizer = Optimizer(groups, recipe, choice.lr, storage=whole.storage)
            for leaf, names in kinds.items():
                common, rare = leaf_temporaries(optimizer, stand_ins[leaf])
                for name in names:
                    ordinary[name], refresh[name] = max(common, ordinary.get(name, 0)), max(rare, refresh.get(name, 0))
                if found := _part(optimizer, stand_ins[leaf]):
                    parts.update(dict.fromkeys(names, found[0]))
                    gather.update(dict.fromkeys(names, found[1]))
                    prepare.update(dict.fromkeys(names, found[2]))
    account = whole.state_bytes()
    order = [leaf.name for leaf in whole.leaves]  # which decides what leaves share a pass

    def sorted_(table: dict[str, int]) -> dict[str, int]:
        return {name: table[name] for name in order if name in table}

    return StepCost(
        account.total + account.shared,
        dict(account.by_kind),
        sorted_(ordinary),
        sorted_(refresh),
        sorted_(parts),
        sorted_(gather),
        sorted_(prepare),
        {name: turn for name, turn in _turns(whole).items() if name in parts},
        tuple(e.leaf.name for e in whole._entries.values() if e.transform.drawn and e.leaf.name in parts),
        tuple(tuple(name for name in names if name not in frozen) for names in whole.trained_sets()),
        dict(Counter(e.why.removesuffix(": dense") for e in whole._entries.values() if e.why.startswith("rank "))),
    )


def _turns(optimizer: Optimizer) -> dict[str, int]:
    """At which update of a period each leaf computes its basis: all at 0, or one after the other where they are staggered.

    A calendar with state of its own may bring leaves together that were apart: counted as all at once.
    """
    turns = {}
    for entry in optimizer._entries.values():
        calendar: Any = getattr(entry.transform, "refresh", None)
        turns[entry.leaf.name] = 0
        if getattr(calendar, "stagger", False) and not calendar.spec(1, ()):
            updates = range(1, calendar.period + 1)
            due = (n for n in updates if calendar.epoch(n, entry.phase) > calendar.epoch(n - 1, entry.phase))
            turns[entry.leaf.name] = next(due, 0)
    return turns


def _stand_in(leaf: Leaf, optimizer: Optimizer, quantized: bool) -> torch.Tensor:
    """A tensor for the leaf. Element-wise rules work in chunks, so a few chunks of a huge leaf show all there is to see."""
    transform, _ = optimizer.recipe.entries[optimizer.recipe.find(leaf)][1].resolve(leaf)
    shape = leaf.shape
    if transform.sharding == "elementwise" and len(shape) == 2 and leaf.numel > 4 * CHUNK:
        shape = (-(-4 * CHUNK // shape[1]), shape[1])
    dense = torch.empty(shape, dtype=leaf.dtype)
    return Int8Weight.encode(dense) if quantized else dense


def leaf_temporaries(optimizer: Optimizer, parameter: torch.Tensor) -> tuple[int, int]:
    """Bytes that a step of this leaf needs beyond weight, gradient and state: ordinarily, and when a basis is computed."""
    parameter.grad = torch.zeros_like(parameter)
    optimizer.init_state()
    tracker = MemoryTracker()
    tracker.mark([parameter], "parameter")
    tracker.mark([parameter.grad], "gradient")
    tracker.mark((v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)), "state")
    extra = {}
    calendar = "refreshed" in optimizer.state[parameter]
    for phase in ("first", "ordinary", "refresh") if calendar else ("first", "ordinary"):
        if phase == "refresh":
            optimizer.state[parameter]["step"] += FAR
        before = tracker.total
        with tracker, tracker.phase(phase):
            optimizer.step()
        extra[phase] = tracker.peak(phase).total - before
    parameter.grad = None
    return extra["ordinary"], max(extra.values())


def _part(optimizer: Optimizer, parameter: torch.Tensor) -> tuple[int, int, int] | None:
    """Bytes of the projected gradient that a micro-batch leaves, of making it (itself included), and of computing the basis before
    that; None where the gradient stays whole."""
    if not optimizer._entries[parameter].projects:
        return None
    raw = optimizer.state[parameter]
    raw["step"] += FAR
    raw["refresh_owed"] = 1  # also where the calendar has a period of its own
    parameter.grad = torch.zeros_like(parameter)
    tracker = MemoryTracker()
    tracker.mark([parameter], "parameter")
    tracker.mark([parameter.grad], "gradient")
    tracker.mark((v for v in raw.values() if isinstance(v, torch.Tensor)), "state")
    before = tracker.total
    with tracker, torch.no_grad():
        with tracker.phase("prepare"):
            optimizer._prepare(parameter, whole=True)
        with tracker.phase("gather"):
            part = optimizer._compressed(parameter)
    parameter.grad = None
    assert part is not None
    gather, prepare = (tracker.peak(name).total - before for name in ("gather", "prepare"))
    return part.untyped_storage().nbytes(), gather, prepare


def _encode(cost: StepCost) -> dict[str, Any]:
    return asdict(cost)


def _decode(data: dict[str, Any]) -> StepCost:
    sets = {"drawn": tuple(data["drawn"]), "trained": tuple(map(tuple, data["trained"]))}
    cost = StepCost(**{**data, **sets})
    tables = (cost.by_kind, cost.ordinary, cost.refresh, cost.parts, cost.gather, cost.prepare, cost.turns, cost.dense)
    numbers = [cost.state, *(number for table in tables for number in table.values())]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("damaged cache entry")
    return cost
