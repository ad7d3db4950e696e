"""Quantised layers that QZO trains: our own, int8 weights, torchao's, those of other packages; and GPTQ checkpoints."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import tare
from tare.core.errors import InputError
from tare.methods.replay import replay
from tare.plan.models import build_model, config_for
from tare.zeroth.gptq import place_gptq_
from tare.zeroth.log import SeedLog
from tare.zeroth.memory import InForward
from tare.zeroth.probes import Point
from tare.zeroth.quantized import QuantizedLinear, quantized_bytes
from tare.zeroth.scales import find_scales

X = torch.linspace(-1.0, 1.0, 80).view(4, 20)

# -- our own layer -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 20), st.sampled_from([4, 8]), st.one_of(st.none(), st.integers(1, 45)), st.booleans(),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_a_layer_is_rounded_to_the_nearest_codes(
    n: int, m: int, bits: int, group: int | None, symmetric: bool, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(n, m, biased)
    layer = QuantizedLinear.from_linear(linear, bits, group, symmetric)
    dense = layer.dense(torch.float32).detach()
    width = min(group or n, n)
    steps = layer.scale.detach()[:, torch.arange(n) // width]
    assert layer.scale.shape == (m, -(-n // width))
    # half a step; a whole one at the ends, where the zero was rounded to a code
    assert bool(((dense - linear.weight).abs() <= (0.5 if symmetric else 1.0) * steps + 1e-6).all())
    whole = (layer.read().float() - layer.zero.float()[:, torch.arange(n) // width]) * steps
    assert torch.equal(dense, whole)
    x = torch.randn(3, n)
    assert torch.equal(layer(x), F.linear(x, dense, linear.bias))
    kept = sum(t.numel() * t.element_size() for t in (layer.codes, layer.zero, layer.scale))
    assert kept == quantized_bytes(n, m, bits, group)
    assert torch.equal(layer.to_linear().weight, dense)


@pytest.mark.parametrize("bits", [4, 8])
def test_pieces_of_rows_and_gradients_give_the_same_weight(bits: int) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(700, 800), bits, 128)  # more than one piece
    with torch.no_grad():
        pieces = layer.dense(torch.float32)
    whole = layer.dense(torch.float32)
    assert torch.equal(pieces, whole)
    slope = torch.randn(800, 700)
    (whole * slope).sum().backward()
    by_hand = (layer.read().float() - layer.zero.float().repeat_interleave(128, 1)[:, :700]) * slope
    torch.testing.assert_close(
        layer.scale.grad, torch.stack([p.sum(1) for p in by_hand.split(128, 1)], 1), rtol=1e-4, atol=1e-3
    )


def test_codes_survive_casting_and_saving() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(21, 6), 4, 8)
    codes = layer.read().clone()
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.bfloat16
    assert torch.equal(layer.read(), codes)
    assert layer(X.new_ones(2, 21).bfloat16()).dtype == torch.bfloat16
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = QuantizedLinear(21, 6, 4, 8, dtype=torch.bfloat16)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(twin(torch.ones(1, 21).bfloat16()), layer(torch.ones(1, 21).bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert QuantizedLinear(21, 6)(torch.ones(1, 21)).dtype == torch.bfloat16


def test_what_cannot_be_quantised_is_said() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for call, words in (
        (lambda: QuantizedLinear(8, 8, 3), "bits must be 4 or 8, got 3"),
        (lambda: QuantizedLinear(8, 8, 4, 0), "group must be a whole number of at least 1, or None, got 0"),
        (lambda: tare.quantize_linear_(tied), r"0\.weight is tied to 1\.weight"),
        (lambda: tare.quantize_linear_(nn.Sequential(nn.Embedding(3, 3))), "matches no linear layer of Sequential"),
        (lambda: tare.quantize_linear_(nn.Sequential(nn.Embedding(3, 3)), targets="embedding"), "belongs to a Embedding, not"),
        (lambda: tare.quantize_linear_(nn.Linear(3, 3)), "the model is itself a layer"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            call()
    assert isinstance(tied[0], nn.Linear)


def test_every_name_of_a_shared_layer_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    assert tare.quantize_linear_(model) == ["0"]
    assert model[2] is model[0]
    assert isinstance(model[2], QuantizedLinear)


# -- int8 weights, and tensors made of others in general ---------------------------------------------------------------


def int8_net() -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 5))
    tare.quantize_weights_(model, group=16)
    return model


def loss_on(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def test_scales_of_int8_weights_are_trained_where_they_lie() -> None:
    model = int8_net()
    codes, scale = model[0].weight.codes.clone(), model[0].weight.scale.clone()
    optimizer = tare.QZO(model, 1e-6)
    assert [leaf.name for leaf in optimizer.leaves] == ["0.weight.scale", "2.weight.scale"]
    leaves = optimizer._moved()
    twin = int8_net()
    point = Point(((0, 1e-3),))
    for layer, leaf in zip((twin[0], twin[2]), leaves, strict=True):
        layer.weight.scale.copy_(leaf.perturbed(point))
    with torch.no_grad():
        assert torch.equal(optimizer.memory.evaluate(leaves, point, lambda: loss_on(model)), loss_on(twin))
    assert isinstance(optimizer.memory, InForward)
    assert not optimizer.memory.elsewhere
    assert torch.equal(model[0].weight.scale, scale)
    for _ in range(3):
        optimizer.step(lambda: loss_on(model))
    assert not torch.equal(model[0].weight.scale, scale)
    assert torch.equal(model[0].weight.codes, codes)


def test_copies_of_model_and_optimizer_belong_together() -> None:
    model = int8_net()
    optimizer = tare.QZO(model, 1e-6, rest="*.bias")
    optimizer.step(lambda: loss_on(model))
    twin, other = copy.deepcopy((model, optimizer))
    found = [[o.step(lambda m=m: loss_on(m)) for _ in range(4)] for m, o in ((model, optimizer), (twin, other))]
    assert found[0] == found[1]
    assert torch.equal(model[0].weight.scale, twin[0].weight.scale)
    assert model[0].weight.scale.data_ptr() != twin[0].weight.scale.data_ptr()


def test_a_model_that_was_cast_or_rebuilt_is_noticed() -> None:
    model = int8_net()
    optimizer = tare.QZO(model, 1e-6)
    tare.dequantize_weights_(model)
    tare.quantize_weights_(model)
    with pytest.raises(InputError, match=r"0\.weight\.scale: the model no longer computes with the scales"):
        optimizer.step(lambda: loss_on(model))


def test_a_log_of_int8_scales_replays(tmp_path: Path) -> None:
    model, base = int8_net(), int8_net()
    with SeedLog(tmp_path / "run.seeds") as log:
        optimizer = tare.QZO(model, 1e-6, on_step=log)
        for _ in range(5):
            optimizer.step(lambda: loss_on(model))
    assert replay(tmp_path / "run.seeds", base).exact
    assert torch.equal(base[0].weight.scale, model[0].weight.scale)


# -- layers of other packages ------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """As GPTQ's kernels have it: packed words, zeros and scales are buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.register_buffer("qweight", torch.randint(0, 16, (20, 6), dtype=torch.int32))
        self.register_buffer("scales", (torch.rand(5, 6) * 0.02).half())

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.qweight - 8) * self.scales.float().repeat_interleave(4, 0))


def test_buffers_called_scales_beside_packed_weights_are_trained() -> None:
    model = nn.Sequential(Foreign(), nn.LayerNorm(6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = tare.QZO(model, 1e-3, 1e-2)
    assert [leaf.name for leaf in optimizer.leaves] == ["0.scales"]
    assert optimizer.storage.weight in ("stochastic", "master")
    for _ in range(5):
        optimizer.step(lambda: (model(X) - 1.0).square().mean() + model[0](X).square().sum())
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"0.scales"}
    assert not optimizer.memory.elsewhere


class Linear4bit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


class WQLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(8, 1, dtype=torch.int32))


class Attention(nn.Module):
    """Whole numbers that are no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(1, 1, 4, 4, dtype=torch.uint8))
        self.register_buffer("positions", torch.arange(4))


@pytest.mark.filterwarnings("ignore")
def test_unknown_kinds_are_named_in_a_line() -> None:
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)
    for model, words in (
        (
            nn.Sequential(Foreign(), Linear4bit()),
            r"1 \(Linear4bit\): a quantised layer of a kind whose scales are not known",
        ),
        (nn.Sequential(WQLinear()), r"0 \(WQLinear\): a quantised layer"),
        (nn.Sequential(Foreign(), dynamic), r"1\.0 \(Linear\): a quantised layer"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            tare.QZO(model)
        assert "\n" not in str(caught.value)
        assert "known are QuantizedLinear" in str(caught.value)
    assert [s.name for s in find_scales(nn.Sequential(Attention(), Foreign(), nn.BatchNorm1d(3)))] == ["1.scales"]


# -- torchao -----------------------------------------------------------------------------------------------------------


def torchao_net(kind: str) -> nn.Sequential:
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
        "float8": quantization.Float8WeightOnlyConfig(),
        "int8 activations": quantization.Int8DynamicActivationInt8WeightConfig(),
    }[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32)).to(torch.bfloat16)
    quantization.quantize_(model, config)
    return model


@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "int8 activations"])
def test_torchao_tensors_train_by_their_scales(kind: str) -> None:
    model, twin = torchao_net(kind), torchao_net(kind)
    x = torch.randn(8, 64).bfloat16()
    optimizer = tare.QZO(model, 1e-5, rest="*.bias")
    names = [leaf.name for leaf in optimizer.leaves]
    assert names[:2] == ["0.weight.scale", "2.weight.scale"]
    leaves = optimizer._moved()
    point = Point(((0, 1e-3),))
    own = dict(twin.named_parameters())
    for leaf in leaves:
        target = own[leaf.name.removesuffix(".scale")]
        (target.scale if leaf.name.endswith("scale") else target.data).copy_(leaf.perturbed(point))
    with torch.no_grad():
        found = optimizer.memory.evaluate(leaves, point, lambda: model(x).float().sum())
        assert torch.equal(found, twin(x).float().sum())
    assert not optimizer.memory.elsewhere
    codes, scale = model[0].weight.qdata.clone(), model[0].weight.scale.clone()
    for _ in range(4):
        optimizer.step(lambda: model(x).float().square().mean())
    assert torch.equal(codes.view(torch.int8), model[0].weight.qdata.view(torch.int8))
    assert not torch.equal(scale, model[0].weight.scale)


# -- GPTQ checkpoints --------------------------------------------------------------------------------------------------


def packed(codes: Tensor, bits: int) -> Tensor:
    """[k, c] codes -> [k bits / 32, c] int32, written down from the format, a code at a time."""
    per = 32 // bits
    words = torch.zeros(codes.shape[0] // per, codes.shape[1], dtype=torch.int64)
    for row in range(codes.shape[0]):
        words[row // per] |= codes[row].to(torch.int64) << (bits * (row % per))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_layer(
    n: int, m: int, bits: int, group: int, ordered: bool, v2: bool, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and the dense weight [m, n] that they mean."""
    generator = torch.Generator().manual_seed(seed)
    groups = n // group
    codes = torch.randint(0, 2**bits, (n, m), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, m), generator=generator)
    scales = (torch.rand(groups, m, generator=generator) * 0.01 + 1e-3).half()
    g_idx = torch.arange(n) // group
    if ordered:
        g_idx = g_idx[torch.randperm(n, generator=generator)]
    dense = scales.float()[g_idx] * (codes - zeros[g_idx]).float()
    kept = zeros if v2 else zeros - 1
    tensors = {
        "qweight": packed(codes, bits), "qzeros": packed(kept.T.contiguous(), bits).T.contiguous(), "scales": scales, "g_idx": g_idx.int()
    }  # fmt: skip
    return tensors, dense.T.contiguous()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_a_gptq_layer_means_what_its_format_says(bits: int, ordered: bool, v2: bool) -> None:
    tensors, dense = gptq_layer(64, 96, bits, 16, ordered, v2, 3)
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    named = {f"0.{key}": value for key, value in tensors.items()}
    assert place_gptq_(model, named, named.__getitem__, legacy_zeros=not v2) == ["0"]
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), F.linear(x, dense))
    assert torch.equal(model[0].to_linear().weight, dense)
    assert model[0].scale.dtype == torch.float32


def saved_llama(folder: Path, **settings: object) -> nn.Module:
    """A folder as GPTQ writes it, and the dense model that it means."""
    config = config_for("llama-tiny")
    model = build_model(config, seed=1)
    dense = model.state_dict()
    tensors = {}
    for number, (name, value) in enumerate(dense.items()):
        if name.endswith("_proj.weight"):
            layer, weight = gptq_layer(value.shape[1], value.shape[0], 4, 8, number % 2 == 0, False, number)
            tensors |= {f"{name.removesuffix('weight')}{key}": part for key, part in layer.items()}
            value.copy_(weight)
        else:
            tensors[name] = value.clone()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    told = {"bits": 4, "group_size": 8, "desc_act": True, "quant_method": "gptq", **settings}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": told}))
    return model


def test_a_gptq_folder_is_read_and_trained(tmp_path: Path) -> None:
    dense = saved_llama(tmp_path).eval()
    model = build_model("llama-tiny", seed=7).eval()
    layers = tare.load_gptq_(model, tmp_path)
    assert len(layers) == 4 * 7
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    optimizer = tare.QZO(model, 1e-6)
    assert len(optimizer.leaves) == 28
    before = model.model.layers[0].mlp.up_proj.scale.detach().clone()
    optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.scale)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def refused(words: str, change: object = None, **settings: object) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        saved_llama(folder, **settings)
        model = build_model("llama-tiny")
        if callable(change):
            model = change(model) or model
        with pytest.raises(InputError, match=words) as caught:
            tare.load_gptq_(model, folder)
        assert "\n" not in str(caught.value)

    refused("quantised by 'awq'; only GPTQ checkpoints are read", quant_method="awq")
    refused(
        r"model.layers.0.mlp.up_proj is quantised, but the model has Identity",
        lambda m: _put(m, "model.layers.0.mlp.up_proj", nn.Identity()),
    )
    refused(r"up_proj.qweight is \(16, 344\) torch.int32; GPTQ's layout of an 7 x 128 layer",
            lambda m: _put(m, "model.layers.0.mlp.up_proj", nn.Linear(128, 7, bias=False)))  # fmt: skip
    refused("lacks extra.weight and 1 more of the model", lambda m: m.add_module("extra", nn.Linear(3, 3)))
    refused("belongs to nothing in the model", lambda m: _put(m, "model.norm", nn.Identity()))
    with pytest.raises(InputError, match=r"no \*.safetensors files"):
        tare.load_gptq_(nn.Linear(3, 3), tmp_path)
    with pytest.raises(InputError, match="this is not a GPTQ checkpoint"):
        place_gptq_(nn.Linear(3, 3), ["weight"], lambda name: torch.zeros(3, 3))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
