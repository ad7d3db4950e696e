"""Loading optimizer state without touching a single bit: `torch.optim.Optimizer.load_state_dict` converts every state tensor to the
dtype of its parameter, which ruins 8-bit codes and fp32 moments of 16-bit weights (pytorch/pytorch#43706). This never converts.
"""

import re
from typing import Any

import torch
from torch import Tensor

from tare.core.errors import CheckpointError
from tare.core.leaf import Leaf
from tare.core.storage import Slot

_WRAPPED = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|module)\.")


def check_groups(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    if len(mine) != len(theirs):
        raise CheckpointError(
            f"load_state_dict: the optimizer has {len(mine)} parameter groups, the state {len(theirs)}; "
            "build the optimizer from the same groups"
        )
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if len(a["params"]) != len(b["params"]):
            raise CheckpointError(
                f"load_state_dict: group {number} has {len(a['params'])} parameters here and {len(b['params'])} in the "
                "state; build the optimizer from the same parameters"
            )


def check_leaf(leaf: Leaf, slots: dict[str, Slot], raw: dict[str, Any]) -> None:
    """Names, shapes and dtypes of one leaf's saved state must be the ones that its transform names."""
    wanted = {name: (shape, dtype) for slot in slots.values() for name, shape, dtype in slot.parts()}
    counts = {slot.name for slot in slots.values() if slot.form == "count"} | {"step"}
    missing = sorted((set(wanted) | counts) - set(raw))
    extra = sorted(set(raw) - set(wanted) - counts)
    if missing or extra:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(extra)}"
        raise CheckpointError(
            f"load_state_dict: state of {leaf.name!r} {what}; it comes from another method or storage policy"
        )
    for name, (shape, dtype) in wanted.items():
        value = raw[name]
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"load_state_dict: {name} of {leaf.name!r} is {found}, expected {shape} {dtype}; "
                "rank, block or storage differ from the saved run"
            )


def place(value: Any, device: torch.device) -> Any:
    """A copy of a saved value on the parameter's device, in its own dtype; counts become ints."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, copy=True)
    return value


def match_order(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[Any]:
    """Saved parameter ids in the order of our parameters: by name where both sides have the same names, by position where one has none or
    all are other ones (a renamed model, as torch does it).

    What `torch.compile` and DDP put before a name does not count. Raises `CheckpointError` where only some names are the same.
    """
    order: list[Any] = []
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        names, saved = ([_WRAPPED.sub("", name) for name in group.get("param_names") or []] for group in (a, b))
        if set(names) == set(saved) and names:
            by_name = dict(zip(saved, b["params"], strict=True))
            order += [by_name[name] for name in names]
        elif set(names) & set(saved):
            lost = sorted(set(names) - set(saved))[0]
            raise CheckpointError(
                f"load_state_dict: group {number} of the state has no {lost!r}, but others of its names; build the optimizer from the same "
                "parameters"
            )
        else:
            order += b["params"]
    return order
