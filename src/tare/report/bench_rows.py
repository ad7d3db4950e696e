"""What `tare bench step` compares: torch's fused AdamW, which is the bar, and every registered method. Other packages: `bench_peers`."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.optimizer import Optimizer
from tare.core.weights import plain_parts, quantize_weights_
from tare.methods import registry
from tare.plan.resolve import resolve
from tare.report.bench_shapes import LAYER, Bench, shares
from tare.report.bench_specs import MethodSpec, everything, parse

Kind = Literal["torch", "tare", "peer"]
BAR = "torch-adamw-fused"
LR = 1e-6  # small: the same gradients are applied hundreds of times
PLAIN = "adamw-8bit-plain"


@dataclass(frozen=True)
class Spec:
    """One row: how its optimizer is built.

    package: what must be importable. native: False runs without the C++ kernels. against: our row that it competes with. slow: compiles
    for so long that it only runs when asked for. cuda: whether it needs a GPU. rank: of its projection, where it has one.
    period: steps between refreshes, of rows that time them.
    """

    key: str
    label: str
    kind: Kind
    build: Callable[[Bench], torch.optim.Optimizer]
    package: str = ""
    native: bool = True
    against: str = ""
    slow: bool = False
    cuda: bool = False
    rank: Callable[[Bench], int | None] = lambda bench: None
    period: int = 0


@dataclass
class Contender:
    """A row's optimizer, ready to step."""

    spec: Spec
    optimizer: torch.optim.Optimizer
    first_ms: float = 0.0
    graphs: int = 0  # compiled while it warmed up
    notes: list[str] = field(default_factory=list)
    restore: Callable[[], None] = lambda: None  # after a sample, where the optimizer changes the gradients

    def step(self) -> None:
        if self.spec.native:
            self.optimizer.step()
        else:
            with environment("TARE_NATIVE", "0"):
                self.optimizer.step()

    def weights(self) -> list[Tensor]:
        """The parameters that it steps; those of the bench, but for methods of int8 weights, which have their own."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def jump(self, count: int) -> None:
        """Pretend that `count` steps were done, so that a refresh can be brought about."""
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), int):
                state["step"] = count

    def refreshed(self) -> int | None:
        """A number that changes with every refresh; None where none is noted."""
        found = [s["refreshed"] for s in self.optimizer.state.values() if isinstance(s.get("refreshed"), int)]
        return sum(found) if found else None


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """One environment variable set for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# -- bytes -----------------------------------------------------------------------------------------------------------


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor reachable from the optimizer's state, projectors and tensor subclasses included, each once."""
    seen: dict[int, int] = {}
    _walk(list(optimizer.state.values()), seen, set(), depth=0)
    return sum(seen.values())


def _walk(value: Any, seen: dict[int, int], visited: set[int], depth: int) -> None:
    if depth > 6 or id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        else:
            for name in inner()[0]:
                _walk(getattr(value, name), seen, visited, depth + 1)
        return
    if isinstance(value, dict):
        parts: list[Any] = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        _walk(part, seen, visited, depth + 1)


def moved_bytes(contender: Contender, bench: Bench) -> int:
    """The least bytes that a step between refreshes moves: weights read and written, gradients read, state at its stored width.

    Moments are read and written, bases only read. Of other packages we know the size of the state and not what is a basis in it: all
    counts as read and written.
    """
    optimizer = contender.optimizer
    if not isinstance(optimizer, Optimizer):
        return _passed(tuple(bench.model.parameters())) + 2 * state_bytes(optimizer)
    slots = [slot for row in optimizer._rows() for slot in row.slots.values()]
    named = dict(zip((leaf.name for leaf in optimizer.leaves), contender.weights(), strict=True))
    turns = [
        [named[name] for name in names] for names in optimizer.trained_sets()
    ]  # where blocks take turns, the largest
    stepped = max(map(_passed, turns)) if turns else _passed(tuple(named.values()))
    return stepped + sum(slot.bytes * (1 if slot.spec.kind == "basis" else 2) for slot in slots)


def _passed(parameters: Sequence[Tensor]) -> int:
    """Bytes of weights, twice, and of their gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    kept = [part for p in parameters for part in plain_parts("", p.detach()).values()]
    return sum(2 * part.numel() * part.element_size() for part in kept) + sum(
        grad.numel() * grad.element_size() for grad in gradients
    )


# -- rows ------------------------------------------------------------------------------------------------------------


def torch_adamw(**options: Any) -> Callable[[Bench], torch.optim.Optimizer]:
    return lambda bench: torch.optim.AdamW(bench.model.parameters(), lr=LR, weight_decay=0.0, **options)


BAR_SPEC = Spec(BAR, "torch AdamW fused (the bar)", "torch", torch_adamw(fused=True))


def ours(bench: Bench, methods: list[MethodSpec] | None) -> list[Spec]:
    """The rows of our methods; None for all, and the variants that belong beside them.

    Where a method's basis is the exact SVD, its timed row takes the one-step range finder instead: between refreshes both cost the same,
    and the first step is not a minute long. The refreshes themselves are timed with the method's own basis.
    """
    if methods is not None:
        return [_row(spec, bench) for spec in methods]
    rows = [_row(spec, bench) for spec in everything()]
    for text in _variants(bench):
        try:
            rows.append(_row(parse(text)[0], bench))
        except InputError:
            continue  # a method or an option that this version has not
    for row in list(rows):
        if row.key == "adamw-8bit" and bench.device.type == "cpu":
            rows.append(replace(row, key=PLAIN, label="adamw-8bit, no compiler", native=False))
    return rows


def _variants(bench: Bench) -> list[str]:
    wanted = [f"apollo:rank={rank}" for rank in shares(bench) if chosen(parse("apollo")[0], bench, "rank") != rank]
    if bench.dtype == "bf16":  # the ways to write 16-bit weights
        for key in ("adamw", "adamw-8bit", "apollo-mini"):
            wanted += [f"{key}:storage.weight={form}" for form in ("plain", "split24", "int8")]
    return wanted


def _preset(key: str, bench: Bench) -> dict[str, Any]:
    return registry.preset(key, bench.preset)


def chosen(spec: MethodSpec, bench: Bench, name: str) -> Any:
    """An argument of a method as it will be: as named, from the model's preset, or the constructor's default; None where there is none."""
    known = registry.options(spec.key)
    if name not in known:
        return None
    return {name: known[name].default, **_preset(spec.key, bench), **spec.options}[name]


def _row(spec: MethodSpec, bench: Bench) -> Spec:
    exact = chosen(spec, bench, "basis") == "svd" and "basis" not in spec.options
    build = maker(spec, {"basis": "randomized"} if exact else {})
    rank = chosen(spec, bench, "rank")
    return Spec(spec.text, label(spec, bench), "tare", build, against=spec.key, rank=lambda bench: rank)


def maker(spec: MethodSpec, extra: dict[str, Any]) -> Callable[[Bench], torch.optim.Optimizer]:
    """Builds a method with the presets of the bench's model. `extra` is left out where the method refuses it."""

    def build(bench: Bench) -> torch.optim.Optimizer:
        known = registry.options(spec.key)
        hyper = {"lr": LR, **({"weight_decay": 0.0} if "weight_decay" in known else {}), **spec.options}
        if bench.name.endswith(LAYER) and "active_modules" in known:
            hyper.setdefault("active_modules", ())  # the presets name modules that a single layer has not

        def made(more: dict[str, Any]) -> torch.optim.Optimizer:
            choice = resolve(
                spec.key, bench.preset, dtype=bench.dtype, hyper={**hyper, **more}, storage=spec.storage or None
            )
            return choice.build(_int8_copy(bench) if choice.storage.weight == "int8" else bench.model)

        try:
            return made(extra)
        except InputError:
            if not extra:
                raise
            return made({})

    return build


def _int8_copy(bench: Bench) -> nn.Module:
    """The model with int8 linear weights; the gradients are those of the bench."""
    model = copy.deepcopy(bench.model)
    quantize_weights_(model)
    for mine, shared in zip(model.parameters(), bench.model.parameters(), strict=True):
        mine.grad = shared.grad
    return model


def label(spec: MethodSpec, bench: Bench) -> str:
    """The method as it was named, and its rank."""
    rank = chosen(spec, bench, "rank")
    shown = f" r={rank}" if rank and "rank=" not in spec.text else ""
    return f"{spec.text}{shown}"


def refreshing(bench: Bench, methods: list[MethodSpec] | None) -> tuple[list[Spec], list[Spec]]:
    """Rows for refreshes: all matrices in one step; and with leaves that take turns, where the method can."""
    whole, staggered = [], []
    for spec in methods if methods is not None else everything():
        known = registry.options(spec.key)
        period = chosen(spec, bench, "period") or chosen(spec, bench, "gap")
        if not period:
            continue
        own = chosen(spec, bench, "basis")
        bases: list[Any] = [None, "randomized"] if own == "svd" and "basis" not in spec.options else [None]
        bases += ["gram"] if spec.key == "galore" and len(bases) > 1 else []
        for basis in bases:
            shown = basis or (own if isinstance(own, str) else "")
            name = label(spec, bench) + (f", {shown}" if shown else "")
            extra = {"basis": basis} if basis else {}
            whole.append(Spec(spec.text, name, "tare", maker(spec, extra), period=period))
            if "stagger" in known and basis != "gram":
                taking_turns = replace(spec, options={**spec.options, "stagger": True})
                staggered.append(
                    Spec(spec.text, f"{name}, staggered", "tare", maker(taking_turns, extra), period=period)
                )
    return whole, staggered
