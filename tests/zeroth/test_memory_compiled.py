"""Perturbing models that are compiled, whole or in part, before the optimizer or after it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.zeroth.probes import Point

X = torch.linspace(-1.0, 1.0, 24).view(4, 6)
POINTS = [Point(((0, c),)) for c in (0.1, -0.1, 0.03, 0.1)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).square().mean()


Runner = Callable[[Tensor], Tensor]
GRAPHS: list[object] = []  # what torch has compiled


def eager(graph: nn.Module, inputs: list[Tensor]) -> Callable[..., Tensor]:
    """A backend that runs graphs as they are, and counts them."""
    GRAPHS.append(graph)
    return graph.forward


def outside(model: nn.Module) -> tuple[nn.Module, Runner]:
    return model, torch.compile(model, backend=eager)


def function(model: nn.Module) -> tuple[nn.Module, Runner]:
    return model, torch.compile(lambda x: model(x) * 1.0, backend=eager)


def used_before(model: nn.Module) -> tuple[nn.Module, Runner]:
    compiled = torch.compile(model, backend=eager)
    with torch.no_grad():
        compiled(X)
    return model, compiled


def given(model: nn.Module) -> tuple[nn.Module, Runner]:
    compiled = torch.compile(model, backend=eager)
    return compiled, compiled


def by_method(model: nn.Module) -> tuple[nn.Module, Runner]:
    model.compile(backend=eager)
    return model, model


def partly(model: nn.Module) -> tuple[nn.Module, Runner]:
    model.body = torch.compile(model.body, backend=eager)
    return model, model


@pytest.mark.parametrize("how", [outside, function, used_before, given, by_method, partly])
def test_a_compiled_model_stands_at_the_point(how: Callable[[nn.Module], tuple[nn.Module, Runner]]) -> None:
    torch._dynamo.reset()
    GRAPHS.clear()
    torch.manual_seed(1)
    plain = Net()
    before = [p.detach().clone() for p in plain.parameters()]
    twin = Net()
    params, run = how(plain)
    optimizer = tare.MeZO(params, lr=0.1, seed=5)
    leaves = optimizer._moved()
    for point in (*POINTS, Point(), *POINTS):
        with torch.no_grad():
            found = optimizer.memory.evaluate(leaves, point, lambda: run(X))
            for p, leaf in zip(twin.parameters(), leaves, strict=True):
                p.copy_(leaf.perturbed(point))
            torch.testing.assert_close(found, twin(X))
        assert all(torch.equal(p, old) for p, old in zip(plain.parameters(), before, strict=True))
    if how in (outside, function, used_before) and not GRAPHS:
        return  # torch gave up on compiling and called the modules: their hooks did it
    assert len(optimizer.memory.elsewhere) == (2 if how is partly else 4)
    assert "compiled" in "\n".join(optimizer.memory.describe())
