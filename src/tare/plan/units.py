"""The units of a model: the blocks that are gathered and dropped one after the other where its weights are sharded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from tare.core.block_list import block_list
from tare.core.errors import InputError

Boundary = Callable[[Literal["enter", "leave"], int], None]
ROOT = -1  # the number of the model around the units


def units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a model by name, as `parallel.wrap` cuts them.

    Raises:
        InputError: it has no list of equal blocks.
    """
    found = block_list(model)
    if found is None:
        raise InputError(
            f"parallel: a {type(model).__name__} has no list of equal blocks (nn.ModuleList) to cut it by; use --parallel ddp"
        )
    return [(f"{found[0]}.{number}", part) for number, part in enumerate(found[1])]


class _Leaving(torch.autograd.Function):
    """The identity, which says so when the gradients of what it was given are complete."""

    @staticmethod
    def forward(ctx: Any, left: Callable[[], None], *inputs: torch.Tensor) -> Any:
        ctx.left = left
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.left()
        return (None, *gradients)


@contextmanager
def watched(model: nn.Module, forward: Boundary, backward: Boundary) -> Iterator[None]:
    """Calls back when a unit begins and ends, in forward and in backward; at the places where `fully_shard` gathers and drops it.

    The model around the units has the number -1: in forward it ends before its loss is used, in backward it begins with its outputs.
    """
    parts = dict(enumerate(part for _, part in units(model)))
    hooks: list[Any] = []
    again = False  # a block that is run again in backward: not a forward of its own

    def attach(number: int, part: nn.Module) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if again:
                return None
            forward("enter", number)
            if number == ROOT or not torch.is_grad_enabled():
                return None
            found = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
            if not found:
                return None
            changed = dict(zip(map(id, found), _Leaving.apply(lambda: backward("leave", number), *found), strict=True))
            return (
                tuple(changed.get(id(x), x) for x in args),
                {name: changed.get(id(x), x) for name, x in kwargs.items()},
            )

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if again:
                return
            forward("leave", number)
            begun = False

            def begin(gradient: torch.Tensor) -> None:
                nonlocal begun, again
                if not begun:
                    begun = again = True
                    backward("enter", number)

            for x in torch.utils._pytree.tree_leaves(output):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    x.register_hook(begin)

        hooks.append(part.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        hooks.append(part.register_forward_hook(leave, with_kwargs=True))

    for number, part in (*parts.items(), (ROOT, model)):
        attach(number, part)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
