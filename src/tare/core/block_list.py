"""The list of blocks of a model: what is streamed, sharded and planned block by block. Found once, here."""

import math

from torch import nn


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and modules of the `nn.ModuleList` that holds most bytes among those whose modules are of one class; None without one.

    Of lists with as much the outer one, which is met first: the layers of a mixture of experts, not the experts of one layer.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    >>> block_list(model)[0], block_list(nn.Linear(4, 4))
    ('1', None)
    """
    best: tuple[str, nn.ModuleList] | None = None
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        size = sum(math.prod(p.shape) * p.element_size() for p in module.parameters())
        if size > most:
            best, most = (name, module), size
    return best
