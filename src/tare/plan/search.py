"""If nothing fits: the smallest change that would.

Every combination of changes has a price, the sum of what each does to the run; they are tried from the cheapest up.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tare.core.storage import Storage
from tare.methods import registry
from tare.plan.bound import Bound
from tare.plan.budget import format_bytes
from tare.plan.released import Bases
from tare.plan.rows import PlanRow, Settings, plan_row

# A change saves memory or costs a few percent at most: what needs more than this many times the budget with all of them is not
# looked at with fewer.
NEAR = 1.25


@dataclass(frozen=True)
class Advice:
    """A change of settings. `fits` is False where even the largest change is too little: then `peak` is the minimum."""

    method: str
    flags: str
    peak: int
    fits: bool
    text: str


@dataclass(frozen=True)
class Change:
    """One thing that can be changed: its price, the flag that does it, the settings after it."""

    price: int
    flag: str
    fields: dict[str, Any]


def advise(settings: Settings, keys: list[str], budget: int, tell: Callable[[str], None] = lambda news: None) -> Advice:
    """The cheapest change with which one of the methods fits; among equals, the better method by its card.

    The order of least intrusion: recompute activations, step inside backward (or, where that is so and micro-batches are many, compute
    bases in passes), cut weights among ranks where each has all of them, 8-bit moments, smaller rank, smaller batch, bf16 weights,
    shorter sequences. The first three do not change the training at all.
    """
    settings = dataclasses.replace(settings, follow=False)
    keys = sorted(keys, key=lambda key: registry.card(key).auto_rank)
    bound = Bound(budget)
    best: tuple[int, PlanRow, str] | None = None
    furthest: dict[str, tuple[Settings, str]] = {}  # everything that can be changed, changed as far as it goes
    for key in keys:
        combinations = sorted(_combinations(settings, key), key=lambda both: both[0])
        furthest[key] = combinations[-1][1:]
        tell(f"nothing fits; what could be changed for {key}")
        if not bound.may_fit(furthest[key][0], key, NEAR):
            continue
        for price, changed, flags in combinations:
            if best is not None and price >= best[0]:
                break
            if not bound.may_fit(changed, key):
                continue
            row = plan_row(changed, key, budget)
            if row.fits:
                best = (price, row, flags)
                break
    if best is not None:
        return _say("the smallest change that fits", best[1], best[2])
    floor: tuple[PlanRow, str] | None = None
    for least, key in sorted((bound.least(furthest[key][0], key), key) for key in keys):
        if floor is not None and least >= floor[0].peak:
            break
        changed, flags = furthest[key]
        row = plan_row(changed, key, budget)
        if not row.note and (floor is None or row.peak < floor[0].peak):
            floor = (row, flags)
    if floor is None:
        return Advice(keys[0], "", 0, False, "none of these methods can run with these settings: leave out --release")
    return _say("the least that is possible", *floor)


def _say(what: str, row: PlanRow, flags: str) -> Advice:
    command = f"--method {row.method} {flags}".rstrip()
    return Advice(row.method, flags, row.peak, bool(row.fits), f"{what}: {command} ({format_bytes(row.peak)})")


def _combinations(settings: Settings, key: str) -> Iterator[tuple[int, Settings, str]]:
    """(price, settings, flags) of all combinations, the settings as they are among them."""
    for picks in itertools.product(*_ladders(settings, key)):
        fields: dict[str, Any] = {}
        storage, hyper = settings.storage, dict(settings.hyper)
        for pick in picks:
            fields.update({k: v for k, v in pick.fields.items() if k not in ("moment", "rank")})
            if "moment" in pick.fields:
                storage = {**(storage if isinstance(storage, dict) else {}), "moment": pick.fields["moment"]}
            if "rank" in pick.fields:
                hyper["rank"] = pick.fields["rank"]
        changed = dataclasses.replace(settings, **fields, storage=storage, hyper=hyper)
        yield sum(pick.price for pick in picks), changed, " ".join(pick.flag for pick in picks if pick.flag)


def _ladders(settings: Settings, key: str) -> Iterator[list[Change]]:
    """For each thing that can be changed: leaving it, then the steps away from it."""
    stay = Change(0, "", {})
    card, choice = registry.card(key), settings.choice(key)
    if not settings.checkpointing:
        yield [stay, Change(1, "--checkpointing", {"checkpointing": True})]
    ranks = settings.ranks
    if ranks is not None and not ranks.sharded and ranks.gpus > 1:
        yield [stay, Change(3, "--parallel fsdp", {"ranks": dataclasses.replace(ranks, parallel="fsdp")})]
    if not settings.release and settings.accumulate == 1 and card.release != "no":
        yield [stay, Change(2, "--release --clip-mode two-pass", {"release": True, "clip_mode": "two-pass"})]
    if settings.release and settings.accumulate > 1 and settings.bases == Bases() and card.release == "accumulates":
        yield [stay, *(Change(p, f"--refresh-parts {n}", {"bases": Bases("sum", n)}) for p, n in ((2, 2), (3, 4)))]
    if choice.storage.moment != "int8" and not isinstance(settings.storage, Storage):
        yield [stay, Change(4, "--method.storage.moment int8", {"moment": "int8"})]
    rank = choice.options.get("rank", getattr(registry.options(key).get("rank"), "default", None))
    if isinstance(rank, int) and rank > 8:
        smaller = _halvings(rank, 8)
        yield [stay, *(Change(8 * n, f"--rank {r}", {"rank": r}) for n, r in enumerate(smaller, 1))]
    gpus = 1 if ranks is None else ranks.gpus
    if settings.batch > 1:
        batches = _halvings(settings.batch, 1)
        yield [stay, *(Change(16 * n, f"--batch {b * gpus}", {"batch": b}) for n, b in enumerate(batches, 1))]
    if settings.precision != "bf16":
        yield [stay, Change(64, "--precision bf16", {"precision": "bf16", "dtype": "bf16"})]
    if settings.batch == 1 and settings.seq > 256:
        lengths = _halvings(settings.seq, 256)
        yield [stay, *(Change(128 * n, f"--seq {s}", {"seq": s}) for n, s in enumerate(lengths, 1))]


def _halvings(value: int, floor: int) -> list[int]:
    """value / 2, value / 4, ... not below the floor; at most four, and the floor itself as the last.

    >>> _halvings(8, 1), _halvings(1024, 8)
    ([4, 2, 1], [512, 256, 128, 8])
    """
    steps = []
    while value > floor:
        value = max(value // 2, floor)
        steps.append(value)
    return steps if len(steps) <= 4 else [*steps[:3], floor]
