"""T7: where a subspace method must be something simpler, it is exactly that. The *Oracle* lines of the method cards."""

import itertools
import math
from typing import Any

import pytest
import torch
from reference.stepping import SHAPES, gradients, numbers, optimizer_for, run, worst
from torch import Tensor, nn

from tare.core.optimizer import Optimizer
from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.methods import registry
from tare.rules.adafactor import Adafactor
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.momentum import Momentum
from tare.subspace.bases import GaussianBasis, RandomizedBasis, SVDBasis
from tare.subspace.limiter import NormGrowth
from tare.subspace.refresh import Refresh
from tare.subspace.residual import NormRatioResidual
from tare.subspace.wrapper import Subspace
from tare.testing import RecordedBasis

STEPS = 9
ADAM = Adam((0.9, 0.999), 1e-6, "before")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def path(transform: Any, shape: tuple[int, int], steps: int = STEPS, **own: Any) -> list[Tensor]:
    opt, p = optimizer_for(transform, numbers("w", shape), **own)
    return run(opt, p, gradients(shape, steps))


def identity(size: int) -> RecordedBasis:
    return RecordedBasis({0: torch.eye(size, dtype=torch.float64)})


@shapes
@pytest.mark.parametrize("rule", [ADAM, Lion(), Momentum(0.9), Adafactor(0.9)], ids=lambda r: r.describe())
def test_identity_basis_is_the_inner_rule(shape: tuple[int, int], rule: Any) -> None:
    low = Subspace(rule, identity(min(shape)))
    assert worst(path(low, shape, weight_decay=0.1), path(rule, shape, weight_decay=0.1)) < 1e-12


@shapes
def test_sgd_at_full_rank_is_sgd(shape: tuple[int, int]) -> None:
    """P P^T = I at r = s, whatever the basis; with Adam inside it is not Adam, but Adam in rotated coordinates."""
    full = SVDBasis(min(shape))
    low = Subspace(Momentum(0.0), full, Refresh(2))
    assert worst(path(low, shape), path(Momentum(0.0), shape)) < 1e-12
    assert worst(path(Subspace(ADAM, full), shape), path(ADAM, shape)) > 1e-3


@shapes
def test_scale_zero_does_not_move(shape: tuple[int, int]) -> None:
    still = path(Subspace(ADAM, SVDBasis(2), scale=0.0), shape)
    assert worst(still, [numbers("w", shape)] * STEPS) == 0.0


@shapes
@pytest.mark.parametrize("side", ["shorter", "longer", "left", "right", "both"])
def test_update_rank_within_a_period(shape: tuple[int, int], side: Any) -> None:
    """The total movement between two refreshes has rank r; over two periods it has more."""
    steps = path(Subspace(ADAM, SVDBasis(2), Refresh(STEPS // 2), side=side), shape, 2 * (STEPS // 2))
    start = numbers("w", shape)
    assert numerical_rank(steps[STEPS // 2 - 1] - start) == 2
    assert numerical_rank(steps[-1] - start) > 2


def numerical_rank(x: Tensor) -> int:
    values = torch.linalg.svdvals(x)
    return int((values > 1e-10 * values[0]).sum())


@shapes
def test_sides_choose_the_projected_dimension(shape: tuple[int, int]) -> None:
    """shorter projects the longer count of rows away; square counts as tall; left and right are literal."""
    m, n = shape
    wanted = {"left": (2, n), "right": (m, 2), "both": (2, 2)}
    wanted["shorter"] = wanted["right"] if m >= n else wanted["left"]
    wanted["longer"] = wanted["left"] if m >= n else wanted["right"]
    for side, inner in wanted.items():
        opt, p = optimizer_for(Subspace(ADAM, SVDBasis(2), side=side), numbers("w", shape))  # type: ignore[arg-type]
        assert tuple(opt.state[p]["exp_avg"].shape) == inner, side


def test_the_projected_subspace_is_the_top_one() -> None:
    """On a gradient of rank 2 plus little noise the update lies in its row space, from the right and from the left."""
    for shape in ((12, 5), (5, 12)):
        u, v = numbers("u", (shape[0], 2)), numbers("v", (2, shape[1]))
        g = u @ v + 1e-9 * numbers("n", shape)
        opt, p = optimizer_for(Subspace(Momentum(0.0), SVDBasis(2)), numbers("w", shape), lr=1.0)
        run(opt, p, [g])
        assert (numbers("w", shape) - p.detach() - g).abs().max() < 1e-7


@shapes
@pytest.mark.parametrize("front", [False, True])
def test_apollo_keeps_the_direction_of_every_channel(shape: tuple[int, int], front: bool) -> None:
    """W moves along G column by column (wide) or row by row (tall): cosine 1 to rounding."""
    low = Subspace(ADAM, GaussianBasis(2), lift="channel", scale_front=front, scale=4.0, limiter=NormGrowth())
    opt, p = optimizer_for(low, numbers("w", shape), weight_decay=0.0)
    before = p.detach().clone()
    lengths = set()
    for g, after in zip(gradients(shape, 5), run(opt, p, gradients(shape, 5)), strict=True):
        move, dim = before - after, 0 if shape[0] < shape[1] else 1
        cosine = torch.nn.functional.cosine_similarity(move, g, dim=dim)
        assert (cosine - 1).abs().max() < 1e-9
        ratio = move.norm(dim=dim) / g.norm(dim=dim)
        lengths.add(round((ratio.max() / ratio.min()).item(), 3))
        before = after
    assert max(lengths) > 1.05  # channels do get scales of their own


@shapes
def test_apollo_tensor_wise_keeps_the_direction_of_the_whole(shape: tuple[int, int]) -> None:
    p = nn.Parameter(numbers("w", shape))
    opt = registry.build("apollo-mini", [{"params": [("w", p)], "role": "linear"}], 0.01)
    before = p.detach().clone()
    for g, after in zip(gradients(shape, 5), run(opt, p, gradients(shape, 5)), strict=True):
        move = (before - after).flatten()
        assert abs(torch.nn.functional.cosine_similarity(move, g.flatten(), dim=0).item() - 1) < 1e-9
        before = after


@shapes
def test_apollo_with_identity_basis(shape: tuple[int, int]) -> None:
    """P = I: |U_j| = |N_j| for every channel, and |U| = |N| for the tensor, before limiter."""
    adam = path(ADAM, shape)
    start = numbers("w", shape)
    dim = 0 if shape[0] < shape[1] else 1
    for lift in ("channel", "tensor"):
        low = Subspace(ADAM, identity(min(shape)), lift=lift)  # type: ignore[arg-type]
        mine = path(low, shape)
        for a, b, c, d in zip([start, *mine], mine, [start, *adam], adam, strict=False):
            if lift == "channel":
                # 1e-8 beside |R_j| in the published ratio
                assert torch.allclose((a - b).norm(dim=dim), (c - d).norm(dim=dim), rtol=1e-6, atol=1e-12)
            else:
                assert math.isclose((a - b).norm().item(), (c - d).norm().item(), rel_tol=1e-7)


@shapes
def test_fira_paper_form_at_full_rank_is_galore(shape: tuple[int, int]) -> None:
    """Nothing is left outside the subspace; in the code form (1 - alpha) of the gradient is."""
    full = SVDBasis(min(shape))
    galore = path(Subspace(ADAM, full, Refresh(3), scale=0.25), shape)
    paper = Subspace(ADAM, full, Refresh(3), scale=0.25, residual=NormRatioResidual("paper"), limiter=NormGrowth())
    code = Subspace(ADAM, full, Refresh(3), scale=0.25, residual=NormRatioResidual("code"), limiter=NormGrowth())
    assert worst(path(paper, shape), galore) < 1e-12
    assert worst(path(code, shape), galore) > 1e-3


@shapes
def test_fira_forms_agree_at_alpha_one_without_limiter(shape: tuple[int, int]) -> None:
    paths = [path(Subspace(ADAM, SVDBasis(2), residual=NormRatioResidual(form)), shape) for form in ("code", "paper")]  # type: ignore[arg-type]
    assert worst(*paths) < 1e-12


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_fira_is_equivariant_under_permuted_channels(shape: tuple[int, int]) -> None:
    """Permuting the columns (wide) or rows (tall) of W and of every G permutes the result."""
    dim = 1 if shape[0] < shape[1] else 0
    order = numbers("order", (max(shape),)).argsort()
    low = Subspace(ADAM, SVDBasis(2), residual=NormRatioResidual(), limiter=NormGrowth())
    opt, p = optimizer_for(low, numbers("w", shape))
    turned, q = optimizer_for(low, numbers("w", shape).index_select(dim, order))
    g = gradients(shape, 4)  # within one period: signs of singular vectors may differ after a permutation
    a, b = run(opt, p, g), run(turned, q, [x.index_select(dim, order) for x in g])
    assert worst([x.index_select(dim, order) for x in a], b) < 1e-10


def test_limiter_bounds_the_growth_of_the_residual() -> None:
    """|S_t| <= 1.01 (|S_{t-1}| + 1e-8), over gradients that jump by a factor of a thousand."""
    limiter, rho = NormGrowth(), torch.tensor(math.inf, dtype=torch.float64)
    before, limited = math.inf, 0
    for norm in (1.0, 1.005, 1000.0, 1000.0, 0.5, 0.0, 400.0, 1e-12, 3.0):
        s = norm * limiter.factor(torch.tensor(norm, dtype=torch.float64), rho).item()
        assert s <= 1.01 * (before + 1e-8) * (1 + 1e-12)
        limited += s < norm
        if norm > 0:
            before = s
            assert math.isclose(rho.item(), s)
    assert limited == 4


@shapes
def test_limiter_bounds_the_update_of_apollo(shape: tuple[int, int]) -> None:
    """Seen from outside, with lr 1 and the bias correction taken out: |U_t| <= 1.01 (|U_{t-1}| + 1e-8)."""
    p = nn.Parameter(numbers("w", shape))
    opt = registry.build("apollo", [{"params": [("w", p)], "role": "linear"}], 1.0, rank=2)
    grads = [g * (100.0 if t == 4 else 1.0) for t, g in enumerate(gradients(shape, 8))]
    previous, norms = numbers("w", shape), []
    for t, after in enumerate(run(opt, p, grads), 1):
        c = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        norms.append((previous - after).norm().item() / c)
        previous = after
    growth = [b / a for a, b in itertools.pairwise(norms)]
    assert max(growth) <= 1.01 * (1 + 1e-6)
    assert max(growth) > 1.009  # it acted


# -- transfer ----------------------------------------------------------------------------------------------------------


@shapes
def test_transfer_zero_restarts_the_inner_rule(shape: tuple[int, int]) -> None:
    """After a refresh the run equals a fresh optimizer that starts from the weights of that moment."""
    period, grads = 4, gradients(shape, 8)
    low = Subspace(ADAM, SVDBasis(2), Refresh(period), transfer="zero")
    opt, p = optimizer_for(low, numbers("w", shape))
    whole = run(opt, p, grads)
    fresh, q = optimizer_for(low, whole[period - 1])
    assert worst(whole[period:], run(fresh, q, grads[period:])) < 1e-12
    assert worst(whole[period:], path(Subspace(ADAM, SVDBasis(2), Refresh(period)), shape, 8)[period:]) > 1e-4


@pytest.mark.parametrize("rule", [Lion(), Momentum(0.9), Adafactor(0.9), Adafactor(None)], ids=lambda r: r.describe())
def test_transfer_zero_restarts_every_rule(rule: Any) -> None:
    period, grads, shape = 3, gradients((12, 5), 6), (12, 5)
    low = Subspace(rule, SVDBasis(2), Refresh(period), transfer="zero")
    opt, p = optimizer_for(low, numbers("w", shape))
    whole = run(opt, p, grads)
    fresh, q = optimizer_for(low, whole[period - 1])
    assert worst(whole[period:], run(fresh, q, grads[period:])) < 1e-12


@pytest.mark.parametrize(
    ("shape", "side"), [((12, 5), "right"), ((5, 12), "left"), ((6, 6), "left"), ((6, 6), "right"), ((11, 7), "right")]
)
def test_transfer_rotate_carries_the_moment(shape: tuple[int, int], side: Any) -> None:
    """At full rank nothing is lost: rotated momentum makes the run that of plain momentum. Kept numbers do not."""
    rank = shape[0] if side == "left" else shape[1]
    paths = {
        transfer: path(Subspace(Momentum(0.9), SVDBasis(rank), Refresh(2), side=side, transfer=transfer), shape)  # type: ignore[arg-type]
        for transfer in ("rotate", "keep")
    }
    plain = path(Momentum(0.9), shape)
    assert worst(paths["rotate"], plain) < 1e-10
    assert worst(paths["keep"], plain) > 1e-3


def test_transfer_rotate_on_both_sides() -> None:
    low = Subspace(Momentum(0.9), SVDBasis(6), Refresh(2), side="both", transfer="rotate")
    assert worst(path(low, (6, 6)), path(Momentum(0.9), (6, 6))) < 1e-10


def test_rotated_second_moments_stay_positive() -> None:
    opt, p = optimizer_for(Subspace(ADAM, SVDBasis(3), Refresh(2), transfer="rotate"), numbers("w", (12, 5)))
    run(opt, p, gradients((12, 5), 7))
    assert (opt.state[p]["exp_avg_sq"] >= 0).all()
    assert opt.state[p]["exp_avg_sq"].max() > 0


# -- calendar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "period"), [(3, 3), (3, 7), (10, 10), (49, 49), (9, 60), (5, 4)])
def test_staggered_leaves_take_turns(count: int, period: int) -> None:
    """After the first step (which every leaf needs) each leaf refreshes once a period; while there are no more leaves
    than steps in a period, no two in the same step."""
    params = [(f"layer.{i}.weight", nn.Parameter(torch.zeros(2, 2))) for i in range(count)]
    low = Subspace(ADAM, GaussianBasis(1), Refresh(period, stagger=True))
    opt = Optimizer(params, Recipe((("*", low),)), 0.0)
    last, refreshed = [0] * count, []
    for step in range(3 * period + 1):
        for _, p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        now = [opt.state[p]["refreshed"] for _, p in params]
        refreshed.append([i for i in range(count) if now[i] != last[i]])
        last = now
        if step == 0:
            assert refreshed[0] == list(range(count))
    later = refreshed[1:]
    if count <= period:
        assert max(len(leaves) for leaves in later) == 1, "two leaves refresh in one step"
    for start in range(0, 2 * period, period):
        window = sorted(i for leaves in later[start : start + period] for i in leaves)
        assert window == list(range(count)), "each leaf refreshes once a period"


def test_unstaggered_refreshes_follow_the_papers() -> None:
    """Updates 1, T + 1, 2T + 1, for every leaf at once."""
    opt, p = optimizer_for(Subspace(ADAM, SVDBasis(2), Refresh(3)), numbers("w", (12, 5)))
    at = []
    for number, g in enumerate(gradients((12, 5), 10), 1):
        before = opt.state[p]["basis"].clone()
        run(opt, p, [g])
        if not torch.equal(opt.state[p]["basis"], before):
            at.append(number)
    assert at == [1, 4, 7, 10]


# -- bases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_randomized_basis_spans_the_signal(shape: tuple[int, int], size: float) -> None:
    """On a slowly turning signal of rank 4 in noise, the warm basis finds the SVD's subspace: cosines of the principal
    angles near 1, at every refresh, for gradients of size 1e-8 too. It stays orthonormal."""
    rank = 4
    u, v = (
        torch.linalg.qr(numbers(k, (d, rank), dtype=torch.float32)).Q for k, d in (("u", shape[0]), ("v", shape[1]))
    )
    previous = None
    for t in range(5):
        turn = torch.linalg.qr(u + 0.02 * t * numbers("t", u.shape, dtype=torch.float32)).Q
        g = size * (turn * torch.tensor([8.0, 6.0, 5.0, 4.0]) @ v.mT + 0.02 * numbers("n", shape, t, torch.float32))
        for side in ("left", "right"):
            exact = SVDBasis(rank).compute(g, side, None, 0)  # type: ignore[arg-type]
            fresh = RandomizedBasis(rank).compute(g, side, previous if side == "left" else None, t)  # type: ignore[arg-type]
            assert exact is not None
            assert fresh is not None
            warm = side == "left" and previous is not None
            assert torch.linalg.svdvals(exact.mT @ fresh).min() > (0.999 if warm else 0.99)
            assert (fresh.mT @ fresh - torch.eye(rank)).abs().max() < 1e-5
            if side == "left":
                previous = fresh


def test_warm_start_keeps_the_columns_in_place() -> None:
    """On an unchanged gradient a warm refresh returns nearly the same columns; a cold one other signs and order."""
    g = torch.outer(numbers("u", (20,)), numbers("v", (12,))).float() + 0.3 * numbers(
        "n", (20, 12), dtype=torch.float32
    )
    first = RandomizedBasis(3).compute(g, "right", None, 1)
    for _ in range(60):
        first = RandomizedBasis(3).compute(g, "right", first, 2)
    assert first is not None
    again = RandomizedBasis(3).compute(g, "right", first, 3)
    cold = RandomizedBasis(3, warm=False).compute(g, "right", first, 3)
    assert again is not None
    assert cold is not None
    assert (torch.diagonal(first.mT @ again) > 0.999).all()
    assert not (torch.diagonal(first.mT @ cold) > 0.999).all()


@pytest.mark.parametrize(
    ("side", "lift"),
    [*itertools.product(("shorter", "longer"), ("channel", "tensor", "back")), ("both", "back")],
)
@pytest.mark.parametrize("transfer", ["keep", "zero"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_seed_storage_equals_a_stored_basis(side: str, transfer: str, dtype: torch.dtype, lift: str) -> None:
    """Drawn again or kept: the same bits, over refreshes; and the basis costs nothing."""
    for shape in SHAPES.values():
        low = Subspace(ADAM, GaussianBasis(2), Refresh(3), side=side, transfer=transfer, lift=lift)  # type: ignore[arg-type]
        runs, total = [], []
        for basis in ("fp32", "seed"):
            opt, p = optimizer_for(low, numbers("w", shape, dtype=dtype), storage=Storage(basis=basis))  # type: ignore[arg-type]
            runs.append(run(opt, p, gradients(shape, 8, dtype)))
            total.append(opt.state_bytes().total - opt.state_bytes().by_kind.get("basis", 0))
            assert (opt.state_bytes().by_kind.get("basis", 0) == 0) == (basis == "seed")
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)
        assert total[0] == total[1]


def test_another_seed_is_another_sketch() -> None:
    runs = []
    for seed in (0, 1):
        p = nn.Parameter(numbers("w", (12, 5)))
        opt = registry.build("apollo", [{"params": [("w", p)], "role": "linear"}], 0.01, rank=2, seed=seed)
        runs.append(run(opt, p, gradients((12, 5), 3)))
    assert worst(*runs) > 1e-6


@pytest.mark.parametrize("lift", ["channel", "tensor", "back"])
def test_a_rule_that_scales_by_lr_itself_is_scaled_once(lift: str) -> None:
    """Adafactor's first moment holds lr-scaled updates: whatever the lift, twice the lr moves twice as far."""
    moves = []
    for lr in (0.001, 0.002):
        low = Subspace(Adafactor(0.9), SVDBasis(3), lift=lift)  # type: ignore[arg-type]
        opt, p = optimizer_for(low, numbers("w", (12, 5)), lr=lr)
        moves.append((run(opt, p, gradients((12, 5), 4))[-1] - numbers("w", (12, 5))).norm().item())
    assert math.isclose(moves[1] / moves[0], 2.0, rel_tol=1e-6)


def test_eight_bit_moments_follow_the_full_ones() -> None:
    """A round trip through codes at every step: near the fp32 run, but not equal to it."""
    shape, grads = (64, 48), [numbers("noise", (64, 48), t, torch.float32) for t in range(12)]
    for rule in (Adam(), Lion(), Momentum(0.9), Subspace(ADAM, SVDBasis(16), Refresh(5))):
        runs = []
        for moment in ("fp32", "int8"):
            opt, p = optimizer_for(
                rule, numbers("w", shape, dtype=torch.float32), lr=1e-3, storage=Storage(moment, min_quantized=1)
            )  # type: ignore[arg-type]
            runs.append(run(opt, p, grads)[-1] - numbers("w", shape))
        assert not torch.equal(*runs)
        # Codes are 2 digits: the mean error of a step is a few per cent of it, and averages out over steps.
        assert (runs[0] - runs[1]).norm() < 0.12 * runs[0].norm(), rule.describe()
