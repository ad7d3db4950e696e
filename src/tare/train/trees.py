"""Trees of plain values and tensors as JSON values plus named tensors, and back. Nothing else can be in a checkpoint."""

import math
from typing import Any

from torch import Tensor

_SPECIAL = {math.inf: "inf", -math.inf: "-inf"}


def flatten(tree: Any) -> tuple[Any, dict[str, Any]]:
    """A tree of plain values and tensors as JSON values plus named tensors; `unflatten` gives back an equal tree.

    What has `whole`, a tensor that lies in a file, counts as a tensor.

    >>> import torch
    >>> flatten({"lr": 0.1, "betas": (0.9, 0.999), 0: [None, torch.ones(2)]})
    ({'$dict': [['lr', 0.1], ['betas', {'$tuple': [0.9, 0.999]}], [0, [None, {'$tensor': '0.1'}]]]}, {'0.1': tensor([1., 1.])})
    """
    tensors: dict[str, Any] = {}

    def walk(node: Any, where: str) -> Any:
        if isinstance(node, Tensor) or hasattr(node, "whole"):
            if where in tensors:  # {"a.b": {"c": ...}, "a": {"b.c": ...}}
                raise TypeError(f"state {where}: two tensors would have this name; rename one of them")
            tensors[where] = node.detach() if isinstance(node, Tensor) else node
            return {"$tensor": where}
        if isinstance(node, float) and not math.isfinite(node):
            return {"$float": _SPECIAL.get(node, "nan")}
        if node is None or type(node) in (bool, int, float, str):
            return node
        if type(node) in (list, tuple):
            items = [walk(item, f"{where}.{index}".lstrip(".")) for index, item in enumerate(node)]
            return items if type(node) is list else {"$tuple": items}
        if isinstance(node, dict) and all(type(key) in (str, int) for key in node):
            pairs = [[key, walk(item, f"{where}.{key}".lstrip("."))] for key, item in node.items()]
            simple = all(isinstance(key, str) and not key.startswith("$") for key in node)
            return dict(pairs) if simple else {"$dict": pairs}
        raise TypeError(f"state {where or 'tree'}: a {type(node).__name__} cannot be checkpointed; use plain values")

    return walk(tree, ""), tensors


def unflatten(plain: Any, tensors: Any) -> Any:
    """The inverse of `flatten`. Raises KeyError, TypeError or ValueError if the two parts do not belong together.

    tensors: a mapping; whatever it holds under a tensor's name is put in the tensor's place.
    """
    if isinstance(plain, list):
        return [unflatten(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "$tensor" in plain:
        return tensors[plain["$tensor"]]
    if "$float" in plain:
        return float(plain["$float"])
    if "$tuple" in plain:
        return tuple(unflatten(item, tensors) for item in plain["$tuple"])
    if "$dict" in plain:
        return {key: unflatten(item, tensors) for key, item in plain["$dict"]}
    return {key: unflatten(item, tensors) for key, item in plain.items()}
