"""Perturbing inside forward: every way in which a module can be used gives the loss at theta + point, and theta is never written."""

import copy
import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tare
from tare.core.errors import InputError
from tare.zeroth.memory import InForward, Moved
from tare.zeroth.probes import Point

X = torch.linspace(-1.0, 1.0, 24).view(4, 6)
TOKENS = torch.arange(12).view(2, 6) % 7
POINTS = [Point(((0, c),)) for c in (0.1, -0.1, 0.03)]
Loss = Callable[[nn.Module], Tensor]
Case = tuple[Callable[[], nn.Module], Loss, set[str]]


def on_x(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def on_tokens(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS).reshape(-1, 7), TOKENS.reshape(-1))


class Tied(nn.Module):
    """The head reads the embedding's weight, as a module of its own or as a tensor."""

    def __init__(self, functional: bool):
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = None if functional else nn.Linear(6, 7, bias=False)
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(self.embed(tokens))
        return F.linear(h, self.embed.weight) if self.head is None else self.head(h)


class Methods(nn.Module):
    """`encode` is called, `forward` is not."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def encode(self, x: Tensor) -> Tensor:
            return x @ self.weight

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Methods.Inner(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner.encode(x))


class Shared(nn.Module):
    """One module under two names, another one that calls itself, and a weight of the parent's own."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6) / 3)

        def forward(self, x: Tensor, times: int = 3) -> Tensor:
            x = torch.tanh(x @ self.weight)
            return self(x, times - 1) @ self.weight if times else x

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second, self.again, self.gain = self.first, Shared.Again(), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x) * self.gain)) * self.gain


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.block, x, use_reentrant=False))


class Replicated(nn.Module):
    """As nn.DataParallel: a copy of the module runs, whose weights are plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        replica = self.inner._replicate_for_data_parallel()
        for name, p in self.inner._parameters.items():
            setattr(replica, name, p.clone())
        return replica(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Address(nn.Module):
    """Reads a weight's memory past the dispatcher, as kernels that are given addresses do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(6, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.scale(torch.zeros(1, 3))  # called, but not where it matters
        return self.lin(x) * torch.from_numpy(self.scale.weight.detach().numpy()).sum()


def penalised(model: nn.Module) -> Tensor:
    return on_x(model) + sum(p.square().sum() for p in model.parameters())


def called_functionally(model: nn.Module) -> Tensor:
    return torch.func.functional_call(model, dict(model.named_parameters()), (X,)).square().mean()


def attention() -> nn.Module:
    return nn.MultiheadAttention(6, 2, batch_first=True)


def on_attention(model: nn.Module) -> Tensor:
    x = X.view(2, 2, 6)
    return model(x, x, x)[0].square().mean()


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()  # has a fused path when it is not hooked


def on_sequence(model: nn.Module) -> Tensor:
    found = model(X.view(2, 2, 6))
    return (found[0] if isinstance(found, tuple) else found).square().mean()


CASES: dict[str, Case] = {
    "plain": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), on_x, set()),
    "conv": (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Flatten()), on_x, set()),
    "tied modules": (lambda: Tied(False), on_tokens, set()),
    "tied by function": (lambda: Tied(True), on_tokens, {"embed.weight"}),
    "multihead attention": (attention, on_attention, {"out_proj.weight", "out_proj.bias"}),
    "transformer layer": (encoder, on_sequence, {"self_attn.out_proj.weight", "self_attn.out_proj.bias"}),
    "other method": (Methods, on_x, {"inner.weight"}),
    "shared, recursive, nested": (Shared, on_x, set()),
    "parametrization": (lambda: parametrizations.weight_norm(nn.Linear(6, 3)), on_x, set()),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 3)), on_x, set()),
    "weight norm by hook": (lambda: nn.utils.weight_norm(nn.Linear(6, 3)), on_x, set()),
    "checkpointed": (Checkpointed, on_x, set()),
    "recurrent": (lambda: nn.LSTM(6, 5, batch_first=True), on_sequence, {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}),
    "replicated": (Replicated, on_x, {"inner.weight", "inner.bias"}),
    "unused": (Unused, on_x, {"unused.weight", "unused.bias"}),
    "by address": (Address, on_x, {"scale.weight"}),
    "penalty on all": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), penalised, {"0.weight", "0.bias", "1.weight", "1.bias"}),
    "functional call": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), called_functionally, set()),
    "scripted": (lambda: torch.jit.script(nn.Linear(6, 3)), on_x, {"weight", "bias"}),
}  # fmt: skip


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return make().to(dtype)


def setting(model: nn.Module, **more: object) -> tuple[tare.MeZO, list[Moved]]:
    optimizer = tare.MeZO(model, lr=0.1, seed=5, **more)
    return optimizer, optimizer._moved()


def expected(make: Callable[[], nn.Module], leaves: list[Moved], point: Point, loss: Loss) -> Tensor:
    """From another model whose weights are the perturbed ones."""
    model = built(make)
    own = dict(model.named_parameters())
    for leaf in leaves:
        own[leaf.name].data.copy_(leaf.perturbed(point))
    with torch.no_grad():
        return loss(model)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_the_loss_is_that_of_the_point_and_weights_are_untouched(name: str) -> None:
    make, loss, elsewhere = CASES[name]
    model = built(make)
    before = copy.deepcopy(model.state_dict())
    optimizer, leaves = setting(model)
    memory = optimizer.memory
    assert isinstance(memory, InForward)
    for point in (*POINTS, Point()):
        with torch.no_grad():
            found = memory.evaluate(leaves, point, lambda: loss(model))
        torch.testing.assert_close(found, expected(make, leaves, point, loss), rtol=1e-6, atol=1e-7)
    assert {leaf for leaf, _ in memory.elsewhere.values()} == elsewhere
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(not m._forward_pre_hooks or name == "weight norm by hook" for m in model.modules())
    assert all(any(p is q for q in model.parameters()) for p in optimizer._entries)


def test_what_moves_out_of_forward_is_said() -> None:
    model = built(lambda: Tied(True))
    optimizer, leaves = setting(model)
    assert "embed.weight" not in "\n".join(optimizer.memory.describe())
    with torch.no_grad():
        optimizer.memory.evaluate(leaves, POINTS[0], lambda: on_tokens(model))
    line = "perturbed in place, put back exactly: embed.weight (read outside its module's forward)"
    assert line in optimizer.explain().splitlines()


def test_both_plans_take_the_same_steps_to_the_last_bit() -> None:
    weights = []
    for memory in ("forward", "in-place-exact"):
        model = built(lambda: Tied(True), torch.bfloat16)
        optimizer = tare.MeZO(model, lr=0.01, eps=0.01, seed=1, memory=memory)
        losses = [optimizer.step(lambda model=model: on_tokens(model).float()) for _ in range(5)]
        weights.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, mine), (others, theirs) = weights
    assert losses == others
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_watched_evaluation_costs_none_where_nothing_is_found_and_one_where_something_is() -> None:
    for functional, extra in ((False, 0), (True, 1)):
        model = built(lambda functional=functional: Tied(functional))
        optimizer, _ = setting(model)
        for _ in range(3):
            optimizer.step(lambda model=model: on_tokens(model))
        assert optimizer.evaluated == 6 + extra


class Routed(nn.Module):
    """Runs one expert of three; which one, the closure decides."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.number = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.number](x)


def test_modules_that_are_called_now_and_then() -> None:
    model = built(Routed)
    optimizer, leaves = setting(model)
    runs = 0

    def run() -> Tensor:
        nonlocal runs
        runs += 1
        return on_x(model)

    used = []
    for number in (0, 1, 0, 2, 1, 0):
        model.number = number
        with torch.no_grad():
            found = optimizer.memory.evaluate(leaves, POINTS[0], run)
        twin = built(Routed)
        twin.number = number
        own = dict(twin.named_parameters())
        for leaf in leaves:
            own[leaf.name].data.copy_(leaf.perturbed(POINTS[0]))
        assert torch.equal(found, on_x(twin).detach())
        used.append(runs)
    # the experts that did not run at first are written in place; that the first one rests is found out once
    assert used == [1, 3, 4, 5, 6, 7]
    assert {name for name, _ in optimizer.memory.elsewhere.values()} == {
        f"experts.{k}.{p}" for k in (1, 2) for p in ("weight", "bias")
    }


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.fault = nn.Linear(6, 6), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x)
        if self.fault is not None:
            raise self.fault
        return self.lin(x)


@pytest.mark.parametrize("fault", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["parent", "hook before", "hook after"])
@pytest.mark.parametrize("functional", [False, True])
def test_after_an_exception_everything_is_as_before(fault: BaseException, where: str, functional: bool) -> None:
    model = nn.Sequential(built(Failing), built(Failing))
    optimizer, leaves = setting(model)

    def loss() -> Tensor:
        return on_x(model) + (model[0].lin.weight.sum() if functional else 0.0)

    with torch.no_grad():
        good = optimizer.memory.evaluate(leaves, POINTS[0], loss)
    before = copy.deepcopy(model.state_dict())

    def raising(*_: object) -> None:
        raise fault

    handle = None
    if where == "parent":
        model[1].fault = fault
    elif where == "hook before":
        handle = model[1].lin.register_forward_pre_hook(raising)
    else:
        handle = model[1].lin.register_forward_hook(raising)
    with torch.no_grad(), pytest.raises(type(fault)):
        optimizer.memory.evaluate(leaves, POINTS[1], loss)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())
    model[1].fault = None
    if handle is not None:
        handle.remove()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(optimizer.memory.evaluate(leaves, POINTS[0], loss), good)


def test_hooks_of_others_see_the_weight_that_forward_sees() -> None:
    model = built(lambda: nn.Linear(6, 3))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.weight.clone()))
    model.register_forward_hook(lambda module, *_: seen.append(module.weight.clone()))
    optimizer, leaves = setting(model)
    with torch.no_grad():
        optimizer.memory.evaluate(leaves, POINTS[0], lambda: on_x(model))
    (leaf,) = [leaf for leaf in leaves if leaf.name == "weight"]
    assert len(seen) == 2
    assert all(torch.equal(weight, leaf.perturbed(POINTS[0])) for weight in seen)


def test_frozen_leaves_and_weights_put_there_by_others_are_left_alone() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    model[0].requires_grad_(False)
    optimizer, leaves = setting(model)
    assert {leaf.name for leaf in leaves} == {"1.weight", "1.bias"}
    given = {"1.weight": torch.ones(3, 6)}

    def loss() -> Tensor:
        return torch.func.functional_call(model, given, (X,)).square().mean()

    (bias,) = [leaf for leaf in leaves if leaf.name == "1.bias"]
    with torch.no_grad():
        found = optimizer.memory.evaluate(leaves, POINTS[0], loss)
        by_hand = F.linear(F.linear(X, model[0].weight, model[0].bias), given["1.weight"], bias.perturbed(POINTS[0]))
    assert torch.equal(found, by_hand.square().mean())


def test_comparing_catches_what_no_watch_can_see() -> None:
    for compare in (False, True):
        model = built(lambda: nn.Linear(6, 3))
        address = model.weight.data_ptr()  # an extension that reads memory on its own

        def loss(model: nn.Module = model, address: int = address) -> Tensor:
            return on_x(model) + ctypes.c_float.from_address(address).value

        optimizer = tare.MeZO(model, lr=0.1, memory=InForward(model, compare=compare))
        leaves = optimizer._moved()
        with torch.no_grad():
            found = optimizer.memory.evaluate(leaves, POINTS[0], loss)
            moved = [leaf.perturbed(POINTS[0]) for leaf in leaves]
            hidden = (moved[0] if compare else model.weight).view(-1)[0]
        assert float(found) == pytest.approx(float(F.linear(X, *moved).square().mean() + hidden), abs=1e-6)
        assert len(optimizer.memory.elsewhere) == (2 if compare else 0)
        assert torch.equal(model.weight, built(lambda: nn.Linear(6, 3)).weight)


def test_a_model_in_fp64_and_in_bf16() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = built(lambda: nn.Linear(6, 3), dtype)
        optimizer, leaves = setting(model)
        with torch.no_grad():
            found = optimizer.memory.evaluate(
                leaves, POINTS[0], lambda model=model, dtype=dtype: model(X.to(dtype)).sum()
            )
            weight, bias = (leaf.perturbed(POINTS[0]) for leaf in leaves)
        assert weight.dtype == dtype
        assert torch.equal(found, F.linear(X.to(dtype), weight, bias).sum())


def test_offloaded_weights_are_refused() -> None:
    """Whoever offloads puts his own copies in place of ours, unseen."""
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3, device="meta"))
    optimizer, leaves = setting(model)
    with pytest.raises(InputError, match=r"1\.weight: its weights are on the meta device"):
        optimizer.memory.evaluate(leaves, POINTS[0], lambda: on_x(model[0]))
