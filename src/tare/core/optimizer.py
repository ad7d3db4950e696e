"""Optimizer: the engine. A real `torch.optim.Optimizer` that applies a recipe leaf by leaf and knows no method by name.

State is flat: `state[p]` holds tensors and ints, allocated when the optimizer is built, so that it can be counted, saved and resharded.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tare.core import loading
from tare.core.accounting import Breakdown, Row, explain
from tare.core.checks import check_betas, check_number, check_whole
from tare.core.clipping import NotFinite
from tare.core.entry import Entry
from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.core.kept import kept_as
from tare.core.leaf import Leaf, Role, as_groups, normalise_group
from tare.core.projected import Projecting
from tare.core.random import shifted
from tare.core.recipe import Recipe
from tare.core.release import Release, Releasing
from tare.core.shard import sharding
from tare.core.shard.layout import is_sharded, local
from tare.core.shard.sharding import Sharding
from tare.core.shard.side import Side
from tare.core.storage import LOW, MASTER, Storage
from tare.core.tensors import is_fake
from tare.core.transform import Step, Transform, Work
from tare.core.turns import UPDATES, Turns, wake
from tare.core.write import update_leaf
from tare.kernels import gemm, native
from tare.kernels.triton import dispatch


class Optimizer(Releasing, Projecting, torch.optim.Optimizer):
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
        self._turns: Turns | None = None
        self._sharding = Sharding()
        self._held = {}
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
        if self.storage.weight == "int8" and not any(isinstance(p, Int8Weight) for p in self._entries):
            raise InputError(
                "storage.weight: 'int8' steps int8 weights, and there are none; call tare.quantize_weights_(model) "
                "before the optimizer is built"
            )
        self._settle()
        self.init_state()
        if release:
            self._sharding.check_release(self._entries.values())
            self._release = Release(self._step_in_backward)
            self._release.attach(self._entries)
        if self._turns:
            self._turns.gate()

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
            self._settle()
            self.init_state()
            if self._release:
                self._release.attach(fresh)
            if self._turns:
                self._turns.gate()

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise InputError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
            lr = float(lr)
        check_number("learning rate", lr, 0.0, inclusive=True)
        check_number("weight_decay value", group["weight_decay"], 0.0, inclusive=True)
        if "betas" in group:
            check_betas(group["betas"], len(self.defaults.get("betas", (0.9, 0.999))))

    def _claim(self, group: dict[str, Any], recipe: Recipe, roles: dict[Tensor, Role]) -> dict[Tensor, Entry]:
        names = group.get("param_names") or [""] * len(group["params"])
        fresh: dict[Tensor, Entry] = {}
        for name, p in zip(names, group["params"], strict=True):
            if p.is_complex():
                raise InputError(f"params: {name or 'a parameter'} is complex; give torch.view_as_real of it")
            wake(p)
            shape = tuple(p.shape)
            number = len(self._entries) + len(fresh)
            leaf = Leaf(name or f"param_{number}", shape, p.dtype, roles.get(p) or "linear")
            index = recipe.find(leaf)
            match, own = recipe.entries[index][0], [m for m, _ in self.recipe.entries]
            if match in own:
                self._used.add(own.index(match))
            transform, why = recipe.entries[index][1].resolve(leaf)
            transform.check(leaf, self.storage)
            self.storage.check_weight(leaf, isinstance(p, Int8Weight))
            slots = self.storage.slots(leaf, transform.spec(leaf))
            # Unnamed leaves are keyed by shape, so that neither their order nor their group changes any random number.
            key = name or "x".join(map(str, shape))
            rotating = transform if transform.rotation else None
            fresh[p] = Entry(leaf, transform, slots, recipe.decay, key, why, group, name_key=key, rotating=rotating)
        return fresh

    def _settle(self) -> None:
        """Place leaves that ranks share, and (re)form the blocks of those that take turns."""
        places = {p: entry for p, entry in self._entries.items() if is_sharded(p) and entry.place is None}
        self._sharding.settle(places, self.storage)
        if self._turns is None and any(entry.rotating for entry in self._entries.values()):
            self._turns = Turns(self._entries, self.param_groups, self.storage)
        if self._turns:
            self._turns.arrange(self.state)

    def _spread_phases(self) -> None:
        matrices = [e for e in self._entries.values() if (e.rotating or e.transform).sharding == "matrix"]
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
            trained = p.requires_grad or (self._turns is not None and p in self._turns.off)
            if p not in self.state and trained and not p.is_meta:
                self.state[p] = sharding.fresh(entry, p)

    def _raw(self, p: Tensor, entry: Entry) -> dict[str, Any]:
        if tuple(p.shape) != entry.leaf.shape or p.dtype != entry.leaf.dtype:
            raise InputError(
                f"{entry.leaf.name}: the parameter is now {tuple(p.shape)} {p.dtype}, but the optimizer was built for "
                f"{entry.leaf.shape} {entry.leaf.dtype}; build the optimizer after the model is resized or cast"
            )
        if p not in self.state:
            self.state[p] = sharding.fresh(entry, p)
        raw: dict[str, Any] = self.state[p]
        for name, value in raw.items():
            if isinstance(value, Tensor) and value.device != p.device:
                raw[name] = value.to(p.device)
        return raw

    def state_bytes(self) -> Breakdown:
        """Bytes of optimizer state, exact: the sum over the tensors that are kept.

        Where blocks of leaves take turns in holding state it is the turn with most of it, whichever is on now.
        """
        return Breakdown.of(self._rows())

    def _rows(self) -> list[Row]:
        """Trainable leaves, and those that were trained before they were frozen: what has state, or will."""
        listed = [p for group in self.param_groups for p in group["params"] if p.requires_grad or p in self.state]
        turning = self._turns.worst(listed) if self._turns else {}
        entries = self._entries
        return [
            turning.get(p) or Row(entries[p].leaf, entries[p].transform, entries[p].held, entries[p].why)
            for p in listed
        ]

    def phases(self) -> list[Recipe]:
        """The recipe with every leaf that takes turns on, and off; just the recipe where none does."""
        if not self._turns:
            return [self.recipe]
        return [replace(self.recipe, entries=tuple((match, transform.turn(active)) for match, transform in self.recipe.entries))
                for active in (True, False)]  # fmt: skip

    def trained_sets(self) -> tuple[tuple[str, ...], ...]:
        """Where blocks of leaves take turns in having gradients: the names of those that have, at the turns that may need most
        memory. Nothing where all leaves have gradients at all times."""
        sets = self._turns.trained() if self._turns else []
        return tuple(tuple(self._entries[p].leaf.name for p in leaves) for leaves in sets)

    def explain(self, every_leaf: bool = False) -> str:
        """A table: which leaf is stepped by what, at which rank, kept how, in how many bytes, and why.

        every_leaf: one line for each instead of one for all that differ only in their layer's number.
        """
        notes = [f"matrix products: {gemm.describe()}"]
        forms = {slot.form for e in self._entries.values() for slot in e.slots.values()}
        for form, bits in (("int8", 8), ("int4", 4)):
            if form in forms:
                notes.append(f"{bits}-bit codec: {native.reason()}")
        if any(p.device.type == "cuda" for p in self._entries):
            notes.append(f"on the GPU: {dispatch.reason()}")
        if quantized := sum(isinstance(p, Int8Weight) for p in self._entries):
            notes.append(f"int8 weights, rounded stochastically: {quantized}")
        elif self.storage.weight != "plain":
            notes.append(f"weights: {self.storage.weight}")
        if frozen := len(self._entries) - len(self._rows()):
            notes.append(f"frozen, without state: {frozen}")
        notes += self._sharding.describe(self._entries.values())
        if self._turns:
            notes += self._turns.describe()
        if self._release:
            notes.append("release: every leaf is stepped inside backward and its gradient freed")
            clipping, gathering = self._release.clipping, self._release.gathering
            if gathering.source == "first":
                notes.append("with micro-batches, a basis comes from the first one")
            elif gathering.parts > 1:
                notes.append(f"with micro-batches, bases come from their sum, in {gathering.parts} passes")
            if clipping is not None and clipping.max_norm is not None:
                notes.append(f"clipped to norm {clipping.max_norm:g}, {clipping.mode}")
        return explain(self._rows(), notes, every_leaf)

    # -- stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. closure: reevaluates the model and returns the loss.

        Raises `NotFinite` in release mode with `strict="step"`, after the update, if a gradient was not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fault = ""
        # what had no gradient in the last micro-batch, but before
        for p in self._release.gathering.waiting() if self._release else ():
            p.grad = torch.zeros_like(p)
            self._step_in_backward(p)
        ready = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._release is None:
            self._update(ready)
        elif self._release.clipping is None:
            self._update(ready)
            for p, _ in ready:
                p.grad = None
        else:
            for p, _ in ready:
                self._step_released(p)
            fault = self._release.clipping.end()
        self.drop_projections(all_leaves=True)
        if self._turns:
            self._turns.advance(self.state)
        if self._release:
            self._release.ended()
        self.stepped()
        if fault:
            raise NotFinite(fault)
        return loss

    def stepped(self) -> None:
        """Called at the end of every step, for methods that have something left to do. (`step` itself carries torch's hooks, which
        would run twice in an override that calls it.)"""

    def _update(self, ready: Iterable[tuple[Tensor, dict[str, Any]]], compressed: Tensor | None = None) -> None:
        by_transform: dict[int, list[Work]] = defaultdict(list)
        transforms: dict[int, Transform] = {}
        owned: list[tuple[Tensor, dict[str, Any], Entry]] = []
        for p, group in ready:
            entry = self._entries[p]
            if p.numel() == 0 or entry.transform.rests:
                continue
            if entry.place is not None and not entry.place.lies:
                owned.append((p, group, entry))
                continue
            part = self._take_projection(p) if p in self._held else compressed
            work = self._work(p, entry, group, part)
            if self._turns:
                self._turns.observe(work, p)
            if work.weight.numel():  # a rank may have no row of a leaf
                by_transform[id(entry.transform)].append(work)
                transforms[id(entry.transform)] = entry.transform
        coupled = {id(entry.transform) for _, _, entry in owned if entry.transform.together}
        company = {number: by_transform.pop(number) for number in coupled & by_transform.keys()}
        for number, batch in by_transform.items():
            self._step_batch(transforms[number], batch)
        if owned:
            self._sharding.step(owned, company, Side(self))

    @staticmethod
    def _step_batch(transform: Transform, batch: list[Work]) -> None:
        if transform.together:  # however the weight is kept: alone they would be stepped otherwise
            own = transform.listen_many(batch)
            return transform.update_told(batch, own, own)
        fused: list[Work] = []
        alone: list[Work] = []
        for work in batch:
            # no fused kernel adds wd W to the gradient, and few write any form of weight
            writes = work.kept is None or work.kept.form in transform.fuses
            (fused if writes and not work.coupled else alone).append(work)
        for work in alone + transform.update_many(fused):
            update_leaf(transform, work)

    def _work(
        self, p: Tensor, entry: Entry, group: dict[str, Any], compressed: Tensor | None = None, *, ahead: bool = False,
        whole: tuple[Tensor, Tensor] | None = None, raw: dict[str, Any] | None = None,
    ) -> Work:  # fmt: skip
        """One leaf's part in the step that begins, or of it this rank's rows; ahead: in the coming one, which is not counted yet.

        whole: weight and gradient, where they come from all ranks. raw: in the place of the leaf's state.
        """
        grad = local(self._gradient(p)) if whole is None else whole[1]
        if grad.is_sparse:
            raise InputError(
                f"{entry.leaf.name}: sparse gradients are not supported; build the embedding with sparse=False"
            )
        raw = self._raw(p, entry) if raw is None else raw
        count = raw["step"] + 1
        if not ahead:
            raw["step"] = count
        step = self._step_of(p, entry, group, count)
        weight = p.detach() if p.requires_grad and not is_fake(p) else p
        offset = 0
        if entry.place is not None:
            weight = local(weight) if whole is None else whole[0]
            offset = entry.place.mesh.offset if entry.place.lies else 0
            step = replace(step, leaf=entry.place.leaf(entry.leaf), weight=weight)
        state = sharding.view(entry, raw, shifted(step.random_key(step.count, "state"), offset))
        form, half = self.storage.weight, p.dtype == torch.float16
        rounded = form == "stochastic" if half else form != "plain" and p.dtype == torch.bfloat16
        rounded = rounded or isinstance(p, Int8Weight)
        noise = shifted(step.random_key(step.count, "weight"), offset) if rounded else None
        kept = kept_as(weight, state.raw.get(LOW), noise, state.raw.get(MASTER))
        decay = float(group["weight_decay"])
        step = replace(step, kept=kept) if kept is not None else step
        return Work(weight, grad, state, step, decay, entry.decay, group["maximize"], compressed, noise, kept)

    def _gradient(self, p: Tensor) -> Tensor:
        """What a parameter is stepped with; optimizers that estimate it override this."""
        assert p.grad is not None
        return p.grad

    def _step_of(self, p: Tensor, entry: Entry, group: dict[str, Any], count: int) -> Step:
        lr, seed = float(group["lr"]) * entry.transform.rate, int(group["seed"])
        return Step(lr, count, entry.leaf, p, entry.key, seed, entry.phase, group)

    # -- release ---------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; in release mode also what micro-batches have gathered so far is dropped."""
        super().zero_grad(set_to_none)
        self.drop_projections(all_leaves=True)
        if self._release:
            self._release.gathering.clear()
            self._release.forget()

    def close(self) -> None:
        """Remove the release hooks, and give leaves that rest their gradients back."""
        if self._release:
            self._release.detach()
            self._release = None
        if self._turns:
            self._turns.open()

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
                slots = self._turns.slots(p, raw) if self._turns and entry.rotating else entry.slots
                if entry.place is not None:
                    raw, slots = entry.place.take(raw), slots if entry.place.lies else entry.place.slots(slots)
                loading.check_leaf(entry.leaf, slots, raw)
                loaded[p] = {name: loading.place(value, p.device) for name, value in raw.items()}
        if self._turns:
            self._turns.check(loaded, max(int(saved.get(UPDATES, 0)) for saved in theirs))
        for group, saved in zip(self.param_groups, theirs, strict=True):
            group.update(copy.deepcopy({k: v for k, v in saved.items() if k not in ("params", "param_names")}))
        self.state = defaultdict(dict, loaded)
        self._sharding.forget()
        if self._turns:
            self._turns.recall(loaded)
        self.init_state()
        if self._turns:
            self._turns.gate()
        if self._release and self._release.clipping:
            self._release.clipping.forget()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_release"] = None  # hooks belong to the original's parameters
        return {k: v for k, v in state.items() if not k.endswith("_hooks")}  # as torch: hooks are not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._patch_step_function()
