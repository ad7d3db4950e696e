"""Replay: the steps of a seed log onto the weights that the run began from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.storage import Storage
from tare.methods import registry
from tare.zeroth.digest import combined, digest_of
from tare.zeroth.log import SAME, header_of
from tare.zeroth.logfile import Log, read
from tare.zeroth.moved import Loss, Memory, Moved
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.portable import decode
from tare.zeroth.probes import Point
from tare.zeroth.record import KEPT, STEPS
from tare.zeroth.scales import find_scales

# Arguments that change nothing about a step whose terms are known.
BESIDE = ("memory", "exchange", "patience", "on_step", "model", "probe", "coefficients")
Model = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class Replayed:
    """steps: done. exact: whether the weights are those of the run, bit for bit; None where its log was not sealed."""

    steps: int
    exact: bool | None
    optimizer: ForwardOptimizer


def replay(
    log: str | Path | Log, model: Model, *, optimizer: ForwardOptimizer | None = None, steps: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Replayed:  # fmt: skip
    """Apply a log to `model`, in place. Everything is checked before anything is changed.

    On the kind of device that the run was on the result is the trained model to the last bit, in any storage.

    Args:
        log: its path.
        model: with the weights that the run began from: the module, or the tensors by their names or in their order.
        optimizer: one built by hand as that of the run was, over `model`, where the log cannot say how (own laws or rules).
        steps: only the first so many.
        progress: told (done, all) after every step.

    Raises:
        InputError: the log is damaged; leaves are missing, or have other shapes, dtypes or weights; the method or an argument of it
            cannot be had from the log.

    >>> import tempfile, torch
    >>> from tare import MeZO, SeedLog
    >>> net, base = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    >>> _ = base.load_state_dict(net.state_dict())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with SeedLog(f"{folder}/run.seeds") as log:
    ...         opt = MeZO(net, lr=1e-2, on_step=log)
    ...         for _ in range(3):
    ...             _ = opt.step(lambda: net(torch.ones(2, 4)).square().mean())
    ...     replay(f"{folder}/run.seeds", base).exact
    True
    """
    log = log if isinstance(log, Log) else read(log)
    leaves = matching(log, model)
    with _trained_as(log, leaves):
        found = optimizer if optimizer is not None else rebuild(log, model, leaves)
        _check(log, found, given=optimizer is not None)
        groups = _groups(found, log)
        wanted = log.steps if steps is None else min(steps, log.steps)
        for number, record in enumerate(log.records()):
            if number == wanted:
                break
            found.replay(replace(record, rates=tuple(record.rates[group] for group in groups)))
            if progress is not None:
                progress(number + 1, wanted)
    exact = None
    if log.digest is not None and wanted == log.steps:
        exact = combined({name: digest_of(p.detach()) for name, p in leaves.items()}) == log.digest
    return Replayed(wanted, exact, found)


def matching(log: Log, model: Model) -> dict[str, Tensor]:
    """The leaves of the log among the tensors of the model, in the log's order.

    Raises:
        InputError: one is missing, or has another shape, dtype or other weights.
    """
    if isinstance(model, Sequence):
        if len(model) != len(log.header["leaves"]):
            raise InputError(
                f"{log.path}: the run had {len(log.header['leaves'])} leaves, {len(model)} tensors were given"
            )
        known = {leaf["name"]: tensor for leaf, tensor in zip(log.header["leaves"], model, strict=True)}
    else:
        known = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
        if isinstance(model, nn.Module) and any(leaf["name"] not in known for leaf in log.header["leaves"]):
            known |= {scale.name: scale.tensor for scale in find_scales(model)}  # parts of quantised weights
    found, others = {}, []
    for leaf in log.header["leaves"]:
        name = leaf["name"]
        if name not in known:
            raise InputError(
                f"{log.path}: the model has no {name}; give the model that the run was of, adapters included, quantised as it was"
            )
        p = found[name] = known[name]
        have = (list(p.shape), str(p.dtype).removeprefix("torch."))
        if have != (leaf["shape"], leaf["dtype"]):
            raise InputError(
                f"{log.path}: {name} is {tuple(have[0])} {have[1]}, in the run it was {tuple(leaf['shape'])} {leaf['dtype']}; load the "
                "base as the run did"
            )
        if digest_of(p.detach()).hex() != leaf["hash"]:
            others.append(name)
    if others:
        raise InputError(
            f"{log.path}: the run began from other weights: {others[0]} and {len(others) - 1} more of {len(found)} leaves differ "
            "(blake2b); give the base model of that run"
        )
    return found


def rebuild(log: Log, model: Model, leaves: dict[str, Tensor]) -> ForwardOptimizer:
    """An optimizer like that of the run. Raises InputError where the log cannot say how it was made."""
    header, method = log.header, log.header["method"]
    if method is None:
        raise InputError(
            f"{log.path}: the run's method is not registered; build the optimizer yourself and give it as optimizer"
        )
    cls, known = registry.method_class(method), registry.options(method)
    given = {
        name: data for name, data in header["options"].items() if name == "lr" or (name in known and name not in BESIDE)
    }
    options = {name: decode(data, f"{log.path}: option {name!r} of {method}") for name, data in given.items()}
    options["storage"] = Storage(**decode(header["storage"], str(log.path)))
    if "memory" in known:
        plan = header["options"].get("memory")
        options["memory"] = plan if plan == "in-place" else Nowhere()
    whole = header["module"] and isinstance(model, nn.Module)
    made = cls(model if whole else _runs(log, leaves), **options)
    assert isinstance(made, ForwardOptimizer)
    return made


def _runs(log: Log, leaves: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The leaves in their order as parameter groups, a new one where group or role changes."""
    groups: list[dict[str, Any]] = []
    last: tuple[Any, ...] = ()
    for leaf in log.header["leaves"]:
        now = (leaf["group"], leaf["role"])
        if now != last:
            groups.append({"params": [], "role": leaf["role"]})
            last = now
        p = leaves[leaf["name"]]
        groups[-1]["params"].append((leaf["name"], p) if leaf["named"] else p)
    return groups


def _check(log: Log, optimizer: ForwardOptimizer, given: bool) -> None:
    """The optimizer is one that would write this log; then it is set to where the log begins."""
    names = [leaf["name"] for leaf in log.header["leaves"]]
    entries = {entry.leaf.name: entry for entry in optimizer._entries.values()}
    if sorted(entries) != sorted(names):
        raise InputError(f"{log.path}: the optimizer has other leaves than the run")
    own = header_of(optimizer, hashes=False)
    for name in SAME:
        if given and name in ("seeds", "storage") and own[name] != log.header[name]:
            raise InputError(f"{log.path}: the optimizer's {name} differ from the run's")
    for leaf in log.header["leaves"]:
        entry = entries[leaf["name"]]
        if entry.key != leaf["key"]:
            raise InputError(
                f"{log.path}: {leaf['name']} would draw other directions than in the run; give parameters as the run did"
            )
        entry.group["seed"], entry.group["maximize"] = (
            log.header["seeds"][leaf["group"]],
            log.header["maximize"][leaf["group"]],
        )
    for p, entry in optimizer._entries.items():
        if p in optimizer.state:
            count = next(leaf["count"] for leaf in log.header["leaves"] if leaf["name"] == entry.leaf.name)
            optimizer.state[p]["step"] = count
    for group in optimizer.param_groups:
        group[STEPS], group[KEPT] = log.start, dict(log.header["kept"])


def _groups(optimizer: ForwardOptimizer, log: Log) -> list[int]:
    """For each of the optimizer's groups, the run's."""
    where = {leaf["name"]: int(leaf["group"]) for leaf in log.header["leaves"]}
    return [where[optimizer._entries[group["params"][0]].leaf.name] for group in optimizer.param_groups]


@contextmanager
def _trained_as(log: Log, leaves: dict[str, Tensor]) -> Iterator[None]:
    """Inside, leaves are frozen as they were when the run began, so that no state is allocated for those it left alone."""
    before = {name: p.requires_grad for name, p in leaves.items()}
    try:
        for leaf in log.header["leaves"]:
            leaves[leaf["name"]].requires_grad_(leaf["trained"])
        yield
    finally:
        for name, p in leaves.items():
            p.requires_grad_(before[name])


class Nowhere(Memory):
    """No plan: nothing is evaluated."""

    name = "not evaluated"

    def evaluate(self, leaves: list[Moved], point: Point, run: Callable[[], Loss]) -> Loss:
        raise InputError("this optimizer only replays a log; build one for training")
