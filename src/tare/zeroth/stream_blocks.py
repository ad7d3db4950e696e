"""Blocks: the parts of a model that are brought to the device one after another, found by the list that the model keeps them in."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tare.core.block_list import block_list
from tare.core.errors import InputError, nearest
from tare.core.int8_weight import Int8Weight


@dataclass(eq=False)
class Block:
    """One block: its number in the order of the list, the name of its module, and its distinct parameters."""

    number: int
    name: str
    module: nn.Module
    params: list[Tensor]

    @property
    def bytes(self) -> int:
        return bytes_of(self.params)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def find_blocks(model: nn.Module, names: str | Sequence[str] | None = None) -> list[Block]:
    """The blocks of a model.

    names: of lists of modules (`nn.ModuleList` or `nn.Sequential`), in the order in which they run; None: the `nn.ModuleList` with most
    bytes whose modules are of one class.

    Raises:
        InputError: no such list; a block without parameters of its own, or that shares some with another module; int8 or sparse weights.
    """
    lists = dict(model.named_modules())
    wanted = [_largest(model)] if names is None else [names] if isinstance(names, str) else list(names)
    blocks: list[Block] = []
    for name in wanted:
        found = lists.get(name)
        if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
            known = [n for n, m in lists.items() if n and isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
            raise InputError(
                f"blocks: {name!r} is no list of modules in the model{nearest(name, known)}; lists: {', '.join(known[:6]) or 'none'}"
            )
        for key, module in found.named_children():
            blocks.append(Block(len(blocks), f"{name}.{key}" if name else key, module, list(module.parameters())))
    _check(model, blocks)
    return blocks


def _largest(model: nn.Module) -> str:
    found = block_list(model)
    if found is None:
        raise InputError(
            "blocks: the model has no nn.ModuleList of modules of one class to stream; name its list of blocks, blocks='...', or use "
            "'mezo'"
        )
    return found[0]


def _check(model: nn.Module, blocks: list[Block]) -> None:
    inside: dict[nn.Module, str] = {}
    owners: dict[Tensor, set[str]] = defaultdict(set)
    for block in blocks:
        if block.module in inside:
            raise InputError(
                f"blocks: {block.name} is, or is part of, {inside[block.module]} too; a block is streamed once"
            )
        inside.update(dict.fromkeys(block.module.modules(), block.name))
        for p in block.params:
            owners[p].add(block.name)
    for name, module in model.named_modules():
        for one in module._parameters.values() if module not in inside else ():
            if one is not None:
                owners[one].add(f"{name or 'the model'} (outside of the blocks)")
    for block in blocks:
        for name, p in block.module.named_parameters():
            if len(owners[p]) > 1:
                raise InputError(
                    f"blocks: {block.name}.{name} is tied: {' and '.join(sorted(owners[p]))} share it, so it cannot come and go with "
                    "one block; untie it"
                )
            if isinstance(p, Int8Weight) or p.layout != torch.strided:
                raise InputError(
                    f"blocks: {block.name}.{name} is int8 or sparse; only plain float weights can be streamed"
                )
    if not any(block.params for block in blocks):
        raise InputError("blocks: the blocks have no parameters; there is nothing to stream")
