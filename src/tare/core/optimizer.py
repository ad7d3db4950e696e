"""Optimizer: the engine. A real `torch.optim.Optimizer` that applies a recipe leaf by leaf and knows no method by name.

State is flat: `state[p]` holds tensors and ints, allocated when the optimizer is built, so that it can be counted, saved and resharded.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tare.core import loading
from tare.core.accounting import Breakdown, Row, explain
from tare.core.checks import check_betas, check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf, Role, as_groups, normalise_group
from tare.core.recipe import Recipe
from tare.core.release import Release
from tare.core.state import State, allocate
from tare.core.storage import Slot, Storage
from tare.core.tensors import is_fake
from tare.core.transform import Step, Transform, Work
from tare.core.write import update_leaf
from tare.kernels import gemm, native


@dataclass
class Entry:
    """One parameter as the engine knows it."""

    leaf: Leaf
    transform: Transform
    slots: dict[str, Slot]
    decay: Any
    key: str
    why: str
    group: dict[str, Any]
    phase: float = 0.0


class Optimizer(torch.optim.Optimizer):
    """Steps every leaf with the transform that the recipe gives it.

    Args:
        params: a module (roles come from its modules, tied weights count once), `model.named_parameters()`, tensors, or
            parameter groups, each of which may hold its own `lr`, `weight_decay`, `betas` and `role`.
        recipe: which leaf gets which transform.
        lr: learning rate; a float or a tensor with one element.
        weight_decay: decoupled decay, multiplied by lr.
        storage: how state and weights are kept.
        release: step each leaf inside backward and free its gradient at once.
        seed: key of all randomness of this optimizer.
        maximize: ascend instead of descend.

    Raises:
        InputError: for a value out of range, an unclaimed leaf, or a pattern that matches nothing.
    """

    def __init__(
        self,
        params: Any,
        recipe: Recipe,
        lr: float | Tensor,
        *,
        weight_decay: float = 0.0,
        storage: Storage | dict[str, Any] | None = None,
        release: bool = False,
        seed: int = 0,
        maximize: bool = False,
        **live: Any,
    ):
        self.recipe = recipe
        self.storage = Storage.of(storage)
        self._entries: dict[Tensor, Entry] = {}
        self._used: set[int] = set()
        self._release: Release | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "seed": check_whole("seed", seed, 0),
            "maximize": bool(maximize),
        }
        super().__init__(as_groups(params), {**defaults, **live})
        unused = recipe.unused(self._used, self.leaves)
        if unused:
            names = ", ".join(leaf.name for leaf in self.leaves[:4])
            raise InputError(f"recipe: pattern {unused[0]} matches no parameter; names look like {names}")
        self.init_state()
        if release:
            self._release = Release(self._step_in_backward)
            self._release.attach(self._entries)

    # -- parameters ------------------------------------------------------------------------------------------------

    def group_recipe(self, group: dict[str, Any]) -> Recipe:
        """The recipe of one group; methods override this to honour a group's own hyperparameters."""
        recipe = group.pop("recipe", self.recipe)
        assert isinstance(recipe, Recipe)
        return recipe

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group, roles = normalise_group(param_group)
        recipe = self.group_recipe(group)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            self._check_group(added)
            fresh = self._claim(added, recipe, roles)
        except Exception:
            self.param_groups.pop()
            raise
        self._entries.update(fresh)
        self._spread_phases()
        if getattr(self, "_ready", False):
            self.init_state()
            if self._release:
                self._release.attach(fresh)

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise InputError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
            lr = float(lr)
        check_number("learning rate", lr, 0.0, inclusive=True)
        check_number("weight_decay value", group["weight_decay"], 0.0, inclusive=True)
        if "betas" in group:
            check_betas(group["betas"])

    def _claim(self, group: dict[str, Any], recipe: Recipe, roles: dict[Tensor, Role]) -> dict[Tensor, Entry]:
        names = group.get("param_names") or [""] * len(group["params"])
        fresh: dict[Tensor, Entry] = {}
        for name, p in zip(names, group["params"], strict=True):
            if p.is_complex():
                raise InputError(f"params: {name or 'a parameter'} is complex; give torch.view_as_real of it")
            shape = tuple(p.shape)
            number = len(self._entries) + len(fresh)
            leaf = Leaf(name or f"param_{number}", shape, p.dtype, roles.get(p) or "linear")
            index = recipe.find(leaf)
            match, own = recipe.entries[index][0], [m for m, _ in self.recipe.entries]
            if match in own:
                self._used.add(own.index(match))
            transform, why = recipe.entries[index][1].resolve(leaf)
            transform.check(leaf, self.storage)
            if self.storage.weight == "stochastic" and p.dtype == torch.float16:
                raise InputError(f"storage.weight: 'stochastic' rounds bf16 weights; {leaf.name} is float16")
            slots = self.storage.slots(leaf, transform.spec(leaf))
            # Unnamed leaves are keyed by shape, so that neither their order nor their group changes any random number.
            key = name or "x".join(map(str, shape))
            fresh[p] = Entry(leaf, transform, slots, recipe.decay, key, why, group)
        return fresh

    def _spread_phases(self) -> None:
        matrices = [e for e in self._entries.values() if e.transform.sharding == "matrix"]
        for number, entry in enumerate(matrices):
            entry.phase = number / len(matrices)

    @property
    def leaves(self) -> list[Leaf]:
        """Every parameter as a leaf, in order."""
        return [self._entries[p].leaf for group in self.param_groups for p in group["params"]]

    # -- state -----------------------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate the state of every trainable leaf that has none; frozen and meta ones wait for their first gradient."""
        self._ready = True
        for p, entry in self._entries.items():
            if p not in self.state and p.requires_grad and not p.is_meta:
                self.state[p] = allocate(entry.slots, p.device)

    def _raw(self, p: Tensor, entry: Entry) -> dict[str, Any]:
        if tuple(p.shape) != entry.leaf.shape or p.dtype != entry.leaf.dtype:
            raise InputError(
                f"{entry.leaf.name}: the parameter is now {tuple(p.shape)} {p.dtype}, but the optimizer was built for "
                f"{entry.leaf.shape} {entry.leaf.dtype}; build the optimizer after the model is resized or cast"
            )
        if p not in self.state:
            self.state[p] = allocate(entry.slots, p.device)
        raw: dict[str, Any] = self.state[p]
        for name, value in raw.items():
            if isinstance(value, Tensor) and value.device != p.device:
                raw[name] = value.to(p.device)
        return raw

    def state_bytes(self) -> Breakdown:
        """Bytes of optimizer state, exact: the sum over the tensors that are kept."""
        return Breakdown.of(self._rows())

    def _rows(self) -> list[Row]:
        """Trainable leaves, and those that were trained before they were frozen: what has state, or will."""
        listed = [p for group in self.param_groups for p in group["params"] if p.requires_grad or p in self.state]
        return [Row(e.leaf, e.transform, e.slots, e.why) for e in map(self._entries.__getitem__, listed)]

    def explain(self, every_leaf: bool = False) -> str:
        """A table: which leaf is stepped by what, at which rank, kept how, in how many bytes, and why.

        every_leaf: one line for each instead of one for all that differ only in their layer's number.
        """
        notes = [f"matrix products: {gemm.describe()}"]
        if any(slot.form == "int8" for e in self._entries.values() for slot in e.slots.values()):
            notes.append(f"8-bit codec: {native.reason()}")
        if frozen := len(self._entries) - len(self._rows()):
            notes.append(f"frozen, without state: {frozen}")
        if self._release:
            notes.append("release: every leaf is stepped inside backward and its gradient freed")
        return explain(self._rows(), notes, every_leaf)

    # -- stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. closure: reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self._release.waiting() if self._release else ():  # no gradient in the last micro-batch, but before
            p.grad = torch.zeros_like(p)
            self._step_in_backward(p)
        ready = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._update(ready)
        if self._release:
            for p, _ in ready:
                p.grad = None
        return loss

    def _update(self, ready: Iterable[tuple[Tensor, dict[str, Any]]], compressed: Tensor | None = None) -> None:
        by_transform: dict[int, list[Work]] = defaultdict(list)
        transforms: dict[int, Transform] = {}
        for p, group in ready:
            if p.numel() == 0:
                continue
            entry = self._entries[p]
            work = self._work(p, entry, group, compressed)
            by_transform[id(entry.transform)].append(work)
            transforms[id(entry.transform)] = entry.transform
        for number, batch in by_transform.items():
            transform = transforms[number]
            for work in transform.update_many(batch):
                update_leaf(transform, work)

    def _work(self, p: Tensor, entry: Entry, group: dict[str, Any], compressed: Tensor | None = None) -> Work:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise InputError(
                f"{entry.leaf.name}: sparse gradients are not supported; build the embedding with sparse=False"
            )
        raw = self._raw(p, entry)
        raw["step"] += 1
        step = self._step_of(p, entry, group, raw["step"])
        state = State(raw, entry.slots, key=step.random_key(step.count, "state"))
        weight = p.detach() if p.requires_grad and not is_fake(p) else p
        rounded = self.storage.weight == "stochastic" and p.dtype == torch.bfloat16
        noise = step.random_key(step.count, "weight") if rounded else None
        decay = float(group["weight_decay"])
        return Work(weight, grad, state, step, decay, entry.decay, group["maximize"], compressed, noise)

    def _step_of(self, p: Tensor, entry: Entry, group: dict[str, Any], count: int) -> Step:
        lr, seed = float(group["lr"]), int(group["seed"])
        return Step(lr, count, entry.leaf, p, entry.key, seed, entry.phase, group)

    # -- release ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step_in_backward(self, p: Tensor) -> None:
        assert self._release is not None
        entry = self._entries[p]
        group = entry.group
        if self._release.accumulating:
            if entry.transform.accumulates:
                raw = self._raw(p, entry)
                step = self._step_of(p, entry, group, raw["step"] + 1)
                assert p.grad is not None
                part = entry.transform.compress(p.grad, State(raw, entry.slots), step)
                if part is not None:
                    self._release.add(p, part)
                    p.grad = None
            return
        self._update([(p, group)], self._release.take(p))
        p.grad = None

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around every backward but the last of a step. Only release mode needs it; elsewhere it does nothing.

        Raises:
            InputError: in release mode, where some transform needs the whole gradient of a matrix.
        """
        if self._release is None:
            yield
            return
        for entry in self._entries.values():
            if entry.transform.sharding == "matrix" and not entry.transform.accumulates:
                raise InputError(
                    f"release with accumulation: {entry.transform.describe()} scales the raw gradient of "
                    f"{entry.leaf.name}, so it needs the whole one; use release=False or one micro-batch per step"
                )
        with self._release.pause():
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; in release mode also what micro-batches have gathered so far is dropped."""
        super().zero_grad(set_to_none)
        if self._release:
            self._release.clear()

    def close(self) -> None:
        """Remove the release hooks."""
        if self._release:
            self._release.detach()
            self._release = None

    # -- saving ----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave. No tensor changes dtype; a mismatch of names, shapes or dtypes raises.

        Raises:
            CheckpointError: naming the leaf and what differs.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        theirs = state_dict["param_groups"]
        loading.check_groups(self.param_groups, theirs)
        order = loading.match_order(self.param_groups, theirs)
        mine = [p for group in self.param_groups for p in group["params"]]
        loaded: dict[Tensor, dict[str, Any]] = {}
        for p, number in zip(mine, order, strict=True):
            raw = state_dict["state"].get(number)
            if raw is not None:
                entry = self._entries[p]
                loading.check_leaf(entry.leaf, entry.slots, raw)
                loaded[p] = {name: loading.place(value, p.device) for name, value in raw.items()}
        for group, saved in zip(self.param_groups, theirs, strict=True):
            group.update(copy.deepcopy({k: v for k, v in saved.items() if k not in ("params", "param_names")}))
        self.state = defaultdict(dict, loaded)
        self.init_state()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_release"] = None  # hooks belong to the original's parameters
        return {k: v for k, v in state.items() if not k.endswith("_hooks")}  # as torch: hooks are not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._patch_step_function()
