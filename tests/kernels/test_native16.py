"""One-pass AdamW on 16-bit weights and moments: equal to the twin, element by element, and unbiased where it rounds at random."""

import itertools

import pytest
import torch

from tare.kernels import native16, plain, split24

pytestmark = pytest.mark.usefixtures("compiler")
RATES = {"beta1": 0.9, "beta2": 0.99, "decay": 0.999, "alpha": 0.01, "eps": 1e-8}
FLOATS = (torch.float32, torch.bfloat16)


def tensors(n: int, weight: torch.dtype, moment: torch.dtype, split: bool) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    low = [torch.zeros(n, dtype=torch.int8)] if split else []
    return [torch.randn(n, generator=g).to(weight), *(torch.zeros(n, dtype=moment) for _ in range(2)), *low]


@pytest.mark.parametrize("n", [1, 5, 601, 40_003])
@pytest.mark.parametrize("ascend", [False, True])
@pytest.mark.parametrize(
    ("weight", "moment", "grad", "split"),
    [x for x in itertools.product(FLOATS, FLOATS, FLOATS, (False, True)) if not (x[3] and x[0] == torch.float32)],
)
def test_it_is_the_twin(n, ascend, weight, moment, grad, split):
    ours, theirs = tensors(n, weight, moment, split), tensors(n, weight, moment, split)
    options = {**RATES, "key": 7, "keys": (8, 9), "start": (1 << 20) + 3, "ascend": ascend}
    for step in range(3):
        g = torch.randn(n, generator=torch.Generator().manual_seed(100 + step)).to(grad)
        assert native16.adamw16_(ours[0], g, *ours[1:], **options)
        plain.adamw16_(theirs[0], g, *theirs[1:], **options)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])
    mine, other = (split24.join(x[0], x[3]) if split else x[0].float() for x in (ours, theirs))
    # the twin's square root may differ in its last bit (torch's is not correctly rounded), which may decide one rounding
    relative = {False: 2**-7, True: 2**-15}[split] if weight == torch.bfloat16 else 2e-6
    # near zero: the rounding was of the larger weight of a step before
    torch.testing.assert_close(mine, other, rtol=relative, atol=2e-6)
    assert (mine != other).float().mean() < 0.1


def test_not_a_number_and_zero_pass():
    ours = tensors(20, torch.bfloat16, torch.float32, split=True)
    g = torch.zeros(20)
    g[3] = torch.nan
    start = ours[0].clone()
    assert native16.adamw16_(ours[0], g, *ours[1:], **{**RATES, "decay": 1.0})
    assert ours[0].isnan().nonzero().tolist() == [[3]]
    keep = torch.arange(20) != 3
    assert torch.equal(ours[0][keep], start[keep])


def test_rounding_of_weight_and_moments_is_unbiased():
    """Means over 2^14 equal elements, at four standard deviations of a two-point variable."""
    n = 1 << 14
    w, m, v = (torch.full((n,), x, dtype=torch.bfloat16) for x in (1.0, 0.5, 0.25))
    g = torch.full((n,), 0.3)
    assert native16.adamw16_(w, g, m, v, **RATES, key=1, keys=(2, 3))
    exact_m = 0.5 * 0.9 + 0.3 * 0.1
    exact_v = 0.25 * 0.99 + 0.3**2 * 0.01
    exact_w = 0.999 - 0.01 * exact_m / exact_v**0.5
    for got, exact in ((w, exact_w), (m, exact_m), (v, exact_v)):
        values = got.double().unique()
        assert len(values) == 2
        low, high = values.tolist()
        share = (exact - low) / (high - low)
        sigma = (high - low) * (share * (1 - share) / n) ** 0.5
        # fp32 arithmetic before the rounding: 2^-22 relative
        assert abs(got.double().mean().item() - exact) < 4 * sigma + abs(exact) * 2**-22


def test_what_it_cannot_take_it_leaves():
    w, m, v = tensors(8, torch.bfloat16, torch.float32, split=False)
    g = torch.ones(8)
    before = w.clone()
    assert not native16.adamw16_(w, g, m, v.bfloat16(), **RATES)
    assert not native16.adamw16_(w, g.double(), m, v, **RATES)
    assert not native16.adamw16_(w.float(), g, m, v, torch.zeros(8, dtype=torch.int8), **RATES)
    assert not native16.adamw16_(w, g, m, v, **RATES, key=1, start=(1 << 32) - 4)
    assert torch.equal(w, before)
