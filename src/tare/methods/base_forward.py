"""What the named constructors of forward-only methods share: recipe, laws by name, and arguments that are a name or an object."""

from typing import Any

from torch import Tensor

from tare.core.errors import InputError, nearest
from tare.core.leaf import as_groups, normalise_group
from tare.core.recipe import Match, Recipe
from tare.core.transform import Transform
from tare.zeroth import laws
from tare.zeroth.assembly import settled
from tare.zeroth.directions import Directed, Law, Untouched
from tare.zeroth.shared import unwrapped

NO_DECAY = ("bias", "layer_norm", "layernorm")  # what MeZO's published code looks for in names
LAWS: dict[str, Law] = {name: laws.law(name) for name in laws.LAWS}


def forward_recipe(law: Law, rule: Transform, targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY) -> Recipe:
    """Leaves that `targets` matches get the law and the rule; the others are left alone.

    undecayed: a leaf with one of these words in its name, in any case, is passed by when weights decay.
    """
    trained = (targets, Directed(law, rule, undecayed=undecayed))
    return Recipe((trained,) if targets == "*" else (trained, ("*", Untouched())), decay="before")


def named_leaves(params: Any) -> tuple[Any, list[tuple[str, Tensor]]]:
    """The parameters in a form that can be read twice, and every one with its name (empty where it has none)."""
    params = settled(params)
    found: dict[Tensor, str] = {}
    for group in as_groups(unwrapped(params)):
        normal, roles = normalise_group(group)
        items = [item if isinstance(item, tuple) else ("", item) for item in normal["params"]]
        found.update((p, name) for name, p in items if p in roles)
    return params, [(name, p) for p, name in found.items()]


def law_of(directions: str | Law) -> Law:
    """A law of directions by its name, or as it is given."""
    found: Law = pick("directions", directions, LAWS)
    return found


def pick(argument: str, given: Any, known: dict[str, Any]) -> Any:
    """One of `known` by its name, or an object that can do what they can, as it is given.

    >>> pick("probe", "one", {"one": 1, "two": 2})
    1

    Raises:
        InputError: a name that is none of them, or an object of another kind.
    """
    if isinstance(given, str):
        if given not in known:
            raise InputError(
                f"Invalid {argument}: {given!r}; expected one of {', '.join(known)}{nearest(given, list(known))}, or an object"
            )
        return known[given]
    first = next(iter(known.values()))
    duties = [name for name in ("ask", "draw", "update", "shape") if callable(getattr(first, name, None))]
    if not all(callable(getattr(given, name, None)) for name in duties):
        raise InputError(f"Invalid {argument}: {given!r}; expected one of {', '.join(known)}, or an object like theirs")
    return given
