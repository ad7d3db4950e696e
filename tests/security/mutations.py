"""Damage to bytes and to JSON trees, as hypothesis strategies."""

import copy
from typing import Any

from hypothesis import strategies as st

NASTY = [
    0, -1, 2**31, 2**63, 2**64, 1e308, -0.0, True, None, "", "\0", "..", "../../x", "a" * 5000, [], {}, [[]], {"": {}}, "nan", "[" * 50,
    {"$tensor": "x"}, {"$tuple": 3}, {"$dict": [1]}, {"$float": []}, {"$ref": "#"},
]  # fmt: skip
json_values = (
    st.sampled_from(NASTY).map(copy.deepcopy) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
)


@st.composite
def damaged(draw: Any, data: bytes, most: int = 6) -> bytes:
    """Bytes with a few of them changed, cut out, doubled or put in, or the whole cut short."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        if not found:
            break
        at = draw(st.integers(0, len(found) - 1))
        what = draw(st.sampled_from(["flip", "set", "insert", "delete", "double", "cut"]))
        end = min(len(found), at + draw(st.integers(1, 40)))
        if what == "flip":
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "set":
            found[at] = draw(st.integers(0, 255))
        elif what == "insert":
            found[at:at] = draw(st.binary(max_size=20))
        elif what == "delete":
            del found[at:end]
        elif what == "double":
            found[at:at] = found[at:end]
        else:
            del found[at:]
    return bytes(found)


def paths(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [here, *(place for key, item in items for place in paths(item, (*here, key)))]


@st.composite
def altered(draw: Any, tree: Any, most: int = 2) -> Any:
    """A JSON tree in which a few values are others, gone, or under another key."""
    found = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(paths(found)))
        if not place:
            found = draw(json_values)
            continue
        node = found
        for key in place[:-1]:
            node = node[key]
        what = draw(st.sampled_from(["other", "gone", "renamed"]))
        if what == "gone":
            del node[place[-1]]
        elif what == "renamed" and isinstance(node, dict):
            node[draw(st.text(max_size=8))] = node.pop(place[-1])
        else:
            node[place[-1]] = draw(json_values)
    return found
