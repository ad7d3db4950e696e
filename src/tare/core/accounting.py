"""Accounting: what state costs, exactly, and which leaf gets what and why."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tare.core.leaf import Leaf
from tare.core.storage import Slot
from tare.core.transform import Transform


@dataclass(frozen=True)
class Row:
    """One leaf in the accounts."""

    leaf: Leaf
    transform: Transform
    slots: dict[str, Slot]
    why: str = ""

    @property
    def bytes(self) -> int:
        return sum(slot.bytes for slot in self.slots.values())


@dataclass(frozen=True)
class Breakdown:
    """Optimizer state in bytes: in all, by kind (moment, basis, exact), by role and by leaf.

    shared: constants that rules keep once for all leaves, such as tables of cosines: memory, but no state, and not in total.
    """

    total: int
    by_kind: dict[str, int] = field(default_factory=dict)
    by_role: dict[str, int] = field(default_factory=dict)
    by_leaf: dict[str, int] = field(default_factory=dict)
    shared: int = 0

    def __int__(self) -> int:
        return self.total

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Breakdown":
        kinds: dict[str, int] = defaultdict(int)
        roles: dict[str, int] = defaultdict(int)
        leaves: dict[str, int] = defaultdict(int)
        shared: dict[str, int] = {}
        for row in rows:
            shared.update(row.transform.shared(row.leaf))
            roles[row.leaf.role] += row.bytes
            leaves[row.leaf.name] += row.bytes
            for slot in row.slots.values():
                if slot.form != "count":
                    kinds[slot.spec.kind] += slot.bytes
        return cls(sum(leaves.values()), dict(kinds), dict(roles), dict(leaves), sum(shared.values()))


def explain(rows: list[Row], notes: list[str], every_leaf: bool = False) -> str:
    """A table: leaf, role, shape, rule, rank, kept as, bytes, why.

    Leaves that differ only in a number of their name (layers) share a line unless `every_leaf`; `n` counts them and
    `bytes` is their sum.
    """
    lines = [("leaf", "n", "role", "shape", "rule", "rank", "kept as", "bytes", "why")]
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        name = row.leaf.name if every_leaf else re.sub(r"(?<=\.)\d+(?=\.)", "*", row.leaf.name)
        forms = sorted({f"{slot.spec.kind} {_form(slot)}" for slot in row.slots.values() if slot.form != "count"})
        shape = "x".join(map(str, row.leaf.shape)) or "scalar"
        rank = str(row.transform.rank_for(row.leaf) or "-")
        rule = row.transform.describe()
        groups[name, row.leaf.role, shape, rule, rank, ", ".join(forms) or "nothing", row.why].append(row)
    for (name, role, shape, rule, rank, kept, why), alike in groups.items():
        total = f"{sum(row.bytes for row in alike):,}"
        lines.append((name, str(len(alike)), role, shape, rule, rank, kept, total, why))
    lines.append(("total", str(len(rows)), "", "", "", "", "", f"{sum(row.bytes for row in rows):,}", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = {1, 5, 7}
    text = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text + notes)


def _form(slot: Slot) -> str:
    if slot.form in ("int8", "int4", "seed"):
        return slot.form
    if slot.affine:
        return f"int{slot.form.removeprefix('affine')} groups"
    return str(slot.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
