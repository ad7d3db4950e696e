"""How often a released step makes the host wait for the device: a number that does not grow with the leaves.

Counted on the CPU, where nothing waits: each read of a number is an operator, or a call of `Tensor.tolist`, which is none there.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tare
from tare.core.clipping import NORM, NotFinite, numbers_of
from tare.methods import registry
from tare.testing.subject import same, snapshot


class Reads(TorchDispatchMode):
    """Counts what would be waits on a GPU: `item`, `float`, `bool` and `tolist` of tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        lists = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.count += 1
            return lists(tensor)

        monkeypatch.setattr(Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def loss_of(net: Deep, number: int = 0) -> Tensor:
    loss: Tensor = net(torch.linspace(-1, 1, 24).view(4, 6) + 0.1 * number).square().mean()
    return loss


def built(key: str, net: nn.Module, release: bool = True, **own: Any) -> tare.Optimizer:
    options = registry.options(key)
    small = {name: value for name, value in (("rank", 2), ("period", 50)) if name in options}
    return tare.create(key, net, 1e-2, release=release, **small, **own)


def reads(key: str, layers: int, monkeypatch: pytest.MonkeyPatch, micro: int = 1, **how: Any) -> int:
    """Reads of the third step: an ordinary one."""
    net = Deep(layers)
    optimizer = built(key, net)
    optimizer.clip_release(**how)
    for number in range(3):
        with monkeypatch.context() as patch, Reads(patch) as counter:
            optimizer.backward(*[lambda: loss_of(net, number)] * micro)  # noqa: B023
            optimizer.step()
    assert optimizer.clipped is not None
    return counter.count


HOW: dict[str, dict[str, Any]] = {
    "norm": {"max_norm": None},
    "norm, checked": {"max_norm": None, "strict": "step"},
    "previous": {"max_norm": 0.1},
    "previous, checked": {"max_norm": 0.1, "strict": "step"},
    "two passes": {"max_norm": 0.1, "mode": "two-pass", "strict": "step"},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("key", ["adamw", "galore", "lion", "muon", "galore-8bit", "q-galore"])
def test_one_read_a_step(key: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads(key, 3, monkeypatch, **how) == reads(key, 9, monkeypatch, **how) == 1


@pytest.mark.parametrize("how", [HOW["norm"], HOW["norm, checked"], HOW["two passes"]])
@pytest.mark.parametrize("key", ["adamw", "galore"])
def test_one_read_a_step_of_several_micro_batches(
    key: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projected ones: there is no norm to tell, so that only a check reads anything."""
    wanted = 0 if key == "galore" and how == HOW["norm"] else 1
    assert reads(key, 3, monkeypatch, 3, **how) == reads(key, 9, monkeypatch, 3, **how) == wanted


def test_no_read_where_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Deep(5)
    optimizer = built("adamw", net)
    with Reads(monkeypatch) as counter:
        loss_of(net).backward()
        optimizer.step()
    assert counter.count == 0


def test_a_check_of_each_leaf_reads_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the counter counts."""
    assert reads("adamw", 4, monkeypatch, max_norm=None, strict="leaf") == 2 * 4 + 1


def test_numbers_of() -> None:
    values = [torch.tensor(1.5), torch.tensor(2.0, dtype=torch.float64), torch.tensor(math.inf), torch.tensor(0.1)]
    assert numbers_of(values) == [1.5, 2.0, math.inf, float(torch.tensor(0.1))]
    assert numbers_of([]) == []


# -- what `step` guarantees --------------------------------------------------------------------------------------------


def bad_loss(net: Deep, layer: int, value: float = math.inf) -> Tensor:
    return loss_of(net) + (net.layers[layer].weight * value).sum().nan_to_num(0.0)


@pytest.mark.parametrize("key", ["adamw", "galore", "galore-8bit", "lion", "muon"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_bad_leaf_takes_the_step_of_a_zero_gradient(key: str, value: float) -> None:
    """No number that is not finite is written, the others are stepped, and the step says which it was."""
    a, b = Deep(4), Deep(4)
    one, two = built(key, a, release=False), built(key, b)
    two.clip_release(None, strict="step")
    for number in range(2):
        one.zero_grad()
        loss_of(a, number).backward()
        one.step()
        two.backward(lambda: loss_of(b, number))  # noqa: B023
        two.step()
    norm = two.param_groups[0][NORM]
    one.zero_grad()
    loss_of(a).backward()
    a.layers[2].weight.grad.zero_()
    one.step()
    two.backward(lambda: bad_loss(b, 2, value))
    with pytest.raises(NotFinite, match=r"^the gradient of layers\.2\.weight is not finite$"):
        two.step()
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), key)
    assert two.clipped is not None
    assert not math.isfinite(two.clipped.norm or 0.0)
    assert two.param_groups[0][NORM] == norm
    one.zero_grad()  # and the next step is an ordinary one
    loss_of(a, 1).backward()
    one.step()
    two.backward(lambda: loss_of(b, 1))
    two.step()
    same(snapshot(b.named_parameters()), snapshot(a.named_parameters()), f"{key}, the next step")


@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_bad_micro_batch_is_seen_in_the_sum(when: int, good: int) -> None:
    """In a sum of whole gradients, of a basis that is still to come, and in one of projections."""
    net = Deep(4)
    optimizer = built("galore", net)
    optimizer.clip_release(None, strict="step")
    for _ in range(good):
        optimizer.backward(*[lambda: loss_of(net)] * 3)
        optimizer.step()
    for number in range(2):
        before = snapshot(net.named_parameters())
        losses = [lambda: loss_of(net)] * 2
        losses.insert(when, lambda: bad_loss(net, 1))
        optimizer.backward(*losses)
        with pytest.raises(NotFinite, match=r"layers\.1\.weight"):
            optimizer.step()
        optimizer.zero_grad()
        after = snapshot(net.named_parameters())
        assert all(bool(t.isfinite().all()) for t in after.values()), number
        assert not torch.equal(after["layers.3.weight"], before["layers.3.weight"])
        for state in optimizer.state.values():
            assert all(
                bool(t.isfinite().all()) for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()
            )


def test_several_bad_leaves_and_a_loop_without_step() -> None:
    net = Deep(4)
    optimizer = built("adamw", net)
    optimizer.clip_release(None, strict="step")
    (bad_loss(net, 1) + bad_loss(net, 3)).backward()
    with pytest.raises(NotFinite, match=r"layers\.3\.weight is not finite, nor 1 more"):
        loss_of(net).backward()  # a leaf that comes again begins a new step
    optimizer.zero_grad()
    loss_of(net).backward()
    optimizer.step()
