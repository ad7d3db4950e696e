"""The Triton kernels compiled for GPUs that are not there: that they compile, spill nothing, and fuse no product with a sum."""

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed on this platform", allow_module_level=True)

import triton_ahead
from triton_ahead import Compiled, compiling

from tare.kernels import blockwise, fourbit
from tare.kernels.triton import dense, eightbit, products
from tare.kernels.triton import fourbit as fourbit_kernels

FP32, BF16 = torch.float32, torch.bfloat16
RATES = {"beta1": 0.9, "beta2": 0.95, "decay": 0.99, "alpha": 0.02}
N = 1 << 14


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def flat(dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.zeros(N, dtype=dtype)


def states(codec, *signs: bool) -> list[torch.Tensor]:
    return [x for signed in signs for x in codec.encode(torch.zeros(N), signed)]


def adamw8(dtype, key):
    return eightbit.adamw8bit_(flat(dtype), flat(dtype), *states(blockwise, True, False), **RATES, eps=1e-8, key=key)


def adamw4(dtype, key):
    moments = states(fourbit, True, False)
    return fourbit_kernels.adamw4bit_(flat(dtype), flat(dtype), *moments, **RATES, eps=1e-8, key=key)


def lion8(dtype, key):
    return eightbit.lion8bit_(flat(dtype), flat(dtype), *states(blockwise, True), **RATES, key=key)


def adamw16(dtype, key):
    keys = None if key is None else (1, 2)
    return dense.adamw16_(flat(dtype), flat(dtype), flat(dtype), flat(dtype), **RATES, eps=1e-8, key=key, keys=keys)


def split(dtype, key):
    return dense.write_split_(flat(BF16), flat(torch.int8), flat(), decay=1.0, alpha=0.1)


def scaled(dtype, key):
    w = flat(dtype).view(128, 128)
    return dense.write_scaled_(w, w.clone(), torch.zeros(128, 1), decay=1.0, alpha=0.1, key=key)


def lift(dtype, key):
    left = torch.zeros(512, 128, dtype=dtype)
    return products.lift_(torch.zeros(512, 512, dtype=dtype), left, left.mT, decay=1.0, alpha=0.1, key=key)


def project(dtype, key):
    side = "left" if key is None else "right"
    return products.project(torch.zeros(512, 512, dtype=dtype), torch.zeros(512, 128, dtype=dtype), side) is not None


EXACT = [(adamw8, BF16, 3), (adamw8, FP32, None), (adamw4, BF16, 3), (lion8, BF16, None), (adamw16, BF16, 3)]
EXACT += [(split, BF16, None), (scaled, BF16, 3)]
PRODUCTS = [(lift, BF16, 3), (lift, FP32, None), (project, BF16, None), (project, FP32, 3)]


def built(call, dtype, key, capability: int) -> Compiled:
    with compiling(capability) as done:
        assert call(dtype, key)
    assert len(done) == 1
    return done[0]


@pytest.mark.parametrize(("call", "dtype", "key"), EXACT)
def test_compiles_without_fusing_products_and_sums(call, dtype, key):
    kernel = built(call, dtype, key, 90)
    fused = len(re.findall(r"\bfma\.", kernel.ptx))
    # eight elements a thread; the estimate of an 8-bit code takes seven lines, which a comparison corrects afterwards
    lines = {adamw8: 2 * 7 * 8, lion8: 7 * 8}.get(call, 0)
    assert fused == lines
    assert not any(x.startswith(("LDL", "STL")) for x in kernel.instructions())


@pytest.mark.parametrize(("call", "dtype", "key"), PRODUCTS)
@pytest.mark.parametrize("capability", [80, 90])
def test_products_compile_to_tensor_cores_and_fit_shared_memory(call, dtype, key, capability):
    kernel = built(call, dtype, key, capability)
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async)", kernel.ptx)
    assert kernel.shared <= 99 * 1024  # what a consumer card gives one program; data-centre cards give more
    assert not any(x.startswith(("LDL", "STL")) for x in kernel.instructions())


def test_a_changed_learning_rate_or_key_is_no_new_kernel():
    with compiling() as done:
        for key, alpha in ((3, 0.1), (16, 0.2), (1 << 63, 1.0)):
            assert dense.write_stochastic_(flat(BF16), flat(), decay=1.0 - alpha, alpha=alpha, key=key)
    assert len({x.ptx for x in done}) == 1
    assert triton_ahead.Compiled is Compiled
