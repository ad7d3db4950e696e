"""What the tests of release with micro-batches share: their losses, an ordinary step, a projected optimizer, what is held."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import tare
from tare.rules.adam import Adam
from tare.subspace.bases import SVDBasis
from tare.testing.subject import loss_of

MICRO, RANK, PERIOD = 3, 2, 3


def micro_batches(net: nn.Module, step: int, count: int = MICRO) -> list[Callable[[], Tensor]]:
    return [lambda part=part: loss_of(net, count * step + part) / count for part in range(count)]  # type: ignore[misc]


def ordinary_step(optimizer: tare.Optimizer, losses: list[Callable[[], Tensor]], factor: float = 1.0) -> None:
    optimizer.zero_grad()
    for loss in losses:
        loss().backward()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.mul_(factor)
    optimizer.step()


def projected(params: Any, release: bool = True, **axes: Any) -> tare.Optimizer:
    """Adam in a subspace, on every matrix; axes of `Subspace`, or arguments of the optimizer."""
    own = {name: axes.pop(name) for name in ("storage", "maximize", "decay", "weight_decay", "lr") if name in axes}
    axes = {
        "rule": Adam(eps=1e-6, eps_placement="before"),
        "basis": SVDBasis(RANK),
        "refresh": tare.every(PERIOD),
        **axes,
    }
    recipe = tare.Recipe(
        ((("linear", "expert"), tare.Subspace(**axes)), ("*", Adam())), decay=own.pop("decay", "before")
    )
    return tare.Optimizer(params, recipe, own.pop("lr", 5e-3), release=release, **own)


def whole_gradients(optimizer: tare.Optimizer, net: nn.Module, losses: list[Callable[[], Tensor]]) -> int:
    """The most elements of whole gradients that are held when a micro-batch begins; all passes."""
    most = 0

    def watched(loss: Callable[[], Tensor]) -> Tensor:
        nonlocal most
        most = max(most, sum(p.grad.numel() for p in net.parameters() if p.grad is not None))
        return loss()

    optimizer.backward(*(lambda loss=loss: watched(loss) for loss in losses))
    return most


def dense(net: nn.Module) -> int:
    """Elements of the leaves that are not projected: embedding, head, norm, biases."""
    return sum(p.numel() for name, p in net.named_parameters() if name not in PROJECTED)


PROJECTED = ("up.weight", "down.weight", "square.weight")
