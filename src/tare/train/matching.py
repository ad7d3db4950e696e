"""Only some leaves: patterns of names or roles, and freezing whatever they do not match."""

import fnmatch

from torch import nn

from tare.core.errors import InputError, nearest
from tare.core.leaf import named_roles


def patterns(text: str) -> list[str]:
    """The patterns of a setting, one by one."""
    return [part.strip() for part in text.split(",") if part.strip()]


def keep_matching(model: nn.Module, text: str) -> list[str]:
    """Freeze every leaf that no pattern matches; returns the names of those that are trained.

    A pattern is a role (`bias`, `norm`, `head`, ...), or a path that stands anywhere in a leaf's name, whole parts of it, with the
    wildcards of a shell: `layers.*.mlp` matches `model.layers.3.mlp.up_proj.weight`.

    Raises:
        InputError: a pattern that matches nothing.
    """
    listed = [(name, p, role) for name, p, role in named_roles(model)]
    kept: list[str] = []
    wanted = patterns(text)
    hits = dict.fromkeys(wanted, 0)
    for name, p, role in listed:
        found = [each for each in wanted if each == role or fnmatch.fnmatchcase(f".{name}.", f"*.{each}.*")]
        for each in found:
            hits[each] += 1
        p.requires_grad_(bool(found))
        kept += [name] if found else []
    for each, count in hits.items():
        if not count:
            parts = list(dict.fromkeys(part for name, _, _ in listed for part in name.split(".") if not part.isdigit()))
            raise InputError(
                f"train.match: {each!r} matches no parameter{nearest(each, parts)}; names are like {listed[0][0]}, of the parts "
                f"{', '.join(parts)}"
            )
    return kept
