"""InForward: perturbed copies inside each module's forward. Weights are only read, so nothing drifts.

The copy of a module's weights lives while that module runs, so beyond inference a step needs the largest sum of leaves that one module
owns: mostly the largest leaf. Where a weight is read elsewhere, that leaf is written in place instead, and put back exactly.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.zeroth.inplace import Displacement
from tare.zeroth.moved import Loss, Memory, Moved
from tare.zeroth.probes import Point
from tare.zeroth.reads import Reads
from tare.zeroth.swaps import Site, Swap, Trial


class ReadElsewhere(InputError):
    """A leaf was read where it is not perturbed. It is found out once; the next evaluation is right."""


class InForward(Memory):
    """Args:
    model: the module that the closure runs.
    sites: where leaves are read that are no parameters of a module, such as scales inside of quantised weights.
    compare: evaluate the first perturbed point in place too, once, and perturb nothing in forward if the two losses differ.

    The first perturbed evaluation is watched: a leaf whose own memory is read although it is perturbed, or whose module's forward is not
    called, or is compiled, is from then on written in place (int8 weights: a copy stays in the module for the whole evaluation). Later
    evaluations in which a module's forward is no longer called are repeated under watch. Both plans give the same bits.
    """

    name = "in forward"

    def __init__(
        self, model: nn.Module, sites: Mapping[Tensor, Sequence[Site]] | None = None, *, compare: bool = False
    ):
        self.model, self.sites, self.compare = model, dict(sites or {}), compare
        self.elsewhere: dict[Tensor, tuple[str, str]] = {}  # leaves not perturbed in forward -> name, why
        self._watched: set[Tensor] = set()
        self._resting: set[Tensor] = set()  # their module may go uncalled

    # -- evaluating ------------------------------------------------------------------------------------------------

    def evaluate(self, leaves: list[Moved], point: Point, run: Callable[[], Loss]) -> Loss:
        if not point.members:
            return run()
        watch, uncalled = self._sort_out(leaves), set[Tensor]()
        while True:
            with self._standing(leaves, point, watch) as trial:
                loss = run()
            missing = {leaf.parameter for leaf in self._inside(leaves)} - trial.entered - self._resting
            if trial.reads is None:
                for leaf in [leaf for swap in trial.swaps if swap.traced for _, leaf in swap.own]:
                    self._move_out(leaf, "its module's forward is compiled")  # anew each time, while it has hooks
                if not missing:
                    return loss
                watch, uncalled = True, missing
                continue
            if not self._judge(leaves, trial, missing, uncalled):
                return self._compared(leaves, point, run, loss)

    def _judge(self, leaves: list[Moved], trial: Trial, missing: set[Tensor], uncalled: set[Tensor]) -> bool:
        """What a watched evaluation showed; True where its loss is not that of the point."""
        assert trial.reads is not None
        for leaf in leaves:
            if self._held(leaf) and leaf.parameter in trial.reads.found:
                raise InputError(
                    f"{leaf.name}: this quantised weight is read past its module, so it cannot be perturbed; leave it out of the trained "
                    "leaves, or call tare.dequantize_weights_(model)"
                )
        wrong = False
        for leaf in self._inside(leaves):
            p = leaf.parameter
            if p in trial.reads.found:
                self._move_out(leaf, "read outside its module's forward")
                wrong = True
            elif p in uncalled and p in trial.entered:
                self._move_out(leaf, "its module's forward is compiled")
            elif p in missing and p in self._watched:
                self._resting.add(p)  # in use before, just not for this batch
            elif p in missing:
                self._move_out(leaf, "its module's forward was not called")
        self._watched.update(leaf.parameter for leaf in leaves)
        return wrong

    def _compared(self, leaves: list[Moved], point: Point, run: Callable[[], Loss], loss: Loss) -> Loss:
        if not self.compare:
            return loss
        self.compare = False
        inside = self._inside(leaves)
        before = dict(self.elsewhere)
        for leaf in inside:
            self._move_out(leaf, "perturbed in forward, the loss was another one than in place")
        with self._standing(leaves, point, False):
            other = run()
        if same(loss, other):
            self.elsewhere = before
            return loss
        return other

    def at(self, leaves: list[Moved], point: Point) -> Any:
        return self._standing(leaves, point, False)

    @contextmanager
    def watched(self, leaves: list[Moved], point: Point) -> Iterator[None]:
        """`at`, where the caller runs the model as he likes: the first time it is watched as in `evaluate`.

        Raises:
            ReadElsewhere: on leaving: what ran read a leaf past its module, so it did not stand at `point`. Running it again does.
        """
        watch = self._sort_out(leaves)
        with self._standing(leaves, point, watch) as trial:
            yield
        missing = {leaf.parameter for leaf in self._inside(leaves)} - trial.entered - self._resting
        ran = trial.reads is not None and bool(trial.entered or trial.reads.found)
        if ran and self._judge(leaves, trial, missing, set()):
            assert trial.reads is not None
            names = ", ".join(leaf.name for leaf in leaves if leaf.parameter in trial.reads.found)
            raise ReadElsewhere(
                f"{names}: read outside its module's forward, and written in place from now on; run the model again"
            )

    @contextmanager
    def _standing(self, leaves: list[Moved], point: Point, watch: bool) -> Iterator[Trial]:
        trial = Trial(Reads() if watch else None)
        if not point.members:
            yield trial
            return
        self._sort_out(leaves)
        places = self._places(leaves)
        with ExitStack() as stack:
            owned: dict[nn.Module, list[tuple[Site, Moved]]] = defaultdict(list)
            for leaf in leaves:
                p = leaf.parameter
                if p not in self.elsewhere:
                    for site in places[p]:
                        owned[site.module].append((site, leaf))
                elif self._held(leaf):
                    swap = Swap([(site, leaf) for site in places[p]], point, trial)
                    stack.callback(swap.close)
                    swap.enter()
                else:
                    displacement = Displacement(leaf, point)
                    stack.callback(displacement.undo)
                    displacement.do()
                if trial.reads is not None and (p not in self.elsewhere or self._held(leaf)):
                    trial.reads.watch(p)
            for module, own in owned.items():
                swap = Swap(own, point, trial, module)
                trial.swaps.append(swap)
                stack.callback(swap.close)
                swap.attach()
            if trial.reads is not None:
                stack.enter_context(trial.reads)
            yield trial

    # -- who goes where ----------------------------------------------------------------------------------------------

    def _sort_out(self, leaves: list[Moved]) -> bool:
        """Leaves that cannot be perturbed in forward, as far as that is seen without running; whether any is not yet watched."""
        fresh = [
            leaf for leaf in leaves if leaf.parameter not in self._watched and leaf.parameter not in self.elsewhere
        ]
        if fresh:
            places, compiled = self._places(fresh), _compiled(self.model)
            for leaf in fresh:
                sites = places[leaf.parameter]
                if leaf.parameter.is_meta:
                    raise InputError(
                        f"{leaf.name}: its weights are on the meta device, offloaded or not loaded yet; load the model without "
                        "offloading"
                    )
                if not sites:
                    self._move_out(leaf, "belongs to no module of the model")
                elif any(site.module in compiled for site in sites):
                    self._move_out(leaf, "its module is compiled")
                elif any(isinstance(site.module, nn.RNNBase) for site in sites):
                    self._move_out(leaf, "its module keeps references to its weights")
        return any(leaf.parameter not in self._watched for leaf in leaves)

    def _places(self, leaves: list[Moved]) -> dict[Tensor, list[Site]]:
        """Where each leaf is read."""
        wanted = {leaf.parameter for leaf in leaves}
        found: dict[Tensor, list[Site]] = defaultdict(list)
        for module in self.model.modules():
            for name, p in module._parameters.items():
                if p is not None and p in wanted:
                    found[p].append(Site(module, name))
        for leaf in leaves:
            found[leaf.parameter] += self.sites.get(leaf.parameter, ())
        return dict(found)

    def _inside(self, leaves: list[Moved]) -> list[Moved]:
        return [leaf for leaf in leaves if leaf.parameter not in self.elsewhere]

    def _held(self, leaf: Moved) -> bool:
        """Not perturbed in forward, and cannot be written either."""
        return leaf.parameter in self.elsewhere and isinstance(leaf.parameter, Int8Weight)

    def _move_out(self, leaf: Moved, why: str) -> None:
        self.elsewhere[leaf.parameter] = leaf.name, why

    def overhead(self, leaves: list[Moved]) -> int:
        """Bytes that an evaluation needs beyond inference: the largest sum of copies along one nesting of modules, and what is moved
        otherwise. An upper bound: copies are made before outputs are."""
        sizes = {leaf.parameter: leaf.parameter.numel() * leaf.parameter.element_size() for leaf in leaves}
        owned: dict[nn.Module, int] = defaultdict(int)
        for p, sites in self._places(self._inside(leaves)).items():
            for module in {site.module for site in sites}:
                owned[module] += sizes[p]

        def deepest(module: nn.Module) -> int:
            return owned[module] + max((deepest(child) for child in module.children()), default=0)

        outside = [leaf for leaf in leaves if leaf.parameter in self.elsewhere]
        kept = [n if self._held(leaf) else n + n // 16 for leaf in outside for n in (sizes[leaf.parameter],)]
        return deepest(self.model) + sum(kept)

    def describe(self) -> list[str]:
        lines = [f"perturbed {self.name}: a module's weights are copied while it runs, and never written"]
        reasons: dict[tuple[bool, str], list[str]] = defaultdict(list)
        for p, (name, why) in self.elsewhere.items():
            reasons[isinstance(p, Int8Weight), why].append(name)
        for (held, why), names in reasons.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            how = "held perturbed for the whole evaluation" if held else "perturbed in place, put back exactly"
            lines.append(f"{how}: {some} ({why})")
        return lines


def _compiled(model: nn.Module) -> set[nn.Module]:
    """Modules inside of compiled or scripted ones: their forward may be called without its hooks."""
    found: set[nn.Module] = set()
    for module in model.modules():
        kind = type(module).__module__
        own = getattr(module, "_compiled_call_impl", None) is not None
        if own or kind.startswith("torch._dynamo") or isinstance(module, torch.jit.ScriptModule):
            found.update(module.modules())
    return found


def same(one: Loss, other: Loss) -> bool:
    """Whether two evaluations of one point agree but for the order of sums; NaN agrees with NaN."""
    a, b = float(one), float(other)
    return a == b or abs(a - b) <= 1e-5 * max(abs(a), abs(b)) or (a != a and b != b)
