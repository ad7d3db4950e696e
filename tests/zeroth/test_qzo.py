"""QZO: the recorded traces, and the limits and oracles of its card."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zeroth_cases import Trace, load

import tare
from tare.core.errors import InputError
from tare.plan.measure import StepMeter
from tare.plan.models import build_model
from tare.testing.directions import RecordedDirections
from tare.zeroth.coefficients import Clip
from tare.zeroth.optimizer import SKIPPED
from tare.zeroth.probes import Point
from tare.zeroth.quantized import QuantizedLinear
from tare.zeroth.record import Record

# -- traces ------------------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """h = tanh(X w1 + b1); out = tanh(h w2 + b2) head^T, w1 and w2 quantised."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.factor, group = trace.hyper["loss_factor"], trace.hyper["group_size"] or None
        dtype = trace.tensors["R0.0"].dtype
        for number, name in enumerate(("l1", "l2")):
            codes, scales = trace.tensors[f"codes.{number}"], trace.tensors[f"scales0.{number}"]
            if group is None:  # [out, in] int8 and one scale for each output
                layer = QuantizedLinear(codes.shape[1], codes.shape[0], 8, None, dtype=dtype)
                layer.write((codes.int() + 128).to(torch.uint8))
                layer.zero.fill_(128)
                layer.scale.data.copy_(scales.unsqueeze(1))
            else:  # [in, out] uint8
                layer = QuantizedLinear(codes.shape[0], codes.shape[1], 4, group, dtype=dtype)
                layer.write(codes.T.contiguous())
                layer.zero.copy_(trace.tensors[f"zeros.{number}"].T)
                layer.scale.data.copy_(scales.T)
            layer.bias.data.copy_(trace.tensors[f"R0.{number}"])
            self.add_module(name, layer)
        self.head = nn.Linear(6, 3, bias=False, dtype=dtype)
        self.head.weight.data.copy_(trace.tensors["R0.2"])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.head(torch.tanh(self.l2(torch.tanh(self.l1(x)))))
        return self.factor * (0.5 * (out - y).square().sum(1)).mean()


def as_ours(x: Tensor) -> Tensor:
    """Scales of a trace, [groups, out] or [out], as a layer keeps them: [out, groups]."""
    return x.unsqueeze(1) if x.ndim == 1 else x.T


@pytest.mark.parametrize("memory", ["forward", "in-place-exact"])
@pytest.mark.parametrize("name", ["qzo_int4_group4_f64", "qzo_int4_group4_f32", "qzo_int8_clip_floor_f64"])
def test_trace(name: str, memory: str) -> None:
    trace, records = load(name), list[Record]()
    h, tensors = trace.hyper, trace.tensors
    model = Recorded(trace)
    codes = {key: value.clone() for key, value in model.named_buffers()}
    z = [
        {f"l{k + 1}.scale": as_ours(tensors[f"z.{k}"][t]).contiguous() for k in range(2)}
        | (
            {n: tensors[f"zr.{k}"][t] for k, n in enumerate(("l1.bias", "l2.bias", "head.weight"))}
            if "zr.0" in tensors
            else {}
        )
        for t in range(trace.steps)
    ]
    optimizer = tare.QZO(
        model, trace.lr(0), h["eps"], clip=h["clip"], floor=h["floor"], rest="*" if h["train_unquantized"] else None,
        weight_decay=h["weight_decay"], directions=RecordedDirections(dict(enumerate(z))), memory=memory, on_step=records.append,
    )  # fmt: skip
    clipped = floored = 0
    for t in range(trace.steps):
        for group in optimizer.param_groups:
            group["lr"] = trace.lr(t)
        optimizer.step(lambda t=t: model(tensors["X"][t], tensors["Y"][t]))

        def close(found: Tensor | float, key: str, wanted: Tensor, t: int = t) -> None:
            gap = (torch.as_tensor(found, dtype=torch.float64) - wanted.double()).abs().max().item()
            assert gap <= trace.meta["tolerance"][key], f"{key} off by {gap:.3g} at step {t}"

        for k in range(2):
            close(as_ours(tensors[f"scales.{k}"][t]), f"scales.{k}", getattr(model, f"l{k + 1}").scale.detach())
        for k, leaf in enumerate((model.l1.bias, model.l2.bias, model.head.weight)):
            close(
                leaf.detach(),
                f"R.{k}" if f"R.{k}" in tensors else "scales.0",
                tensors[f"R.{k}"][t] if f"R.{k}" in tensors else leaf,
            )
        close(torch.tensor(records[t].losses, dtype=torch.float64), "loss", tensors["loss"][t])
        close(records[t].deltas[0], "delta_raw", tensors["delta_raw"][t])
        close(records[t].terms[0].coefficient, "delta", tensors["delta"][t])
        clipped += abs(records[t].terms[0].coefficient) == h["clip"] != abs(records[t].deltas[0])
        floored += sum(int((layer.scale == h["floor"]).sum()) for layer in (model.l1, model.l2))
    assert all(torch.equal(codes[key], value) for key, value in model.named_buffers()), "codes and zeros are frozen"
    if name == "qzo_int8_clip_floor_f64":
        assert clipped == 14
        assert floored > 0


# -- limits ------------------------------------------------------------------------------------------------------------


def quantised(
    bits: int = 4, group: int | None = 8, dtype: torch.dtype = torch.float32, **more: object
) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 5, bias=False)).to(dtype)
    tare.quantize_linear_(model, bits, group, dtype=dtype, **more)
    return model


X = torch.linspace(-1.0, 1.0, 80).view(4, 20)


def train(
    model: nn.Module, optimizer: tare.zeroth.optimizer.ForwardOptimizer, steps: int = 5, scale: float = 1.0
) -> list[float]:
    x = X.to(next(model.parameters()).dtype)
    return [optimizer.step(lambda: scale * model(x).float().square().mean()) for _ in range(steps)]


def test_one_weight_to_a_group_and_codes_of_one_are_mezo_with_a_clip() -> None:
    """Then the scale is the weight: the same names of leaves would draw the same directions, and the same numbers come out."""
    torch.manual_seed(0)
    dense = nn.Linear(20, 12, bias=False, dtype=torch.float64)
    layer = QuantizedLinear(20, 12, 4, 1, False, dtype=torch.float64)
    layer.write(torch.ones(12, 20, dtype=torch.uint8))
    layer.scale.data.copy_(dense.weight)
    assert torch.equal(layer.dense(torch.float64), dense.weight)
    x = X.double()
    goal = torch.randn(4, 12, dtype=torch.float64)
    found = []
    for model, make in (
        (layer, lambda m: tare.QZO(m, 0.01, floor=None, clip=2.0)),
        (dense, lambda m: tare.MeZO([("scale", m.weight)], 0.01, coefficients=Clip(2.0))),
    ):
        optimizer, records = make(model), list[Record]()
        optimizer.on_step = records.append
        for _ in range(8):
            optimizer.step(lambda model=model: (model(x) - goal).square().sum(1).mean())
        found.append(
            (next(model.parameters()).detach(), [r.losses for r in records], [r.terms[0].coefficient for r in records])
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert 0 < sum(abs(kappa) == 2.0 for kappa in found[0][2]) < 8, "some were clipped"


@pytest.mark.parametrize("clip", [None, math.inf, 1e9])
def test_without_a_clip_it_is_spsa_on_scales(clip: float | None) -> None:
    model, twin = quantised(), quantised()
    optimizer = tare.QZO(model, 1e-3, clip=clip, floor=None)
    other = tare.MeZO([(n, p) for n, p in twin.named_parameters() if n.endswith("scale")], 1e-3)
    assert train(model, optimizer) == train(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("relative", [False, True])
def test_only_scales_move(relative: bool) -> None:
    model = quantised()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tare.QZO(model, 1e-2, relative=relative))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.endswith("scale")), name


def test_the_difference_of_a_linear_loss_is_the_gradient_of_scales() -> None:
    """f linear in W: (f+ - f-) / 2 eps = sum over groups of z_g <df/dW, code - zero>_g, whatever eps."""
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(21, 6, dtype=torch.float64), 4, 8, dtype=torch.float64)
    slope = torch.randn(6, 21, dtype=torch.float64)
    optimizer, records = tare.QZO(layer, 0.0, 0.5, clip=None), list[Record]()
    optimizer.on_step = records.append
    (leaf,) = optimizer._moved()
    z = leaf.directed.law.draw(leaf.draw(0), leaf.state, layer.scale).view(6, 3)
    eye = torch.eye(21, dtype=torch.float64)
    optimizer.step(lambda: ((layer(eye) - layer.bias).T * slope).sum())
    whole = (layer.read().double() - layer.zero.double()[:, torch.arange(21) // 8]) * slope
    by_group = torch.stack([part.sum(1) for part in whole.split(8, 1)], 1)
    assert records[0].deltas[0] == pytest.approx((z * by_group).sum().item(), rel=1e-10)


@pytest.mark.parametrize("clip", [0.5, 1.5, 4.0])
def test_clipping_keeps_the_direction_and_shortens(clip: float) -> None:
    """E[clip(z . g, C) z] = P(|z . g| <= C) g for Gaussian z (Stein): 10^6 draws, five standard errors; the paper says unbiased."""
    generator = torch.Generator().manual_seed(0)
    g = torch.tensor([1.0, -0.6, 0.3, 0.0, 0.8], dtype=torch.float64)
    draws = 1_000_000
    z = torch.randn(draws, 5, generator=generator, dtype=torch.float64)
    deltas = z @ g
    clipped = torch.tensor(Clip(clip)(deltas.tolist()), dtype=torch.float64)
    estimate = clipped.unsqueeze(1) * z
    share = math.erf(clip / (g.norm().item() * math.sqrt(2)))
    error = 5 * estimate.std(0) / math.sqrt(draws)
    assert bool(((estimate.mean(0) - share * g).abs() < error).all())
    assert nn.functional.cosine_similarity(estimate.mean(0), g, dim=0) > 0.999


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_derivative_that_is_none_is_skipped_and_counted(bad: float) -> None:
    """Not clipped to -C, as Python's max and min make of NaN."""
    model = quantised()
    optimizer = tare.QZO(model, 1e-3)
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    values = iter([1.0, bad])
    assert math.isnan(optimizer.step(lambda: next(values)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [group[SKIPPED] for group in optimizer.param_groups] == [1]
    assert math.isnan(Clip(100.0)([math.nan])[0])
    train(model, optimizer, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [group[SKIPPED] for group in optimizer.param_groups] == [0]


def test_the_floor_holds_for_updates_and_not_for_points() -> None:
    model = quantised()
    for p in model.parameters():
        p.data.clamp_(max=2e-4)
    optimizer = tare.QZO(model, 10.0, 1e-3, floor=1e-4, clip=1e-3)
    lowest = []

    def loss() -> Tensor:
        lowest.append(min(float(m.scale.min()) for m in model if isinstance(m, QuantizedLinear)))
        return model(X).square().mean() * 1e3

    optimizer.step(loss)
    assert min(lowest) < 0.0
    scales = torch.cat([m.scale.detach().view(-1) for m in model if isinstance(m, QuantizedLinear)])
    assert scales.min() == torch.tensor(1e-4)
    assert 0.1 < (scales == scales.min()).float().mean() < 0.9


def test_decay_is_for_the_rest_and_passes_biases_by() -> None:
    model = quantised(targets="0.weight")
    model.append(nn.LayerNorm(5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tare.QZO(model, 0.1, rest="*", weight_decay=0.5)
    for _ in range(2):
        optimizer.step(lambda: 1.0)  # nothing but decay
    for name, p in model.named_parameters():
        shrunk = before[name] * 0.95**2 if name in ("2.weight", "3.weight") else before[name]
        torch.testing.assert_close(p.detach(), shrunk)


def test_rest_names_what_is_trained_jointly() -> None:
    model = quantised(targets="0.weight")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tare.QZO(model, 1e-2, rest="*.bias"))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {"0.scale", "0.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_scales_add_up(dtype: torch.dtype) -> None:
    """200 steps of a tenth of the gap between two numbers, all in one direction: on average 20 gaps, none lost."""
    model = quantised(dtype=dtype)
    for p in model.parameters():
        p.data.fill_(0.013)
    gap = torch.finfo(dtype).eps * 2.0**-7
    ones = {
        name: torch.ones_like(p, dtype=torch.float32) for name, p in model.named_parameters() if name.endswith("scale")
    }
    optimizer = tare.QZO(model, gap, floor=None, directions=RecordedDirections(dict.fromkeys(range(200), ones)))
    before = {name: model.get_parameter(name).detach().double() for name in ones}
    for _ in range(200):
        values = iter([0.5, 0.5 - 2e-4])  # delta 0.1
        optimizer.step(lambda values=values: next(values))
    moved = torch.cat([(before[name] - model.get_parameter(name).detach().double()).view(-1) for name in ones]) / gap
    spread = math.sqrt(200 * 0.1 * 0.9)  # of a sum of 200 numbers that are 1 with probability 0.1
    assert moved.mean().item() == pytest.approx(20.0, abs=5 * spread / math.sqrt(moved.numel()))
    assert moved.std().item() == pytest.approx(spread, rel=0.4)


def test_relative_steps_are_shares_of_the_scale() -> None:
    model = quantised(dtype=torch.float64)
    optimizer = tare.QZO(model, 0.01, 0.1, relative=True, clip=None, floor=None)
    (leaf, _) = optimizer._moved()
    scale, z = (
        leaf.parameter.detach().clone(),
        tare.zeroth.directions.Gaussian().draw(leaf.draw(0), leaf.state, leaf.parameter.detach()),
    )
    torch.testing.assert_close(
        leaf.perturbed(Point(((0, 0.1),))), scale * (1 + 0.1 * z.view(scale.shape)), rtol=1e-14, atol=0
    )
    values = iter([1.0, 0.4])  # delta = 3
    optimizer.step(lambda: next(values))
    torch.testing.assert_close(
        leaf.parameter.detach(), scale * (1 - 0.01 * 3 * z.view(scale.shape)), rtol=1e-13, atol=0
    )
    assert "relative" in optimizer.explain()


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("bits", "group", "lr"), [(4, 8, 1e-3), (8, None, 3e-6), (4, 7, 1e-3)])
def test_it_learns(bits: int, group: int | None, lr: float, relative: bool) -> None:
    """What another model with the same codes and other scales computes."""
    model, twin = quantised(bits, group), quantised(bits, group)
    torch.manual_seed(5)
    for layer in twin:
        if isinstance(layer, QuantizedLinear):
            layer.scale.data.mul_(1.0 + 0.3 * torch.randn(layer.scale.shape))
    x = torch.randn(64, 20)
    goal = twin(x).detach()
    lr, eps = (1.0, 1e-3) if relative else (lr, 1e-4)
    optimizer = tare.QZO(model, lr, eps, n=4, relative=relative)
    losses = [optimizer.step(lambda: (model(x) - goal).square().mean()) for _ in range(200)]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def peaks(model: nn.Module, prepare: Callable[[nn.Module], object]) -> tuple[int, int]:
    prepare(model)
    tokens = torch.arange(512).view(4, 128)

    def run() -> Tensor:
        found = model(input_ids=tokens, labels=tokens).loss
        return found.float()

    with torch.no_grad(), StepMeter(model, extra=[tokens]) as inference:
        run()
    optimizer = tare.QZO(model)
    optimizer.step(run)
    with StepMeter(model, optimizer, extra=[tokens]) as step:
        optimizer.step(run)
    return inference.peak, step.peak


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("how", [tare.quantize_linear_, tare.quantize_weights_])
def test_training_needs_what_inference_needs(how: Callable[[nn.Module], object], dtype: str) -> None:
    """Beside it, one layer's scales at a time."""
    model = build_model("llama-9m", dtype=dtype).eval()
    inference, step = peaks(model, how)
    assert step <= 1.01 * inference


def test_wrong_models() -> None:
    with pytest.raises(
        InputError, match="params: qzo finds the scales in the model; give the model itself, not generator"
    ):
        tare.QZO(quantised().parameters(), 1e-3)
    with pytest.raises(
        InputError, match=r"the model has none; call tare.quantize_linear_\(model\) first, or use 'mezo'"
    ):
        tare.QZO(nn.Linear(3, 3), 1e-3)
    with pytest.raises(InputError, match="Invalid clip"):
        tare.QZO(quantised(), clip=-1.0)
    with pytest.raises(InputError, match="Invalid floor"):
        tare.QZO(quantised(), floor=-1e-7)
