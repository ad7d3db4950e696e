"""What stepping beside the published codes on settings without a golden trace has taught: each test is one finding."""

from typing import Any

import pytest
import torch
from reference.stepping import SHAPES, gradients, numbers
from torch import Tensor, nn

import tare
from tare.core.errors import InputError
from tare.subspace.bases import SVDBasis
from tare.testing import RecordedBasis

LR, STEPS = 0.01, 7
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def stepped(
    key: str, shape: tuple[int, ...], grads: list[Tensor] | None = None, **hyper: Any
) -> tuple[list[Tensor], Any, nn.Parameter]:
    """Weights after each step, the optimizer and its parameter."""
    weight = nn.Parameter(numbers("w", shape))
    optimizer = tare.create(key, [{"params": [("w", weight)], "role": "linear"}], lr=LR, **hyper)
    path = []
    for g in grads if grads is not None else gradients(shape, STEPS):  # type: ignore[arg-type]
        weight.grad = g.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path, optimizer, weight


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def chosen(length: int, count: int, *names: int) -> list[Tensor]:
    return [numbers("order", (length,), name).argsort()[:count] for name in names]


def frame(size: int, rank: int, number: int) -> Tensor:
    return torch.linalg.qr(numbers("p", (size, rank), number)).Q


# -- recordings decide ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@shapes
def test_recorded_numbers_overrule_rank_and_period(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Share, rank and period of the method have no say, whatever whole numbers the recording is in."""
    m, n = shape
    steps = (0, 3, 4)
    columns = dict(zip(steps, (i.to(dtype) for i in chosen(n, 3, *steps)), strict=True))
    short = dict(zip(steps, (i.to(dtype) for i in chosen(min(m, n), 3, *steps)), strict=True))
    paths = []
    for density, period in ((0.25, 3), (0.9, 1), (1.0, 200)):
        own = {"selection": "columns", "density": density, "period": period}
        path, opt, w = stepped("frugal", shape, basis=RecordedBasis(columns), **own)
        assert opt.state[w]["basis"].tolist() == columns[4].tolist()
        paths.append(path)
        assert same(path, paths[0])
    paths = []
    for rank, period in ((3, 2), (256, 1), (1, 200)):
        path, opt, w = stepped("dct-adamw", shape, basis=RecordedBasis(short), rank=rank, period=period)
        assert opt.state[w]["basis"].tolist() == short[4].tolist()
        paths.append(path)
        assert same(path, paths[0])


@shapes
def test_recorded_entries_as_rows_and_columns_or_flat(shape: tuple[int, int]) -> None:
    m, n = shape
    flat = dict(zip((0, 3), chosen(m * n, 7, 0, 3), strict=True))
    pairs = {step: torch.stack((i // n, i % n)) for step, i in flat.items()}
    paths = [
        stepped("frugal", shape, basis=RecordedBasis(given), selection="randk", density=density)[0]
        for given, density in ((flat, 0.1), (pairs, 0.1), (pairs, 0.8))
    ]
    assert same(paths[0], paths[1])
    assert same(paths[0], paths[2])


def test_a_recording_is_not_drawn_again() -> None:
    """A seed would bring back the basis of step 0 at every step; it is refused."""
    given = RecordedBasis({0: torch.tensor([0, 2]), 3: torch.tensor([1, 3])})
    with pytest.raises(InputError, match="recorded"):
        stepped("frugal", (12, 5), basis=given, selection="columns", storage={"basis": "seed"})


@pytest.mark.parametrize("key", ["galore", "galore-adafactor", "fira", "apollo", "frugal"])
def test_recorded_matrices_on_the_longer_side(key: str) -> None:
    """A matrix has the columns that it has: more than the shorter side is no reason to step dense."""
    given = RecordedBasis({0: frame(12, 8, 0), 3: frame(12, 8, 3)})
    own = {"selection": "random"} if key == "frugal" else {}
    _, opt, w = stepped(key, (12, 5), basis=given, side="longer", **own)
    assert torch.equal(opt.state[w]["basis"], given.bases[3])


# -- selections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("selection", "count"), [("randperm", 2), ("columns", 1), ("rows", 4)])
def test_shares_round_as_the_code_does(selection: str, count: int) -> None:
    """`randperm` rounds to the nearest, whole rows and columns down: 0.37 of 5 columns or of 12 rows."""
    _, opt, w = stepped("frugal", (12, 5), selection=selection, density=0.37)
    assert opt.state[w]["basis"].numel() == count


@pytest.mark.parametrize(("selection", "rank"), [("random", 6), ("svd", 5)])
def test_a_share_of_the_longer_side(selection: str, rank: int) -> None:
    """Half of 12: a random basis has all 6, an SVD of 12 x 5 only the 5 there are; neither steps dense."""
    _, opt, w = stepped("frugal", (12, 5), selection=selection, density=0.5, side="left")
    assert opt.state[w]["basis"].shape == (12, rank)


@shapes
def test_momentum_starts_from_the_gradient_of_each_period(shape: tuple[int, int]) -> None:
    """FRUGAL's code: b = (1 + momentum) g at a selection. On all columns, with nothing outside, that is all there is."""
    grads, period, beta = gradients(shape, STEPS), 3, 0.9
    own = {"inner": "sgdm", "selection": "columns", "density": 1.0, "period": period, "momentum": beta}
    path = stepped("frugal", shape, grads, momentum_start="gradient", **own)[0]
    w, b = numbers("w", shape), torch.zeros(shape)
    for t, g in enumerate(grads):
        b = beta * (g if t % period == 0 else b) + g
        w = w - LR * b
        assert (path[t] - w).abs().max() < 1e-12
    plain = stepped("frugal", shape, grads, **own)[0]
    assert (plain[0] - (numbers("w", shape) - LR * grads[0])).abs().max() < 1e-12


# -- zero gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3], ids=["first", "refresh"])
@pytest.mark.parametrize("key", ["galore", "fira", "apollo", "frugal", "compose"])
def test_zero_gradient_at_a_refresh(key: str, at: int) -> None:
    """`svd` waits for the next gradient, `svd-legacy` keeps the unit vectors of the zeros for the period, as the codes do."""
    grads = gradients((12, 5), 5)
    grads[at] = torch.zeros(12, 5, dtype=torch.float64)
    own: dict[str, Any] = {"selection": "svd", "density": 0.4} if key == "frugal" else {"rank": 2}
    for basis in ("svd", "svd-legacy"):
        path, opt, w = stepped(key, (12, 5), grads[: at + 2], period=3, basis=basis, **own)
        p = opt.state[w]["basis"]
        exact = SVDBasis(2).compute(grads[at + 1], "right", None, 0)
        waits = basis == "svd"
        assert torch.isfinite(path[-1]).all()
        assert torch.allclose((p.mT @ exact).abs(), torch.eye(2, dtype=p.dtype), atol=1e-9) is waits
        assert torch.equal(p.abs().sort(0).values, torch.eye(5, dtype=p.dtype)[:, :2].sort(0).values) is not waits
        assert opt.state[w]["refresh_failures"] == int(waits)


def test_legacy_svd_still_refuses_what_has_none() -> None:
    grads = gradients((12, 5), 3)
    grads[0] = torch.full((12, 5), torch.nan, dtype=torch.float64)
    _, opt, w = stepped("galore", (12, 5), grads[:1], rank=2, basis="svd-legacy")
    assert opt.state[w]["refresh_failures"] == 1
    assert torch.isfinite(opt.state[w]["basis"]).all()


# -- decay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "first"), [("adafactor", True), ("adam", False), ("lion", False)])
def test_decay_of_online_subspace_descent(rule: str, first: bool) -> None:
    """Its Adafactor decays before the update, its Adam and Lion after."""
    wd, w = 0.5, numbers("w", (12, 5))
    plain = stepped("online-subspace", (12, 5), rank=2, rule=rule)[0][0]
    decayed = stepped("online-subspace", (12, 5), rank=2, rule=rule, weight_decay=wd)[0][0]
    wanted = plain - LR * wd * (w if first else plain)
    assert (decayed - wanted).abs().max() < 1e-14


# -- compositions --------------------------------------------------------------------------------------------------


def test_rotation_of_bf16_moments_of_float64_leaves() -> None:
    path, _, _ = stepped("galore", (12, 5), rank=2, period=2, transfer="rotate", storage={"moment": "bf16"})
    exact, _, _ = stepped("galore", (12, 5), rank=2, period=2, transfer="rotate")
    assert 0.0 < (path[-1] - exact[-1]).abs().max() < 1e-3


def test_adaptive_calendars_need_matrices() -> None:
    for basis in ("columns", "dct"):
        with pytest.raises(InputError, match="adaptive calendar"):
            stepped("q-galore", (12, 5), rank=2, basis=basis, storage={})
