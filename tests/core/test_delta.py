"""Deltas: W <- beta W - alpha U, written lazily, equals U made whole first; by rows equals all at once."""

import pytest
import torch
from torch import Tensor

from tare.core.delta import Delta, Dense, LowRank, Scaled, Sum, materialise
from tare.core.random import normal

M, N, R = 13, 9, 3


def x(number: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(number, shape).to(dtype)


def deltas(dtype: torch.dtype) -> dict[str, tuple[Delta, Tensor]]:
    """name -> (delta, U in float64)."""
    u, left, right = (x(k, *s, dtype=dtype) for k, s in ((1, (M, N)), (2, (M, R)), (3, (R, N))))
    row, column, whole = (x(k, *s, dtype=dtype) for k, s in ((4, (1, N)), (5, (M, 1)), (6, ())))
    d = torch.float64
    made: dict[str, tuple[Delta, Tensor]] = {
        "dense": (Dense(u, 0.5), 0.5 * u.to(d)),
        "low rank": (LowRank(left, right, -2.0), -2.0 * left.to(d) @ right.to(d)),
        "by column": (Scaled(u, row, 3.0), 3.0 * u.to(d) * row.to(d)),
        "by row": (Scaled(u, column, 3.0), 3.0 * u.to(d) * column.to(d)),
        "by one": (Scaled(u, whole), u.to(d) * whole.to(d)),
    }
    a, b = made["low rank"], made["by row"]
    made["sum"] = (Sum((a[0], b[0])), a[1] + b[1])
    return made


@pytest.mark.parametrize("name", deltas(torch.float64))
@pytest.mark.parametrize("beta", [1.0, 0.9])
def test_write_is_beta_w_minus_alpha_u(name: str, beta: float) -> None:
    delta, u = deltas(torch.float64)[name]
    w = x(9, M, N)
    wanted = beta * w - 0.1 * u
    delta.write(w, 0.1, beta)
    assert (w - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("name", deltas(torch.float64))
def test_rows_are_the_rows(name: str) -> None:
    delta, u = deltas(torch.float64)[name]
    assert (materialise(delta, (M, N)) - u).abs().max() < 1e-14
    pieces = torch.cat([delta.rows(start, min(start + 4, M)) for start in range(0, M, 4)])
    assert (pieces - u).abs().max() < 1e-14


@pytest.mark.parametrize("name", deltas(torch.float64))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_take_fp32_deltas(name: str, dtype: torch.dtype) -> None:
    """At most two roundings of the weight, and factors rounded to 16 bits for the low-rank product."""
    delta, u = deltas(torch.float32)[name]
    w = x(9, M, N).to(dtype)
    wanted = 0.9 * w.double() - 0.01 * u
    delta.write(w, 0.01, 0.9)
    assert w.dtype == dtype
    eps = torch.finfo(dtype).eps
    parts = 2 if name == "sum" else 1
    assert ((w.double() - wanted).abs() <= parts * eps * (1.5 * wanted.abs() + 0.01 * u.abs() + 0.2)).all()


@pytest.mark.parametrize("name", deltas(torch.float64))
def test_transposed_weights(name: str) -> None:
    delta, u = deltas(torch.float64)[name]
    w = x(9, N, M).t()
    wanted = 0.9 * w - 0.1 * u
    delta.write(w, 0.1, 0.9)
    assert (w - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("name", [n for n in deltas(torch.float64) if n not in ("dense", "sum")])
def test_lazy_writes_allocate_no_matrix(name: str) -> None:
    """Except one of the kinds that hold a full U anyway: the peak of a write stays below the size of W."""
    from torch.profiler import ProfilerActivity, profile

    big = 1024
    kinds: dict[str, Delta] = {
        "low rank": LowRank(torch.ones(big, 4), torch.ones(4, big)),
        "by column": Scaled(torch.ones(big, big), torch.ones(1, big)),
        "by row": Scaled(torch.ones(big, big), torch.ones(big, 1)),
        "by one": Scaled(torch.ones(big, big), torch.ones(())),
    }
    w = torch.ones(big, big)
    kinds[name].write(w, 0.1, 0.9)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as window:
        kinds[name].write(w, 0.1, 0.9)
    used = sum(max(0, event.self_cpu_memory_usage) for event in window.events())
    assert used < 4 * big * big // 8


def test_a_scalar_delta_has_rows() -> None:
    assert materialise(Dense(torch.tensor(3.0), 0.5), ()).item() == 1.5


def test_uncorrected_takes_the_bias_correction_out() -> None:
    assert Dense(torch.ones(2), scale=-0.25, correction=0.25).uncorrected == -1.0
