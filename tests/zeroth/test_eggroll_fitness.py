"""EGGROLL with fitness that has no gradient, and with other directions than its own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tare.methods.eggroll import Eggroll
from tare.zeroth.members import Members
from tare.zeroth.record import Record


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("together", [None, 1])
def test_accuracy_is_enough(together: int | None) -> None:
    """Fitness without a gradient: hits and misses, side by side and one member after another, with the same numbers."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    seen: list[Record] = []
    opt = Eggroll(net, 1.0, 0.1, members=32, maximize=True, together=together, on_step=seen.append)
    for _ in range(40):
        opt.step(lambda members: members.mean(net(members.repeat(x)).argmax(1) == members.repeat(y)))
    assert all(loss * 64 == round(loss * 64) for record in seen for loss in record.losses)
    assert sum(seen[0].losses) / 32 < 0.6
    assert (net(x).argmax(1) == y).float().mean() > 0.85


@pytest.mark.parametrize("members_told", [True, False])
def test_where_all_members_hit_alike_nothing_moves(members_told: bool) -> None:
    net, x = two_layers(), torch.randn(5, 4, dtype=torch.float64)
    start = copy.deepcopy(net)

    def hits(members: Members) -> Tensor:
        return members.mean(net(members.repeat(x)).isfinite().all(1))

    opt = Eggroll(net, 1.0, 0.1, members=8, maximize=True)
    for _ in range(2):
        opt.step(hits if members_told else lambda: 1)
    assert all(p.equal(q) for p, q in zip(net.parameters(), start.parameters(), strict=True))


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_other_directions_by_name(law: str) -> None:
    """Side by side each module then runs one member after another; the losses are those of members alone."""
    x, found = torch.randn(5, 4, dtype=torch.float64), []
    for together in (None, 1):
        net = two_layers()
        opt = Eggroll(net, 1.0, 0.1, members=6, directions=law, together=together)
        for _ in range(2):
            opt.step(lambda members, net=net: members.mean(net(members.repeat(x)).square()))
        found.append([p.detach() for p in net.parameters()])
        assert law in opt.explain()
    assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(*found, strict=True))
