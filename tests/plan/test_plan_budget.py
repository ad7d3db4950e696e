"""Amounts of memory: what people write, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.core.errors import InputError
from tare.plan.budget import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("8G", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 gib", 3 * 2**29),
        (" 100 KB ", 100_000),
        ("1T", 2**40),
    ],
)
def test_amounts(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["8", "8.5", "-1", "-1GiB", "0", "0GiB", "", "GiB", "8 bytes", "8Q", "nanG", "1e3G", "8GiBB", "٣GiB x"]
)
def test_refused_in_one_line_that_shows_the_allowed_forms(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_bytes(text)
    message = str(error.value)
    assert "\n" not in message
    assert repr(text) in message
    assert "24GiB" in message
    assert "24GB" in message


@given(st.integers(1, 2**60))
def test_formatted_amounts_stay_within_a_hundredth(count: int) -> None:
    number, unit = format_bytes(count).split()
    exact = count if unit == "B" else parse_bytes(f"{number}{unit}")
    assert exact == pytest.approx(count, rel=0.01)
