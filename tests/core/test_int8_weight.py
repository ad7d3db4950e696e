"""Int8 weights: what a model, autograd and files see; that no group is destroyed; that steps are unbiased; the authors' traces."""

import copy
import io
import pickle

import pytest
import torch
from golden_cases import load, recorded
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import tare
from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.core.kept import Int8
from tare.core.storage import Storage
from tare.core.weights import (
    dense_state_dict,
    dequantize_weights_,
    is_quantized,
    plain_parts,
    quantize_weights_,
    weight_bytes,
)
from tare.kernels import groupwise, native_groupwise
from tare.testing.subject import Net, train


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized_linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """A layer with int8 weights, and the dense one with the same numbers."""
    layer = nn.Linear(40, 24)
    with torch.no_grad():
        layer.weight.copy_(normal(24, 40))
    layer.to(dtype)
    quantize_weights_(layer, group=64)
    dense = copy.deepcopy(layer)
    dequantize_weights_(dense)
    return layer, dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_and_differentiates_as_the_dense_one(dtype):
    layer, dense = quantized_linear(dtype)
    x, y = (normal(3, 7, 40, seed=1).to(dtype).requires_grad_() for _ in range(2))
    for one, at in ((layer, x), (dense, y)):
        one(at).square().sum().backward()
    assert layer.weight.shape == (24, 40)
    assert layer.weight.dtype == dtype
    assert isinstance(layer.weight, nn.Parameter)
    for got, wanted in ((x, y), (layer.weight, dense.weight), (layer.bias, dense.bias)):
        assert type(got.grad) is torch.Tensor
        assert torch.equal(got.grad, wanted.grad)


def test_nothing_dense_is_kept_between_forward_and_backward():
    layer, _ = quantized_linear()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(normal(3, 40).requires_grad_())
    dense = [t for t in kept if type(t) is torch.Tensor and t.numel() >= layer.weight.numel()]
    assert not dense


def test_autocast_checkpointing_clipping_and_accumulation():
    layer, dense = quantized_linear()
    x = normal(5, 40, seed=2)
    for one in (layer, dense):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = torch.utils.checkpoint.checkpoint(one, x, use_reentrant=False)
            assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        one(x).sum().backward()  # on top
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
    assert layer.weight.grad.dtype == torch.float32
    # bf16 sums in forward and backward, in the order that the library chooses
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad, rtol=1e-2, atol=1e-3)


def test_an_embedding_decodes_only_its_rows():
    table, dense = nn.Embedding(13, 5, padding_idx=2), nn.Embedding(13, 5, padding_idx=2)
    quantize_weights_(table, targets=("embedding",), group=7)
    with torch.no_grad():
        dense.weight.copy_(table.weight.dense())
    index = torch.tensor([[0, 2, 5], [12, 5, 1]])
    for one in (table, dense):
        one(index).square().sum().backward()
    assert torch.equal(table(index), dense(index))
    torch.testing.assert_close(table.weight.grad, dense.weight.grad)
    with pytest.raises(InputError, match="max_norm"):
        F.embedding(index, table.weight, max_norm=1.0)


def test_any_other_operator_works_on_decoded_numbers():
    layer, dense = quantized_linear()
    w, d = layer.weight, dense.weight
    assert torch.equal(w.t(), d.t())
    assert torch.equal((w * 2).sum(0), (d * 2).sum(0))
    assert torch.equal(
        torch.addmm(torch.zeros(3, 40), normal(3, 24), w), torch.addmm(torch.zeros(3, 40), normal(3, 24), d)
    )
    (w.square().sum() + (normal(3, 40) @ w.t()).sum()).backward()
    (d.square().sum() + (normal(3, 40) @ d.t()).sum()).backward()
    torch.testing.assert_close(w.grad, d.grad)
    assert type(torch.zeros_like(w)) is torch.Tensor
    with torch.no_grad():
        w.mul_(2.0)
        torch.testing.assert_close(w.dense(), 2 * d.detach())
        w.copy_(d)
        torch.testing.assert_close(w.dense(), d.detach())
        nn.init.zeros_(w)
        assert not w.dense().any()


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["symmetric", "affine", "clamped"])
@pytest.mark.parametrize("shape", [(16, 32), (7, 9), (1, 3), (300,), (1,)])
def test_rounding_to_nearest_is_within_half_a_step(zero, shape):
    x = normal(*shape, seed=3)
    w = Int8Weight.encode(x, 64, zero)
    step = w.scale.repeat_interleave(64)[: x.numel()].view(shape)
    assert bool(((w.dense() - x).abs() <= step * 0.5001).all()) or zero == "clamped"
    assert w.scale.numel() == -(-x.numel() // 64)  # the last group is short


@pytest.mark.parametrize("value", [0.5, -0.5, 1e-3, 100.0])
def test_a_group_of_one_value_is_not_destroyed(value):
    x = torch.full((4, 64), value)
    for zero in ("symmetric", "affine"):
        torch.testing.assert_close(Int8Weight.encode(x, 64, zero).dense(), x, rtol=1e-5, atol=0)
    if abs(value) == 0.5:  # the published form is, and reproduces it
        assert Int8Weight.encode(x, 64, "clamped").dense().abs().max() < 0.02


def test_groups_of_one_sign_survive_steps():
    layer = nn.Linear(64, 4, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    quantize_weights_(layer)
    optimizer = tare.create("adamw", layer, lr=1e-3, storage={"weight": "int8"}, weight_decay=0.0)
    for _ in range(5):
        layer.weight.grad = torch.ones(4, 64)
        optimizer.step()
    torch.testing.assert_close(layer.weight.dense(), torch.full((4, 64), 0.495), rtol=0, atol=1e-4)


@pytest.mark.parametrize("zero", ["symmetric", "affine"])
def test_a_step_is_unbiased(zero):
    """E[W after] = W - alpha U over 10 000 keys, at four standard deviations; and only the two neighbours occur."""
    x = normal(64, seed=4)
    update, alpha, draws = normal(64, seed=5), 3e-4, 10_000
    start = Int8Weight.encode(x, 64, zero)
    exact = start.dense() - alpha * update
    total, values = torch.zeros(64, dtype=torch.float64), [set() for _ in range(64)]
    for key in range(draws):
        w = copy.deepcopy(start)
        Int8(w, key).write(0, update, 1.0, alpha)
        total += w.dense().double()
        if key < 200:
            for kept, code in zip(values, w.codes.tolist(), strict=True):
                kept.add(code)
    step = float(w.scale)  # of the last draw: the same in all of them
    share = (exact / step).frac().abs()
    sigma = step * (share * (1 - share) / draws).sqrt()
    gap = (total / draws - exact.double()).abs()
    assert bool((gap <= 4 * sigma + 1e-6).all()), float((gap / sigma).max())
    assert all(len(kept) <= 2 for kept in values)


def test_small_steps_add_up_where_rounding_to_nearest_stalls():
    """Steps of a hundredth of a code: at random they arrive on average, to nearest never."""
    means = {}
    for key in (1, None):
        w = Int8Weight.encode(normal(4096, seed=6).clamp(-1, 1), 256)
        start = w.dense()
        update = torch.ones(4096)
        for step in range(50):
            Int8(w, None if key is None else 1000 + step).write(0, update, 1.0, 1e-4)
        means[key] = float((w.dense() - start).mean())
    assert abs(means[1] + 5e-3) < 5e-4
    assert abs(means[None]) < 1e-3


def test_a_piecewise_step_equals_the_whole_one():
    """Noise goes by element number, so cutting the work (at whole groups) changes nothing."""
    x, update = normal(1000, seed=7), normal(1000, seed=8)
    whole, pieces = Int8Weight.encode(x, 64), Int8Weight.encode(x, 64)
    Int8(whole, 9).write(0, update, 0.99, 1e-2)
    for start in range(0, 1000, 192):
        Int8(pieces, 9).write(start, update[start : start + 192], 0.99, 1e-2)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scale, pieces.scale)


def test_large_weights_are_stepped_in_chunks_of_whole_groups():
    """Element-wise and low-rank rules, 5 461 columns, more elements than a chunk."""
    for key, options in (("adamw", {}), ("galore", {"rank": 4, "period": 10})):
        layer = nn.Linear(5461, 130, bias=False)
        with torch.no_grad():
            layer.weight.copy_(normal(130, 5461, seed=9) * 0.02)
        dense = copy.deepcopy(layer)
        quantize_weights_(layer)
        one = tare.create(key, layer, lr=1e-2, storage={"weight": "int8"}, weight_decay=0.0, **options)
        two = tare.create(key, dense, lr=1e-2, weight_decay=0.0, **options)
        dense.weight.data.copy_(layer.weight.dense())
        layer.weight.grad = normal(130, 5461, seed=10)
        dense.weight.grad = layer.weight.grad.clone()
        one.step()
        two.step()
        gap = layer.weight.dense() - dense.weight.detach()
        assert gap.abs().max() <= layer.weight.scale.max() * 1.001
        assert gap.mean().abs() < 1e-5


def test_not_a_number_shows():
    x = normal(256, seed=1)
    w = Int8Weight.encode(x, 64)
    update = torch.zeros(256)
    update[70] = torch.nan
    Int8(w, 1).write(0, update, 1.0, 1.0)
    assert w.dense()[64:128].isnan().all()
    assert w.dense()[:64].isfinite().all()


# -- models and files ----------------------------------------------------------------------------------------------


def test_targets_are_roles_or_names_and_tied_weights_stay_tied():
    net = Net(tied=True)
    assert quantize_weights_(net) == ["up.weight", "down.weight", "square.weight"]
    assert quantize_weights_(net, targets=("embed*",)) == ["embed.weight"]
    assert net.head.weight is net.embed.weight
    assert isinstance(net.head.weight, Int8Weight)
    dense = dense_state_dict(net)
    assert dense["head.weight"] is dense["embed.weight"]
    assert dequantize_weights_(net) == ["embed.weight", "up.weight", "down.weight", "square.weight"]
    assert net.head.weight is net.embed.weight
    assert not is_quantized(net)


def test_bytes_are_one_and_a_64th():
    layer = nn.Linear(512, 256, bias=False)
    quantize_weights_(layer)
    assert weight_bytes(layer) == 512 * 256 * (1 + 4 / 256)
    other = nn.Linear(512, 256, bias=False)
    quantize_weights_(other, zero="affine")
    assert weight_bytes(other) == 512 * 256 * (1 + 8 / 256)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("targets", {"targets": ("no.such.*",)}),
        ("group", {"group": 0}),
        ("zero", {"zero": "middle"}),
    ],
)
def test_what_makes_no_sense_is_refused(words, wrong):
    with pytest.raises(InputError, match=words):
        quantize_weights_(nn.Linear(4, 4), **wrong)
    with pytest.raises(InputError, match="float32 or bfloat16"):
        quantize_weights_(nn.Linear(4, 4).half())


def test_saving_in_every_form(tmp_path):
    layer, dense = quantized_linear()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = nn.Linear(40, 24)
    quantize_weights_(fresh, group=64)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.weight.codes, layer.weight.codes)
    plain = nn.Linear(40, 24)
    plain.load_state_dict(state)
    assert torch.equal(plain.weight, dense.weight)
    fresh.load_state_dict(dense.state_dict())  # encoded again: the same codes
    assert torch.equal(fresh.weight.codes, layer.weight.codes)
    file = tmp_path / "w.safetensors"
    parts = {k: t for name, p in layer.named_parameters() for k, t in plain_parts(name, p.detach()).items()}
    save_file(parts, file)
    assert sorted(load_file(file)) == ["bias", "weight.codes", "weight.scale"]
    twin = pickle.loads(pickle.dumps(layer))
    assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(twin.weight.codes, layer.weight.codes)
    twin.weight.codes.zero_()
    assert layer.weight.codes.any()


def test_moving_and_casting():
    layer, _ = quantized_linear()
    codes = layer.weight.codes.clone()
    parameter = layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight is parameter
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.codes, codes)
    layer.float().to("cpu")
    assert layer.weight.dtype == torch.float32
    with pytest.raises(InputError, match="fp64"):
        tare.create("adamw", layer.double(), lr=1e-3)
    assert layer.to("meta").weight.codes.is_meta


def test_a_model_trains_next_to_its_dense_twin():
    """Same gradients to rounding at first; after 20 steps the losses agree to the noise of 8 bits."""
    losses = []
    for int8 in (True, False):
        net = Net()
        if int8:
            quantize_weights_(net)
        storage = Storage(weight="int8") if int8 else Storage()
        losses.append(train(tare.create("adamw", net, 5e-3, storage=storage), net, 20))
    assert abs(losses[0] - losses[1]) < 0.05 * losses[1]


# -- the authors' traces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qgalore_int8_weight_sr", "qgalore_int8_weight_onesigned"])
def test_the_published_quantiser(name):
    case = load(name)
    w = Int8Weight.encode(case.tensors["x"], case.hyper["group_size"], "clamped")
    assert torch.equal(w.codes, case.tensors["codes_nearest"])
    w.write(0, case.tensors["x"].reshape(-1), uniform=case.tensors["u"])
    assert torch.equal(w.codes, case.tensors["codes"])
    assert (w.dense() - case.tensors["y"]).abs().max() <= case.tolerance


@pytest.mark.parametrize("name", ["qgalore_full_int8_wide", "qgalore_full_int8_square_adam32"])
def test_the_published_step_with_int8_weights(name, monkeypatch):
    """Every code of every step, from the recorded bases and uniform numbers, through the optimizer's own write."""
    case = load(name)
    h = case.hyper
    layer = nn.Linear(*reversed(case.tensors["W0"].shape), bias=False)
    with torch.no_grad():
        layer.weight.copy_(case.tensors["W0"])
    quantize_weights_(layer, group=h["weight_group_size"], zero="clamped")
    assert torch.equal(layer.weight.codes, case.tensors["codes0"])
    storage = Storage("int8", "int4", "int8", min_quantized=h["min_8bit_size"], group=h["quant_group_size"])
    optimizer = tare.create(
        "galore-8bit", layer, lr=1.0, rank=h["rank"], scale=h["scale"], betas=tuple(h["betas"]), eps=h["eps"],
        weight_decay=h["weight_decay"], basis=recorded(case), storage=storage,
    )  # fmt: skip
    monkeypatch.setattr(native_groupwise, "step_", lambda *tensors, **how: False)  # it draws its own uniform numbers
    for t in range(case.meta["steps"]):
        u = case.tensors["u"][t].reshape(-1)
        monkeypatch.setattr(groupwise, "_uniform", lambda key, start, n, device, u=u: u[start : start + n])
        layer.weight.grad = case.tensors["G"][t].clone()
        optimizer.param_groups[0]["lr"] = float(case.tensors["lr"][t])
        optimizer.step()
        assert torch.equal(layer.weight.codes, case.tensors["codes"][t]), f"step {t}"
        assert (layer.weight.dense() - case.tensors["W"][t]).abs().max() <= case.tolerance
