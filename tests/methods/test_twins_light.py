"""State-light methods against slow float64 twins, and the limiting cases that their cards name."""

import math
from typing import Any

import pytest
import torch
from reference import twins_light as twins
from reference.stepping import SHAPES, gradients, numbers, run, twin, worst
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.methods.adamw import AdamW
from tare.methods.lanton import LANTON, is_query_or_key, is_value_or_output
from tare.methods.lion import Lion
from tare.methods.lion_kappa import LionKappa
from tare.methods.muon import Muon
from tare.methods.scion import Scion
from tare.methods.sinkgd import SinkGD
from tare.methods.swan import SWAN
from tare.rules.lmo import NORMS, Spectral, make_norm
from tare.rules.maps import ColNorm, DeadZone, Orthogonal, RowNorm, Sign, Sinkhorn, Whiten, make_map
from tare.rules.orthogonal import newton_schulz

STEPS = 9
LRS = [0.01 * (1 + t % 4) for t in range(STEPS)]
TIGHT = 1e-10
SIDES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
EXACT = Orthogonal(backend="svd")


def stepped(kind: Any, shape: tuple[int, ...], role: str = "linear", **own: Any) -> list[Tensor]:
    p = nn.Parameter(numbers("w", shape))
    return run(kind([{"params": [("w", p)], "role": role}], lr=1.0, **own), p, grads_of(shape), LRS)


def grads_of(shape: tuple[int, ...]) -> list[Tensor]:
    return gradients(shape, STEPS)


def against(step: Any, path: list[Tensor], shape: tuple[int, ...], **own: Any) -> None:
    assert worst(path, twin(step, numbers("w", shape), grads_of(shape), LRS, **own)) < TIGHT


@SIDES
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon(shape: tuple[int, int], nesterov: bool) -> None:
    path = stepped(Muon, shape, nesterov=nesterov, ns_dtype="fp32", weight_decay=0.1)
    factor = math.sqrt(max(1.0, shape[0] / shape[1]))
    against(twins.muon, path, shape, momentum=0.95, nesterov=nesterov, factor=factor, wd=0.1)
    path = stepped(Muon, shape, nesterov=nesterov, backend="svd", factor="moonlight")
    factor = 0.2 * math.sqrt(max(shape))
    against(twins.muon, path, shape, momentum=0.95, nesterov=nesterov, factor=factor, wd=0.0, exact=True)


@pytest.mark.parametrize(("factor", "wanted"), [("original", 1.0), ("matrix", math.sqrt(8 / 6))])
def test_muon_convolution(factor: str, wanted: float) -> None:
    """out x (in * kernel); the published shape factor looks at the kernel's sides."""
    shape = (8, 3, 2, 1) if factor == "matrix" else (8, 2, 2, 2)
    path = stepped(Muon, shape, role="conv", factor=factor, ns_dtype="fp32")
    against(twins.muon, path, shape, momentum=0.95, nesterov=True, factor=wanted, wd=0.0)


def test_muon_experts_are_matrices_of_their_own() -> None:
    path = stepped(Muon, (3, 6, 4), role="expert", ns_dtype="fp32")
    against(twins.muon, path, (3, 6, 4), momentum=0.95, nesterov=True, factor=math.sqrt(6 / 4), wd=0.0)


def test_adam_beside_muon_steps_at_its_ratio() -> None:
    def named() -> list[tuple[str, nn.Parameter]]:
        shapes = {"embed.weight": (9, 4), "norm.weight": (5,)}
        return [(name, nn.Parameter(numbers(name, shape))) for name, shape in shapes.items()]

    mine, theirs = named(), named()
    a = Muon(mine, lr=0.02, adam_ratio=0.015, weight_decay=0.1)
    b = AdamW(theirs, lr=0.02 * 0.015, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for t in range(4):
        for items in (mine, theirs):
            for name, p in items:
                p.grad = numbers(name, tuple(p.shape), t)
        for optimizer, lr in ((a, 0.02), (b, 0.0003)):
            optimizer.param_groups[0]["lr"] = lr / (1 + t)
            optimizer.step()
    assert worst([p for _, p in mine], [p for _, p in theirs]) < 1e-15


@SIDES
def test_newton_schulz_by_blocks_is_the_plain_one(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of doing the same products: published order, in blocks with either polynomial, bf16 iterates, batched."""
    import tare.rules.orthogonal as room

    x = numbers("x", shape)
    wanted = twins.newton_schulz(x)
    assert (newton_schulz(x, dtype="fp32") - wanted).abs().max() < 1e-12
    monkeypatch.setattr(room, "BLOCK", 2)
    assert (newton_schulz(x, dtype="fp32") - wanted).abs().max() < 1e-12
    # An iterate rounded to 2^-9 five times: 1 % of entries of size 1.
    assert (newton_schulz(x, dtype="bf16").double() - wanted).abs().max() < 0.03
    both = newton_schulz(torch.stack([x, -3.0 * x]), dtype="fp32")
    assert (both - torch.stack([wanted, -wanted])).abs().max() < 1e-6  # the guard on the norm


def test_newton_schulz_singular_values() -> None:
    """[0.003, 1] of the norm lands in [0.68, 1.2]; the exact polar factor has ones."""
    u, _ = torch.linalg.qr(numbers("u", (20, 12)))
    v, _ = torch.linalg.qr(numbers("v", (12, 12)))
    s = torch.logspace(0, -2, 12, dtype=torch.float64)
    x = u * s @ v.T
    found = torch.linalg.svdvals(newton_schulz(x, dtype="fp32"))
    assert 0.68 < found.min() <= found.max() < 1.21
    assert (torch.linalg.svdvals(EXACT(x)) - 1).abs().max() < 1e-12


@SIDES
@pytest.mark.parametrize("norm", ["spectral", "sign", "col-norm", "row-norm"])
@pytest.mark.parametrize("constrained", [True, False])
def test_scion(shape: tuple[int, int], norm: str, constrained: bool) -> None:
    path = stepped(Scion, shape, hidden=norm, scale=3.0, weight_decay=float(constrained), ns_dtype="fp32")
    against(twins.scion, path, shape, a=0.1, scale=3.0, norm=norm, constrained=constrained)


@pytest.mark.parametrize("norm", ["spectral", "sign", "col-norm"])
def test_scion_stays_in_its_ball(norm: str) -> None:
    """Constrained: |W| <= scale in the norm, from a start inside it; Newton-Schulz overshoots by 20 %."""
    p = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    optimizer = Scion([p], lr=0.1, hidden=norm, scale=2.0)
    size = {
        "spectral": lambda w: torch.linalg.matrix_norm(w, 2) / (8 / 6) ** 0.5 / 1.21,
        "sign": lambda w: w.abs().max() * 6,
        "col-norm": lambda w: (w.square().mean(0).sqrt()).max(),
    }[norm]
    for t in range(60):
        p.grad = numbers("g", (8, 6), t % 3)
        optimizer.step()
        assert size(p.detach()) <= 2.0 + 1e-9


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_initial_weights_are_on_the_ball(norm: str) -> None:
    """lmo of anything has norm one, and so do initial weights: <lmo(W), W> is the dual norm; sizes agree with lmo's."""
    ball = make_norm("hidden", norm, EXACT)
    for shape, role in (((6, 4), "linear"), ((4, 6), "linear"), ((3, 4, 5), "expert"), ((5,), "norm")):
        leaf = Leaf("w", shape, torch.float32, role)  # type: ignore[arg-type]
        w = ball.initial(leaf, 5)
        direction = ball.lmo(numbers("x", shape), leaf)
        assert w.shape == shape
        if len(shape) > 1 and norm not in ("sign", "bias-rms"):
            assert abs(w.norm().item() - direction.norm().item()) < 1e-5 * direction.norm().item()
        elif norm == "sign":
            assert torch.equal(w.abs(), direction.abs().float())
        else:
            assert not w.any()


def test_init_is_repeatable_and_scaled() -> None:
    layer = nn.Linear(6, 4, bias=False)
    optimizer = Scion(layer, scale=5.0)
    optimizer.init_()
    first = layer.weight.detach().clone()
    optimizer.init_()
    assert torch.equal(layer.weight, first)
    assert (torch.linalg.svdvals(first) - 5.0 * (4 / 6) ** 0.5).abs().max() < 1e-5


def test_light_keeps_nothing_and_notices_replaced_gradients() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(6, 4)
    with pytest.raises(InputError, match="release"):
        Scion(layer, light=True, release=True)
    optimizer = Scion(layer, lr=0.01, light=True, weight_decay=0.0, ns_dtype="fp32")
    plain = nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    other = Scion(plain, lr=0.01, weight_decay=0.0, ns_dtype="fp32")
    for t in range(4):
        for net, opt in ((layer, optimizer), (plain, other)):
            opt.zero_grad()
            net(numbers("x", (12, 6), t, torch.float32)).square().mean().backward()
            opt.step()
    # The same average up to a factor: rounding of float32, magnified where a singular value is small.
    assert (layer.weight - plain.weight).abs().max() < 1e-4
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.warns(UserWarning, match=r"p.grad was replaced"):
        optimizer.step()


def lanton_pair(sizes: list[tuple[int, int]], **own: Any) -> tuple[LANTON, list[nn.Parameter]]:
    ps = [nn.Parameter(numbers(f"w{i}", s)) for i, s in enumerate(sizes)]
    return LANTON([(f"w{i}", p) for i, p in enumerate(ps)], lr=0.01, ns_dtype="fp32", **own), ps


@pytest.mark.parametrize("norm", ["spectral", "sign", "row-norm"])
def test_lanton(norm: str) -> None:
    sizes = [(6, 4), (4, 6), (5, 5)]
    optimizer, ps = lanton_pair(sizes, hidden=norm, betas=(0.8, 0.7), alpha=0.5)
    memory: dict[str, Any] = {}
    ws = [p.detach().clone() for p in ps]
    for t in range(STEPS):
        gs = [numbers(f"g{i}", s, t) * (1 + i) for i, s in enumerate(sizes)]
        for p, g in zip(ps, gs, strict=True):
            p.grad = g.clone()
        optimizer.step()
        ws = twins.lanton(ws, gs, memory, lr=0.01, betas=(0.8, 0.7), alpha=0.5, norms=[norm] * 3)
        assert worst([p.detach() for p in ps], ws) < TIGHT
        assert all(rate <= 0.01 for rate in memory["rates"])
    assert min(memory["rates"]) < 0.9 * max(memory["rates"])


def test_lanton_with_equal_noise_is_scion() -> None:
    """Two leaves with the same gradients, or one alone; and any leaves while alpha outweighs their noise."""
    for sizes, alpha in (([(6, 4), (6, 4)], 1e-3), ([(6, 4)], 1e-3), ([(6, 4), (5, 5)], 1e30)):
        optimizer, ps = lanton_pair(sizes, alpha=alpha)
        qs = [nn.Parameter(p.detach().clone()) for p in ps]
        other = Scion(qs, lr=0.01, averaging=1.0 - 0.95, weight_decay=0.0, ns_dtype="fp32")
        for t in range(5):
            for p, q in zip(ps, qs, strict=True):
                p.grad, q.grad = numbers("g", tuple(p.shape), t), numbers("g", tuple(p.shape), t)
            optimizer.step()
            other.step()
        assert worst([p.detach() for p in ps], [q.detach() for q in qs]) < 1e-15


def test_lanton_groups() -> None:
    def leaf(name: str) -> Leaf:
        return Leaf(name, (4, 4), torch.float32, "linear")

    assert is_query_or_key(leaf("model.layers.0.self_attn.q_proj.weight"))
    assert is_value_or_output(leaf("model.layers.0.self_attn.o_proj.weight"))
    assert not is_query_or_key(leaf("model.layers.0.mlp.up_proj.weight"))
    # A noisy matrix of another group slows nobody down.
    names = ("a.q_proj.weight", "a.up_proj.weight")
    moved = []
    for factor in (1.0, 100.0):
        ps = [(n, nn.Parameter(torch.zeros(4, 4))) for n in names]
        optimizer = LANTON(ps, lr=0.01)
        for t in range(3):
            for (n, p), f in zip(ps, (1.0, factor), strict=True):
                p.grad = numbers(n, (4, 4), t, torch.float32) * f
            optimizer.step()
        moved.append(ps[0][1].detach().clone())
    assert torch.equal(*moved)


@SIDES
def test_sinkgd(shape: tuple[int, int]) -> None:
    path = stepped(SinkGD, shape, weight_decay=0.1)
    against(twins.sinkgd, path, shape, scale=0.05, iterations=5, wd=0.1)


def test_sinkhorn_limits() -> None:
    x = numbers("x", (9, 6))
    assert (Sinkhorn(1)(x) - ColNorm()(RowNorm()(x))).abs().max() < 1e-14
    square = Sinkhorn(60)(x).square()  # doubly stochastic, scaled
    assert (square.sum(1) - 6).abs().max() < 1e-12
    assert (square.sum(0) - 9).abs().max() < 1e-12
    d, e = numbers("d", (9, 1)).exp(), numbers("e", (1, 6)).exp()
    assert (Sinkhorn(60)(2.0 * d * x * e) - Sinkhorn(60)(x)).abs().max() < 1e-10
    x[2] = 0.0
    x[:, 4] = 0.0
    y = Sinkhorn()(x)
    assert not y[2].any()
    assert not y[:, 4].any()
    assert torch.isfinite(y).all()
    assert (Sinkhorn()(x) - twins.sinkhorn(x, 5)).abs().max() < 1e-12
    for size in (1e-30, 1e30):  # far beyond where squares overflow in float32
        far = Sinkhorn()((x * size).float())
        assert (far - y.float()).abs().max() < 1e-5


@SIDES
@pytest.mark.parametrize("rows", ["centred", "rms"])
def test_swan(shape: tuple[int, int], rows: str) -> None:
    path = stepped(SWAN, shape, rows=rows, weight_decay=0.1)
    against(twins.swan, path, shape, scale=0.05, centred=rows == "centred", iterations=10, wd=0.1)


def test_whitening_against_the_exact_root() -> None:
    """Condition number below 100: ten iterations leave less than 1e-3."""
    u, _ = torch.linalg.qr(numbers("u", (16, 8)))
    v, _ = torch.linalg.qr(numbers("v", (8, 8)))
    x = u * torch.logspace(0, -1.9, 8, dtype=torch.float64) @ v.T
    near, exact = Whiten(14)(x), Whiten(backend="eigh")(x)
    assert (torch.linalg.svdvals(exact) - 1).abs().max() < 1e-9
    assert (near - exact).norm() / exact.norm() < 1e-3
    x = u * torch.logspace(0, -1, 8, dtype=torch.float64) @ v.T
    near, exact = Whiten(10)(x), Whiten(backend="eigh")(x)
    assert (near - exact).norm() / exact.norm() < 1e-3


@SIDES
@pytest.mark.parametrize("kappa", ["l1", "l2", "nuclear", "dead-zone", "huber"])
def test_lion_kappa(shape: tuple[int, int], kappa: str) -> None:
    own = {"kappa": kappa, "width": 0.3, "betas": (0.9, 0.98)}
    path = stepped(LionKappa, shape, **own, size="unit", backend="svd", weight_decay=0.1)
    against(twins.lion_kappa, path, shape, **own, wd=0.1)


def test_lion_kappa_l1_is_lion_to_the_bit() -> None:
    net = [nn.Parameter(numbers("w", (7, 5), dtype=torch.float32)) for _ in range(3)]
    grads = gradients((7, 5), STEPS, torch.float32)
    wanted = run(Lion([net[0]], weight_decay=0.1), net[0], grads, LRS)
    for kappa, p in (("l1", net[1]), (Sign(), net[2])):
        path = run(LionKappa([p], kappa=kappa, weight_decay=0.1), p, grads, LRS)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(path, wanted, strict=True))


@pytest.mark.parametrize(
    ("kappa", "norm"),
    [
        ("l1", lambda w: w.abs().max()),
        ("l2", lambda w: w.norm()),
        ("nuclear", lambda w: torch.linalg.matrix_norm(w, 2)),
    ],
)
def test_lion_kappa_ends_in_the_ball_of_the_dual_norm(kappa: str, norm: Any) -> None:
    """From outside, W comes into the ball of radius 1 / wd and stays."""
    p = nn.Parameter(10.0 * numbers("w", (6, 4)))
    optimizer = LionKappa([p], lr=0.05, kappa=kappa, size="unit", backend="svd", weight_decay=0.5)
    for t in range(400):
        p.grad = numbers("g", (6, 4), t % 5)
        optimizer.step()
    assert norm(p.detach()) <= 2.0 + 1e-3


def test_dead_zone_zero_is_sign() -> None:
    x = numbers("x", (5, 4))
    assert torch.equal(DeadZone(0.0)(x), Sign()(x))


def test_stateless_methods_keep_nothing_for_matrices() -> None:
    experts = nn.Parameter(torch.zeros(2, 4, 6))
    for kind in (SinkGD, SWAN):
        optimizer = kind([("mlp.weight", nn.Parameter(torch.zeros(8, 4))), ("experts.weight", experts)])
        assert optimizer.state_bytes().total == 0


@pytest.mark.parametrize("name", ["sign", "unit-norm", "row-norm", "col-norm", "orthogonal", "sinkhorn", "whiten"])
def test_maps_on_awkward_input(name: str) -> None:
    """Zero gives zero, NaN stays in its own matrix, x is kept, a strided x gives what a contiguous one does."""
    post = make_map(name)
    assert post is not None
    for shape in ((5, 3), (3, 5), (2, 3, 4), (7,), (), (1, 1), (0, 4)):
        x = numbers("x", shape, dtype=torch.float32)
        kept = x.clone()
        assert post(x).shape == x.shape
        assert torch.equal(x, kept)
        assert not post(torch.zeros(shape)).any()
        if x.ndim == 3:
            x[0, 1, 1] = math.nan
            y = post(x)
            assert y[0].isnan().any()
            assert torch.equal(y[1], post(kept)[1])
    x = numbers("x", (5, 3), dtype=torch.float32)
    assert (post(x) - post(x.T.contiguous().T)).abs().max() < (0.02 if name == "orthogonal" else 1e-5)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'sinkhorn'"):
        make_map("sinkhron")
    with pytest.raises(InputError, match="hidden"):
        Scion([nn.Parameter(torch.zeros(3, 3))], hidden="spectrl")
    with pytest.raises(InputError, match="kappa"):
        LionKappa([nn.Parameter(torch.zeros(3, 3))], kappa="l3")
    assert isinstance(make_norm("hidden", "spectral", EXACT), Spectral)
