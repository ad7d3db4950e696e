"""ForwardOptimizer: the engine of methods without backpropagation. `step(closure)` evaluates the loss and never its gradient.

direction law -> probe -> coefficients -> rule: the estimated gradient is put together from directions that are drawn again, a leaf and a
piece at a time, and the rule of the recipe steps the leaf with it, exactly as `tare.Optimizer` steps a gradient.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tare.core.checks import check_whole
from tare.core.clipping import NotFinite
from tare.core.errors import InputError
from tare.core.leaf import Role
from tare.core.optimizer import Entry, Optimizer
from tare.core.recipe import Recipe
from tare.core.shard import sharding
from tare.core.shard.layout import local
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.core.write import by_pieces, update_leaf, update_pieces
from tare.zeroth.assembly import Assembly, Lost, settled, storage_for
from tare.zeroth.closure import Watch, as_number, mean
from tare.zeroth.directions import Directed, Draw
from tare.zeroth.drawn import step_in_one_pass
from tare.zeroth.evaluating import Evaluating
from tare.zeroth.exchange import Exchange
from tare.zeroth.memory import Memory, Moved, choose
from tare.zeroth.past import Past
from tare.zeroth.probes import Estimate, Probe, finite
from tare.zeroth.recall import Recall
from tare.zeroth.record import KEPT, PAST, SKIPPED, SKIPS, STEPS, Record, Recorder
from tare.zeroth.shared import exchange_of, memory_of, refuse, unwrapped, wrapped_by_ddp

__all__ = ["KEPT", "PAST", "SKIPPED", "STEPS", "ForwardOptimizer", "Record", "as_number"]


class ForwardOptimizer(Evaluating, Optimizer):
    """Steps leaves with gradients estimated from losses alone.

    Args:
        params: the model that the closure runs (preferred: then it is perturbed inside forward), or what `tare.Optimizer` takes.
        recipe: `Directed(law, rule)` for leaves that are trained, `Untouched()` for others.
        lr, weight_decay, seed, maximize: as `tare.Optimizer`.
        probe: where the loss is evaluated, and what is made of it.
        memory: `auto`, `forward`, `in-place`, `in-place-exact` (see `zeroth.memory`), or a plan of one's own.
        exchange: shares points among workers; None evaluates all of them here, but for a model that DDP wraps or `fully_shard` has cut:
            then losses are averaged over its ranks, `Workers(data=...)`.
        storage: as `tare.Optimizer`, but 16-bit weights are rounded stochastically unless it says otherwise: steps of these methods are
            mostly smaller than the gap between two 16-bit numbers, and rounding to nearest would lose them.
        patience: steps in a row whose losses are not finite before `NotFinite` is raised; each is skipped and counted.
        on_step: told the `Record` of every step, for logs.
        model: the module that the closure runs, where `params` is not it but only the leaves.

    Raises:
        InputError: as `tare.Optimizer`; a memory plan that cannot be; no leaf that is trained.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "ForwardOptimizer":
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        except TypeError:  # which the call of __init__ will say better
            return self
        bound.apply_defaults()
        itself, params, *_ = bound.signature.parameters
        if not cls.shares:
            refuse(cls.__name__, bound.arguments.get(params))
        self.given = {name: value for name, value in bound.arguments.items() if name not in (itself, params, "on_step")}
        return self

    given: dict[str, Any]  # the constructor's arguments, for logs
    shares: ClassVar[bool] = True  # whether ranks may share the model, wrapped by DDP or cut by fully_shard

    def __init__(
        self, params: Any, recipe: Recipe, lr: float | Tensor, *, probe: Probe, memory: str | Memory = "auto",
        exchange: Exchange | None = None, weight_decay: float = 0.0, storage: Storage | dict[str, Any] | None = None, seed: int = 0,
        maximize: bool = False, patience: int = 10, on_step: Recorder | None = None, model: nn.Module | None = None, **live: Any,
    ):  # fmt: skip
        self.probe, self.exchange, self.on_step = probe, exchange, on_step
        self.patience = check_whole("patience", patience, 1)
        ddp, params = (params if wrapped_by_ddp(params) else None), unwrapped(params)
        self.from_module = isinstance(params, nn.Module)
        self.model = params if isinstance(params, nn.Module) else unwrapped(model)
        params = settled(params)
        counts: dict[str, Any] = {STEPS: 0, KEPT: {}, SKIPPED: 0, SKIPS: 0}
        rules = [t.rule for _, t in recipe.entries if isinstance(t, Directed)]
        self._recalls, self._tail = _most([rule.recalls for rule in rules]), _tail(rules)
        if self._recalls != 0:
            counts[PAST] = Past.nothing()
            if recipe.decay == "l2":
                raise InputError(
                    "recipe.decay: 'l2' adds weights to gradients, and a rule that recalls has no former weights; use 'before'"
                )
        super().__init__(
            params, recipe, lr, weight_decay=weight_decay, storage=storage_for(params, storage), seed=seed, maximize=maximize,
            **counts, **live,
        )  # fmt: skip
        laws = [e.transform.law for e in self._entries.values() if isinstance(e.transform, Directed)]
        if not laws:
            raise InputError("recipe: no leaf is trained; give at least one a direction law")
        entries = list(self._entries.values())
        self.exchange = exchange_of(exchange, entries, ddp)
        if self.shared:
            memory = memory_of(entries, probe, memory, self.model)
        self.memory: Memory = (
            choose(memory, params if self.model is None else self.model) if isinstance(memory, str) else memory
        )
        self.memory.check(
            {e.leaf.name: (p, e.transform) for p, e in self._entries.items() if isinstance(e.transform, Directed)}
        )
        self._watch = Watch(self.model)
        self._lost = Lost() if self.storage.weight == "plain" else None
        self._begun: Any = None  # the recorder that has been told to begin
        self.evaluated = 0  # forward passes of this process

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        first, added = self.param_groups[0], self.param_groups[-1]
        added.update({name: first[name] for name in (STEPS, KEPT, SKIPPED, SKIPS, PAST) if name in first})

    def _claim(self, group: dict[str, Any], recipe: Recipe, roles: dict[Tensor, Role]) -> dict[Tensor, Entry]:
        """Leaves of one name, or of one shape without names, would draw the same direction: they are numbered."""
        fresh = super()._claim(group, recipe, roles)
        taken = {entry.key for entry in self._entries.values()}
        for entry in fresh.values():
            name, number = entry.key, 1
            while entry.key in taken:
                number += 1
                entry.key = entry.name_key = f"{name}#{number}"
            taken.add(entry.key)
        return fresh

    # -- one step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """One update. The loss is evaluated as often as the probe asks, always with the same random numbers.

        Args:
            closure: runs the model on one batch and returns its loss, a tensor of one element or a number; anything that gets smaller
                when the model gets better, differentiable or not. It must use the same batch every time within a step.

        Returns:
            The mean of the losses, which is that of theta up to the square of the perturbation; NaN where one was not finite.

        Raises:
            InputError: no closure, or one that returns no single number.
            NotFinite: `patience` steps in a row had losses that are not finite.

        Whatever is raised, by the closure too, the weights are those from before the step.
        """
        if closure is None:
            raise InputError("step: this method evaluates the loss itself; call opt.step(closure)")
        if isinstance(closure, Tensor | float | int):
            raise InputError(
                f"step: expected a function that returns the loss, got a {type(closure).__name__}; call opt.step(lambda: loss_of(batch))"
            )
        self._begin()
        leaves = self._moved()
        if not leaves:
            raise InputError(
                "params: every leaf that is to be trained has requires_grad=False; call requires_grad_(True) on them"
            )
        self._watch.model()
        self._watch.gradients(self._entries)
        self._prepare_laws(leaves)
        losses: list[float] = []
        estimate = self._ask(leaves, closure, losses)
        record = self._record(estimate, losses, leaves)
        self._take(leaves, record)
        if self.on_step is not None:
            self.on_step(record)
        self.stepped()
        skipped = int(self.param_groups[0][SKIPPED])
        if skipped >= self.patience:
            raise NotFinite(
                f"loss: not finite in {skipped} steps in a row (last values {losses[-4:]}); lower lr or eps, or look at the data"
            )
        return mean(losses)

    @torch.no_grad()
    def replay(self, record: Record) -> None:
        """Take a step that was recorded, by this optimizer or another one like it, from the same weights. Nothing is evaluated.

        Raises:
            InputError: the record is of another step, or of other leaves or groups.
        """
        if record.step != self.steps:
            raise InputError(f"replay: the record is of step {record.step}, the optimizer at step {self.steps}")
        leaves = self._moved(set(record.leaves))
        if len(leaves) != len(record.leaves) or len(record.rates) != len(self.param_groups):
            raise InputError("replay: the record is of other leaves or parameter groups than the optimizer's")
        for group, (lr, weight_decay) in zip(self.param_groups, record.rates, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        self._prepare_laws(leaves)
        self._take(leaves, record)
        self.stepped()

    def _begin(self) -> None:
        if self.on_step is not self._begun:
            begin = getattr(self.on_step, "begin", None)
            if begin is not None:
                begin(self)
            self._begun = self.on_step

    def _prepare_laws(self, leaves: list[Moved]) -> None:
        for leaf in leaves:  # with the unperturbed weight
            leaf.directed.law.prepare(leaf.draw(0), leaf.state, leaf.parameter.detach())

    def _record(self, estimate: Estimate | None, losses: list[float], leaves: list[Moved]) -> Record:
        rates = tuple((float(g["lr"]), float(g["weight_decay"])) for g in self.param_groups)
        for number, (lr, decay) in enumerate(rates):
            if not finite([lr, decay]):
                raise InputError(
                    f"lr: {lr:g} (weight_decay {decay:g}) in group {number}; expected finite numbers, nothing was stepped"
                )
        names = tuple(leaf.draw(0).leaf.name for leaf in leaves)
        bare = Record(self.steps, (), 0.0, rates, tuple(losses), skipped=True, moved=False, leaves=names)
        if estimate is None or not finite([estimate.factor, *(term.coefficient for term in estimate.terms)]):
            return bare
        terms = tuple(term for term in estimate.terms if term.coefficient != 0.0)
        return replace(
            bare, terms=terms if estimate.moves else (), factor=estimate.factor, deltas=tuple(estimate.deltas), skipped=False,
            moved=estimate.moves, keep=None if estimate.keep is None else dict(estimate.keep),
        )  # fmt: skip

    def _take(self, leaves: list[Moved], record: Record) -> None:
        """Step every leaf by a record, and count it."""
        past = None
        if self._recalls != 0:
            past = Past(self.param_groups[0][PAST], self._recalls, self._tail.forget if self._tail else None)
        if record.moved:
            for leaf in leaves:
                self._step_leaf(leaf, record, past)
        if record.keep is not None:
            for leaf in leaves:
                leaf.directed.law.learn(leaf.draw(0).leaf, leaf.state, record.keep)
        for group in self.param_groups:
            group[STEPS] = record.step + 1
            group[SKIPPED] = int(group[SKIPPED]) + 1 if record.skipped else 0
            group[SKIPS] = int(group.get(SKIPS, 0)) + int(record.skipped)
            if record.keep is not None:
                group[KEPT] = dict(record.keep)
        if past is not None and record.moved:
            rows = past.after(record)
            for group in self.param_groups:
                group[PAST] = rows
        if self._lost is not None:
            self._lost.warn(record.step)

    def _step_leaf(self, leaf: Moved, record: Record, past: Past | None) -> None:
        """Put the gradient of one leaf together, hand it to the rule, and drop it: by pieces where law and rule allow it."""
        p, law = leaf.parameter, leaf.directed.law
        whole = p if leaf.shared is None else leaf.shared
        entry = self._entries[whole]
        group = {**entry.group, "lr": float(entry.group["lr"]) * record.factor}
        if not leaf.directed.decays:
            group["weight_decay"] = 0.0
        gradient = self._assembled(leaf, record)
        constant = entry.transform.proportional
        if not law.fuses or gradient.lost is not None or (entry.decay == "l2" and group["weight_decay"]):
            constant = None  # the gradient itself is wanted
        pieces = law.partial and by_pieces(entry.transform, p)
        with self._holding(gradient.whole() if constant is None and not pieces else p.new_empty(0)):
            work = self._work(whole, entry, group)
        if not p.numel():  # a rank may have no row of a leaf
            return
        if constant is not None:
            step_in_one_pass(work, leaf, gradient.parts, constant)
            return
        if past is not None and leaf.directed.rule.recalls != 0:
            work.step = replace(work.step, past=past.of(leaf, -1.0 if group["maximize"] else 1.0))
        if pieces:
            update_pieces(entry.transform, work, gradient)
        else:
            update_leaf(entry.transform, work)
        gradient.done()

    def _assembled(self, leaf: Moved, record: Record) -> Assembly:
        """The gradient of a leaf at a step."""
        return Assembly(leaf, record.terms, self._lost)

    @contextmanager
    def _holding(self, gradient: Tensor) -> Iterator[None]:
        """`gradient` is what the leaf is stepped with, inside."""
        self._pending = gradient
        try:
            yield
        finally:
            del self._pending

    def _gradient(self, p: Tensor) -> Tensor:
        return self._pending

    def flush(self) -> None:
        """Take what steps are still owed to weights, where a method puts them off (`zo2`); nothing elsewhere."""

    # -- what is asked often -----------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps done, skipped ones included."""
        return int(self.param_groups[0][STEPS])

    @property
    def skipped(self) -> int:
        """Steps that were skipped, because a loss was not finite; over the whole run."""
        return int(self.param_groups[0].get(SKIPS, 0))

    @property
    def lost(self) -> float:
        """Share of the updates of single 16-bit weights, by this process, that were too small to change the weight. 0 where weights are
        rounded stochastically or have a master copy."""
        return self._lost.share if self._lost is not None else 0.0

    def _moved(self, names: set[str] | None = None) -> list[Moved]:
        """The trained leaves, as memory plans see them at this step; or those of some names."""
        found = []
        for p, entry in self._entries.items():
            trained = p.requires_grad or self.model is None if names is None else entry.leaf.name in names
            if isinstance(entry.transform, Directed) and p.numel() and trained:
                found.append(self._moved_leaf(p, entry))
        return found

    def _moved_leaf(self, p: Tensor, entry: Entry) -> Moved:
        state = sharding.view(entry, self._raw(p, entry), 0)
        if entry.place is None:
            return Moved(p, entry.transform, state, self._drawer(entry))  # type: ignore[arg-type]
        rows, start = local(p.detach()), entry.place.mesh.offset
        return Moved(rows, entry.transform, state, self._drawer(entry), p, start)  # type: ignore[arg-type]

    @property
    def shared(self) -> bool:
        """Whether `fully_shard` has cut any leaf."""
        return any(entry.place is not None for entry in self._entries.values())

    def _drawer(self, entry: Entry) -> Callable[[int], Draw]:
        step, seed = self.steps, int(entry.group["seed"])
        return lambda member: Draw(entry.leaf, entry.key, seed, step, member)

    def explain(self, every_leaf: bool = False) -> str:
        """A table: which leaf is stepped by what; how the loss is probed, how the model gets to the points, how 16-bit weights are kept."""
        lines = [super().explain(every_leaf)]
        lines.append(f"probe: {self.probe.describe()}: {self.probe.evaluations:g} evaluations a step")
        lines += self.memory.describe()
        if self.exchange is not None:
            described = getattr(self.exchange, "describe", type(self.exchange).__name__.lower)
            lines.append(f"exchange: {described()}")
        if any(entry.leaf.dtype.itemsize == 2 for entry in self._entries.values()) and self.storage.weight == "plain":
            lines.append(
                f"16-bit weights rounded to nearest: {self.lost:.1%} of the updates of single weights were too small so far"
            )
        return "\n".join(lines)

    # -- what these methods do not do --------------------------------------------------------------------------------

    def accumulation_refused(self, by_previous: bool = False) -> str:
        return (
            "no gradient is kept that micro-batches could add to: run all of them inside the closure, and return the mean of "
            "their losses"
        )

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Refused: see `accumulation_refused`."""
        raise InputError(f"accumulating: {self.accumulation_refused()}")
        yield

    def backward(self, *losses: Callable[[], Tensor]) -> list[Tensor]:
        """Refused: there is no backward."""
        raise InputError(f"backward: {self.accumulation_refused()}; then call step(closure)")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "on_step": None, "_begun": None}  # a log belongs to the original


def _most(recalls: list[int | None]) -> int | None:
    """How many former steps any rule wants; None: all of them."""
    wanted = [math.inf if number is None else number for number in recalls]
    most = max(wanted, default=0)
    return None if most == math.inf else int(most)


def _tail(rules: list[Transform]) -> Recall | None:
    """The rule that something is kept for of steps whose directions are no longer drawn. Raises InputError where there are two."""
    found = {rule for rule in rules if isinstance(rule, Recall) and rule.tail}
    if len(found) > 1:
        raise InputError("recipe: two rules that recall with a tail; give all leaves the same, or use tail=False")
    return next(iter(found), None)
