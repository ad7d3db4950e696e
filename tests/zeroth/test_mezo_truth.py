"""MeZO against what is known: quadratics, exact derivatives, moments of the estimator, and the published procedure on a language model."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy, linear

from tare import InputError, MeZO
from tare.core.random import make_key, normal
from tare.zeroth.record import Record


class Quadratic(nn.Module):
    """f = 1/2 tr(W^T A W) + tr(C^T W) over an uneven matrix and a vector, in float64."""

    def __init__(self, curved: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(1, (5, 3)).double())
        self.v = nn.Parameter(normal(2, (4,)).double())
        a, b = normal(3, (5, 5)).double(), normal(4, (4, 4)).double()
        self.a, self.b = (a @ a.T, b @ b.T) if curved else (a * 0, b * 0)
        self.c, self.d = normal(5, (5, 3)).double(), normal(6, (4,)).double()

    def forward(self) -> Tensor:
        curved = (self.w * (self.a @ self.w)).sum() / 2 + self.v @ self.b @ self.v / 2
        return curved + (self.c * self.w).sum() + self.d @ self.v

    def gradient(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"w": self.a @ self.w + self.c, "v": self.b @ self.v + self.d}


def directions(opt: MeZO, member: int = 0) -> dict[str, Tensor]:
    """z of every leaf at the coming step."""
    found = {}
    for leaf in opt._moved():
        draw = leaf.draw(member)
        z = leaf.directed.law.draw(draw, leaf.state, leaf.parameter)
        found[draw.leaf.name] = z.view(leaf.parameter.shape).to(leaf.parameter.dtype)
    return found


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


@pytest.mark.parametrize("eps", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_delta_of_a_quadratic_is_exact_for_any_eps(eps: float, law: str) -> None:
    model, seen = Quadratic(), []
    opt = MeZO(model, lr=1e-3, eps=eps, n=3, directions=law, on_step=seen.append)
    for _ in range(3):
        wanted = [dot(directions(opt, j), model.gradient()) for j in range(3)]
        opt.step(model)
        assert seen[-1].deltas == pytest.approx(wanted, rel=1e-9 / min(eps, 1.0))


def test_one_sided_is_off_by_half_eps_times_the_curvature() -> None:
    model, seen, eps = Quadratic(), [], 0.05
    opt = MeZO(model, lr=1e-3, eps=eps, probe="one-sided", on_step=seen.append)
    z = directions(opt)
    curvature = float((z["w"] * (model.a @ z["w"])).sum() + z["v"] @ model.b @ z["v"])
    wanted = dot(z, model.gradient()) + eps / 2 * curvature
    opt.step(model)
    assert seen[-1].deltas == pytest.approx([wanted], rel=1e-10)


class Curved(nn.Module):
    """A network whose loss is no polynomial, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)
        for name, p in self.named_parameters():
            p.data = normal(make_key(1, name), tuple(p.shape)).mul_(0.5)
        self.double()
        self.x, self.y = normal(8, (10, 6)).double(), torch.arange(10) % 4

    def forward(self) -> Tensor:
        return cross_entropy(self.down(torch.tanh(self.norm(self.up(self.x)))), self.y)


def derivative(model: nn.Module, z: dict[str, Tensor]) -> tuple[float, float]:
    """(loss, z . grad f), by torch.func."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    value, slope = jvp(lambda w: functional_call(model, w, ()), (weights,), (z,))
    return float(value), float(slope)


def test_delta_tends_to_the_derivative() -> None:
    """The error of the two-sided difference falls with eps squared, that of the one-sided with eps."""
    for probe, power in (("two-sided", 2), ("one-sided", 1)):
        errors = []
        for eps in (1e-2, 1e-3, 1e-4):
            model, seen = Curved(), []
            opt = MeZO(model, lr=0.0, eps=eps, probe=probe, on_step=seen.append)
            _, slope = derivative(model, directions(opt))
            opt.step(model)
            errors.append(abs(seen[0].deltas[0] - slope))
        assert errors[1] == pytest.approx(errors[0] / 10**power, rel=0.3)
        assert errors[2] < 1e-7 if power == 2 else errors[2] == pytest.approx(errors[1] / 10, rel=0.1)


@pytest.mark.parametrize("n", [1, 3])
def test_forward_gradient_is_the_derivative(n: int) -> None:
    model, seen = Curved(), []
    opt = MeZO(model, lr=0.1, n=n, probe="forward-gradient", on_step=seen.append)
    for _ in range(3):
        wanted = [derivative(model, directions(opt, j)) for j in range(n)]
        found = opt.step(model)
        assert seen[-1].deltas == pytest.approx([slope for _, slope in wanted], rel=1e-13)
        assert found == pytest.approx(wanted[0][0], rel=1e-14)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_forward_gradient_through_attention() -> None:
    """The fused attention kernels have no forward-mode derivative; the plain one is used."""
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OPTForCausalLM(tiny_opt(OPTConfig)).double().eval()
    tokens = torch.arange(16).view(2, 8)
    seen: list[Record] = []
    opt = MeZO(model, lr=0.0, probe="forward-gradient", on_step=seen.append)
    z = directions(opt)
    eager = OPTForCausalLM(tiny_opt(OPTConfig, attn_implementation="eager")).double().eval()
    eager.load_state_dict(model.state_dict())
    weights = {name: p.detach() for name, p in eager.named_parameters()}
    _, slope = jvp(
        lambda w: functional_call(eager, w, (), {"input_ids": tokens, "labels": tokens}).loss, (weights,), (z,)
    )
    opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    assert seen[0].deltas == pytest.approx([float(slope)], rel=1e-8)


def test_forward_gradient_says_what_it_lacks() -> None:
    model = Curved()
    with pytest.raises(InputError, match="give the model itself"):
        MeZO(list(model.named_parameters()), probe="forward-gradient").step(model)
    with pytest.raises(InputError, match="the loss as a tensor, got float"):
        MeZO(model, probe="forward-gradient").step(lambda: float(model()))
    with pytest.raises(InputError, match="differentiable"):
        MeZO(model, probe="forward-gradient").step(lambda: (linear(model.x, model.up.weight) > 0).double().mean())

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    with pytest.raises((InputError, RuntimeError)) as error:
        MeZO(model, probe="forward-gradient").step(lambda: Odd.apply(model()))
    assert isinstance(error.value, InputError), error.value
    assert isinstance(model.up.weight, nn.Parameter)


@pytest.mark.parametrize(("law", "constant"), [("gaussian", 1), ("rademacher", -1)])
@pytest.mark.parametrize("n", [1, 4])
def test_mean_and_second_moment_of_the_estimate(law: str, constant: int, n: int) -> None:
    """Of a linear function: the mean is g, and E||ghat||^2 = (P + n + 1)/n ||g||^2 for Gaussian, (P + n - 1)/n for sign directions."""
    model = Quadratic(curved=False)
    g = model.gradient()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    samples, total = 1500, {name: torch.zeros_like(value) for name, value in g.items()}
    opt = MeZO(model, lr=1.0, eps=1.0, n=n, directions=law)
    squares = []
    for _ in range(samples):
        opt.step(model)
        with torch.no_grad():
            found = {name: start[name] - p for name, p in model.named_parameters()}
            squares.append(sum(float(value.square().sum()) for value in found.values()))
            for name, p in model.named_parameters():
                total[name] += found[name]
                p.copy_(start[name])
    p, square = 19, dot(g, g)
    spread = torch.tensor(squares).std().item() / math.sqrt(samples)
    assert abs(sum(squares) / samples - (p + n + constant) / n * square) < 5 * spread
    for name, value in total.items():
        # an entry has variance (||g||^2 + g_i^2) / n or less; the largest of 19 within five standard deviations
        assert (value / samples - g[name]).abs().max() < 5 * math.sqrt(2 * square / n / samples)


def test_one_step_is_dense_spsa_with_stored_directions() -> None:
    model = Curved().float()
    model.x = model.x.float()
    opt = MeZO(model, lr=0.05, weight_decay=0.1, n=2)
    z = [directions(opt, j) for j in range(2)]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def at(scale: float, j: int) -> float:
        return float(functional_call(model, {name: w + scale * z[j][name] for name, w in start.items()}, ()))

    deltas = [(at(1e-3, j) - at(-1e-3, j)) / 2e-3 for j in range(2)]
    opt.step(model)
    for name, p in model.named_parameters():
        ghat = (deltas[0] * z[0][name] + deltas[1] * z[1][name]) / 2
        decay = 0.0 if "bias" in name else 0.1  # "norm.weight" is decayed: the rule looks for layer_norm and layernorm
        assert torch.allclose(p, start[name] - 0.05 * (ghat + decay * start[name]), atol=2e-6, rtol=0), name


def tiny_opt(config: Any, **own: Any) -> Any:
    return config(
        vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
        word_embed_proj_dim=16, dropout=0.0, **own,
    )  # fmt: skip


def test_a_language_model_as_the_authors_procedure_re_derived() -> None:
    """Tied embedding, layer norms by name; loss and weights of 15 steps against three passes in place, float64."""
    from transformers import OPTConfig, OPTForCausalLM

    models = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models.append(OPTForCausalLM(tiny_opt(OPTConfig)).double().eval())
    ours, theirs = models
    seen: list[Record] = []
    opt = MeZO(ours, lr=2e-3, eps=1e-3, weight_decay=0.1, on_step=seen.append)
    for step in range(15):
        tokens = (torch.arange(16).view(2, 8) * 7 + step) % 40
        z, named = directions(opt), dict(theirs.named_parameters())

        @torch.no_grad()
        def move(scale: float, z: dict[str, Tensor] = z, named: dict[str, Tensor] = named) -> None:
            for name, p in named.items():
                p.data = p.data + scale * z[name] * 1e-3

        @torch.no_grad()
        def loss(tokens: Tensor = tokens) -> float:
            return float(theirs(input_ids=tokens, labels=tokens).loss)

        move(1)
        one = loss()
        move(-2)
        two = loss()
        move(1)
        delta = (one - two) / 2e-3
        with torch.no_grad():
            for name, p in named.items():
                decays = not any(word in name for word in ("bias", "layer_norm", "layernorm"))
                p.data = p.data - 2e-3 * (delta * z[name] + (0.1 * p.data if decays else 0.0))
        opt.step(lambda tokens=tokens: ours(input_ids=tokens, labels=tokens).loss)
        assert seen[-1].losses == pytest.approx((one, two), abs=1e-10)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-9, rtol=0), name
    assert ours.lm_head.weight is ours.model.decoder.embed_tokens.weight


def test_an_adapter_that_begins_at_zero() -> None:
    """LoRA at B = 0: whatever z_A is, delta = z_B . g_B + O(eps^2); the base is not touched."""
    torch.manual_seed(0)
    base = nn.Linear(7, 5).double().requires_grad_(False)

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = (
                base,
                nn.Parameter(normal(1, (2, 7)).double()),
                nn.Parameter(torch.zeros(5, 2).double()),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a.T @ self.b.T

    model, x, seen = Lora(), normal(2, (9, 7)).double(), []
    frozen = base.weight.clone()
    opt = MeZO(model, lr=1e-2, eps=1e-4, on_step=seen.append)
    loss = lambda: (model(x) - 1).square().mean()  # noqa: E731
    loss().backward()
    assert not model.a.grad.any()
    slope = float((directions(opt)["b"] * model.b.grad).sum())
    model.zero_grad()
    opt.step(loss)
    assert seen[0].deltas == pytest.approx([slope], abs=1e-6)
    assert torch.equal(base.weight, frozen)
    assert {leaf.draw(0).leaf.name for leaf in opt._moved()} == {"a", "b"}
