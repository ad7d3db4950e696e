"""MeZO's own choices: what is decayed, scales of layers, 16-bit weights, trial steps, what is refused; and the cost of a step."""

import copy
import itertools
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tare import InputError, MeZO, Storage
from tare.core.random import make_key, normal
from tare.zeroth import closure as closures
from tare.zeroth.layers import MEASURED, from_bits, layer_of
from tare.zeroth.probes import Term
from tare.zeroth.record import KEPT, Record


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.layer_norm, self.norm, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 3)
        for name, p in self.named_parameters():
            p.data = normal(make_key(1, name), tuple(p.shape)).mul_(0.5)
        self.to(dtype)

    def forward(self, step: int = 0) -> Tensor:
        x = self.embed((torch.arange(9) + step) % 7)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return (self.head(self.norm(self.layer_norm(x))).float() - 1).square().mean()


def linear(model: nn.Module, seed: int = 9) -> tuple[Any, dict[str, Tensor]]:
    """A closure that is linear in the weights, and its gradient."""
    g = {name: normal(make_key(seed, name), tuple(p.shape)).to(p.dtype) for name, p in model.named_parameters()}
    return lambda: sum((g[name] * model.get_parameter(name)).sum() for name in g), g


# -- decay by name -----------------------------------------------------------------------------------------------------


def test_weight_decay_passes_names_by() -> None:
    """The published rule looks for bias, layer_norm and layernorm: a module called norm is decayed."""
    for undecayed, spared in (
        (None, {"layer_norm.weight", "layer_norm.bias", "layers.0.bias", "layers.1.bias", "norm.bias", "head.bias"}),
        ((), set()),
    ):
        net = Net()
        start = copy.deepcopy(dict(net.named_parameters()))
        opt = MeZO(net, lr=0.1, weight_decay=0.5, **({} if undecayed is None else {"undecayed": undecayed}))
        opt.step(lambda: 1.0)
        for name, p in net.named_parameters():
            wanted = start[name] if name in spared else start[name] * 0.95
            assert torch.equal(p, wanted) if name in spared else torch.allclose(p, wanted, rtol=1e-6), name


# -- scales of layers --------------------------------------------------------------------------------------------------


def test_layers_are_found_in_names() -> None:
    net = Net()
    assert {layer_of(name) for name, _ in net.named_parameters()} == {"embeddings", "layers.0", "layers.1", "head"}
    assert layer_of("transformer.h.11.attn.c_attn.weight") == "transformer.h.11"
    assert layer_of("model.layers.3.experts.7.up") == "model.layers.3"
    assert layer_of("transformer.wte.weight") == "embeddings"
    assert layer_of("0.weight") == "0"
    assert layer_of("conv1d.weight") == "head"


def test_parameter_norms() -> None:
    net = Net()
    opt = MeZO(net, scales="parameter-norm")
    for name, p in net.named_parameters():
        alike = [q for other, q in net.named_parameters() if layer_of(other) == layer_of(name)]
        wanted = sum(float(q.detach().double().square().sum()) for q in alike) ** 0.5
        assert from_bits(opt.state[p]["layer_scale"]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("modify", ["variance", "expectation"])
def test_scaled_estimate(modify: str) -> None:
    """Perturbed by z / c, so delta = sum z_l . g_l / c_l; stepped with c z, or with z."""
    net = Net(torch.float64)
    closure, g = linear(net)
    scales = {"embed": 2.0, "layers": 0.5, "": 4.0}
    seen: list[Record] = []
    opt = MeZO(net, lr=1.0, eps=0.5, scales=scales, modify=modify, on_step=seen.append)
    c = {name: 2.0 if "embed" in name else 0.5 if "layers" in name else 4.0 for name in g}
    z = {
        leaf.name: leaf.directed.law.draw(leaf.draw(0), leaf.state, leaf.parameter).view(leaf.parameter.shape).double()
        for leaf in opt._moved()
    }
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt.step(closure)
    delta = sum(float((z[name] * g[name]).sum()) / c[name] for name in g)
    assert seen[0].deltas == pytest.approx([delta], rel=1e-9)
    for name, p in net.named_parameters():
        wanted = start[name] - delta * (c[name] if modify == "variance" else 1.0) * z[name]
        assert torch.allclose(p, wanted, rtol=1e-9, atol=1e-9), name


def test_gradient_norms_are_measured_then_used() -> None:
    """The first step, and every third after it, looks at each layer alone and moves nothing."""
    net = Net(torch.float64)
    closure, _ = linear(net)
    seen: list[Record] = []
    opt = MeZO(net, lr=1e-3, scales="gradient-norm", rescale_every=3, on_step=seen.append)
    start = copy.deepcopy(net.state_dict())
    opt.step(closure)
    layers = sorted({layer_of(name) for name in start})
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    assert len(seen[0].losses) == 2 * len(layers)
    assert not seen[0].moved
    for number, layer in enumerate(layers):
        wanted = abs(seen[0].deltas[number])
        for name, p in net.named_parameters():
            if layer_of(name) == layer:
                assert from_bits(opt.state[p]["layer_scale"]) == pytest.approx(wanted)
    for _ in range(5):
        opt.step(closure)
    assert [record.moved for record in seen] == [False, True, True, False, True, True]
    assert opt.param_groups[0][KEPT][MEASURED] == 3.0
    assert "norms of 4 layers measured first, again every 3 steps" in opt.explain()


def test_a_layer_moves_alone_when_it_is_measured() -> None:
    """On a linear function |delta_l| = |z_l . g_l|: unbiased for the square of the layer's gradient norm."""
    net = Net(torch.float64)
    closure, g = linear(net)
    layers, samples = sorted({layer_of(name) for name in g}), 400
    squares = torch.zeros(samples, len(layers))
    for seed in range(samples):
        seen: list[Record] = []
        MeZO(net, lr=0.0, scales="gradient-norm", seed=seed, memory="in-place-exact", on_step=seen.append).step(closure)
        squares[seed] = torch.tensor(seen[0].deltas).square()
    for number, layer in enumerate(layers):
        wanted = sum(float(value.square().sum()) for name, value in g.items() if layer_of(name) == layer)
        spread = squares[:, number].std() / samples**0.5
        assert abs(squares[:, number].mean() - wanted) < 5 * spread, layer


# -- 16-bit weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_rounded_stochastically_unless_said_otherwise(dtype: torch.dtype) -> None:
    net = Net(dtype)
    for given, wanted in (
        (None, "stochastic"), ({"moment": "bf16"}, "stochastic"), ({"weight": "plain"}, "plain"), (Storage(), "plain"),
        (Storage(weight="master"), "master"),
    ):  # fmt: skip
        assert MeZO(net, storage=given).storage.weight == wanted
    assert MeZO(Net(), storage={"moment": "bf16"}).storage.weight == "plain"
    assert "weights: stochastic" in MeZO(net).explain()
    assert MeZO(p for p in net.parameters()).storage.weight == "stochastic"
    assert MeZO([{"params": iter(net.named_parameters())}]).storage.weight == "stochastic"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_add_up_on_average(dtype: torch.dtype) -> None:
    """200 steps of a hundredth of the gap between two numbers: the mean moves by what was asked, to five standard deviations."""
    net = nn.Linear(64, 64, bias=False).to(dtype)
    net.weight.data.fill_(1.0)
    gap = 2**-7 if dtype == torch.bfloat16 else 2**-10
    opt = MeZO(net, lr=gap / 100)
    z = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(200):
        (leaf,) = opt._moved()
        z += leaf.directed.law.draw(leaf.draw(0), leaf.state, leaf.parameter).view(64, 64).double()
        opt.replay(Record(step, (Term(0, 1.0),), 1.0, ((gap / 100, 0.0),), leaves=("weight",)))
    wanted = 1.0 - gap / 100 * z
    off = (net.weight.detach().double() - wanted) / gap
    # one rounding has variance p (1 - p), p = |z| / 100: 200 of them, with E|z| = 0.8
    assert abs(float(off.mean())) < 5 * (200 * 0.008) ** 0.5 / 64
    assert off.std() < 1.5 * (200 * 0.008) ** 0.5
    assert opt.lost == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lost_updates_are_counted_and_told_once(dtype: torch.dtype) -> None:
    net = Net(dtype)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = MeZO(net, lr=1e-7, storage={"weight": "plain"})
    with pytest.warns(UserWarning, match=r"were too small to change their 16-bit weight.*'stochastic'.*'master'"):
        opt.step(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            opt.step(net)
    total = sum(p.numel() for p in net.parameters())
    moved = sum(int((p != start[name]).sum()) for name, p in net.named_parameters())
    assert opt.lost >= 1 - moved / total - 0.05
    assert f"{opt.lost:.1%} of the updates" in opt.explain()
    exact = MeZO(Net(dtype), lr=1.0, storage={"weight": "plain"})
    model = exact.model
    exact.step(lambda: model() * 100)
    assert exact.lost < 0.1
    assert MeZO(Net(), lr=1e-12).lost == 0.0


def test_a_master_copy_loses_nothing() -> None:
    net = nn.Linear(8, 8, bias=False).half()
    net.weight.data.fill_(1.0)
    opt = MeZO(net, lr=1e-5, storage={"weight": "master"})
    for step in range(50):
        opt.replay(Record(step, (Term(0, 1.0),), 1.0, ((1e-5, 0.0),), leaves=("weight",)))
    assert opt.state_bytes().total == 4 * 64
    assert float(opt.state[net.weight]["weight_master"].sub(1.0).abs().max()) > 1e-5


# -- trial steps, signs ------------------------------------------------------------------------------------------------


def test_conservative_never_gets_worse_on_a_fixed_batch() -> None:
    net = Net(torch.float64)
    opt = MeZO(net, lr=0.5, probe="conservative")
    values = [float(net())]
    for _ in range(30):
        opt.step(net)
        values.append(float(net()))
    assert all(b <= a for a, b in itertools.pairwise(values))
    assert values[-1] < 0.9 * values[0]
    assert opt.probe.evaluations == 5


def test_conservative_needs_one_rate_and_plain_sgd() -> None:
    net = Net()
    with pytest.raises(InputError, match="plain SGD"):
        MeZO(net, probe="conservative", rule="momentum")
    named = list(net.named_parameters())
    opt = MeZO([{"params": named[:3], "lr": 0.1}, {"params": named[3:], "lr": 0.2}], probe="conservative")
    with pytest.raises(InputError, match="one learning rate"):
        opt.step(net)


def test_signs_step_by_directions_of_full_length() -> None:
    net = Net(torch.float64)
    opt = MeZO(net, lr=1e-3, coefficients="sign")
    (leaf, *_) = opt._moved()
    z = leaf.directed.law.draw(leaf.draw(0), leaf.state, leaf.parameter).view(leaf.parameter.shape).double()
    before = leaf.parameter.detach().clone()
    opt.step(net)
    assert torch.allclose((leaf.parameter.detach() - before).abs(), 1e-3 * z.abs(), rtol=1e-9)


def test_one_point_only_looks_at_first() -> None:
    net = Net()
    start = copy.deepcopy(net.state_dict())
    opt = MeZO(net, lr=0.1, probe="one-point", weight_decay=0.5, rule="adam")
    opt.step(net)
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    assert all(state["step"] == 0 for state in opt.state.values())
    opt.step(net)
    assert all(state["step"] == 1 for state in opt.state.values())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"probe": "two-side"}, "did you mean 'two-sided'"), ({"probe": "one-point", "n": 2}, "n: one-point"),
        ({"coefficients": "signs"}, "coefficients"), ({"modify": "mean"}, "modify"), ({"scales": "norm"}, "scales"),
        ({"scales": {"embed": 1.0}}, "add '' for the rest"), ({"scales": {"": 0.0}}, "scale ''"),
        ({"rescale_every": -1, "scales": "gradient-norm"}, "rescale"),
        ({"legacy": True, "rule": "adam"}, "legacy"), ({"legacy": True, "memory": "forward"}, "legacy"),
        ({"legacy": True, "storage": {"weight": "stochastic"}}, "legacy"), ({"n": 0}, "n"), ({"eps": 0.0}, "eps"),
    ],
)  # fmt: skip
def test_choices_that_make_no_sense(own: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        MeZO(Net(), **own)
    assert "\n" not in str(error.value)


def test_losses_in_sixteen_bits_are_warned_about() -> None:
    net = Net()
    opt = MeZO(net)
    with pytest.warns(UserWarning, match="return it in float32"):
        opt.step(lambda: net().bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: net().bfloat16())


def test_dropout_is_warned_about_once_and_refreshed_with_train_mode() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Dropout(0.1))
    opt = MeZO(net)
    loss = lambda: net(torch.ones(2, 4)).square().mean()  # noqa: E731
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss)
    net.train()
    with pytest.warns(UserWarning, match="1 and 1 more drop out"):
        opt.step(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss)


def test_gradients_that_lie_around_are_warned_about() -> None:
    net = Net()
    net().backward()
    opt = MeZO(net)
    before = net.head.weight.grad.clone()
    with pytest.warns(UserWarning, match="parameters have gradients"):
        opt.step(net)
    assert torch.equal(net.head.weight.grad, before)


def test_a_closure_that_calls_backward_is_told_so() -> None:
    net = Net()

    def closure() -> Tensor:
        loss = net()
        loss.backward()
        return loss

    with pytest.raises(InputError, match="must not call backward"):
        MeZO(net).step(closure)


def test_other_errors_of_a_closure_come_through() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        MeZO(net).step(lambda: net.head(torch.ones(2, 9)).sum())


# -- what a step costs -------------------------------------------------------------------------------------------------


def test_losses_of_a_round_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is waited for once a round of points, whatever n is; and nothing else in a step reads a number off a tensor."""
    calls: Counter[str] = Counter()
    read = closures.numbers_of
    monkeypatch.setattr(
        closures, "numbers_of", lambda found: (calls.update(["rounds"] if found else []), read(found))[1]
    )

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.update(["read"] if func is torch.ops.aten._local_scalar_dense.default else [])
            return func(*args, **(kwargs or {}))

    for dtype in (torch.float32, torch.bfloat16):
        net = Net(dtype)
        opt = MeZO(net, n=4, rule="adam")
        opt.step(net)
        calls.clear()
        with Reads():
            for _ in range(3):
                opt.step(net)
        assert calls == {"rounds": 3}


def test_no_direction_of_a_leafs_size_is_ever_held() -> None:
    """The update of a leaf of a million elements allocates pieces: 2^18 elements at most, a few at once."""

    class Sizes(TorchDispatchMode):
        largest, own = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.own:
                self.largest = max(self.largest, out.numel())
            return out

    for own in ({}, {"rule": "momentum", "moments": "replay"}, {"weight_decay": 0.1}):
        net = nn.Linear(1024, 1031, bias=False)
        opt = MeZO(net, **own)
        record = Record(0, (Term(0, 0.5), Term(3, -1.0)), 1.0, ((1e-3, 0.1),), leaves=("weight",))
        sizes = Sizes()
        sizes.own = net.weight.untyped_storage().data_ptr()
        with sizes:
            opt.replay(record)
        assert sizes.largest <= 1 << 18
