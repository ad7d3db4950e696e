"""The probe for the matrix library: what it keeps, what it rejects, and that it leaves no trace."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tare.kernels import gemm


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("TARE_GEMM", raising=False)
    monkeypatch.setattr(gemm, "_fast", None)
    monkeypatch.setattr(gemm, "_line", "")
    before = torch.get_float32_matmul_precision()
    yield
    assert torch.get_float32_matmul_precision() == before


def clock(monkeypatch, ratio):
    """Products take as long as we say, and are computed in fp32 whatever the setting."""

    def fake_time(product):
        return 1.0 if torch.get_float32_matmul_precision() == "medium" else ratio

    monkeypatch.setattr(gemm, "_time", fake_time)
    monkeypatch.setattr(gemm, "ERROR", 1.0)


def test_a_faster_and_accurate_library_is_kept_and_scoped(monkeypatch):
    clock(monkeypatch, 1.9)
    with gemm.fast_matmul():
        assert torch.get_float32_matmul_precision() == "medium"
        with gemm.fast_matmul():
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    assert "1.90" in gemm.describe()


def test_the_setting_is_restored_after_an_exception(monkeypatch):
    clock(monkeypatch, 1.9)
    with pytest.raises(KeyError), gemm.fast_matmul():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_library_that_is_hardly_faster_is_not_kept(monkeypatch):
    clock(monkeypatch, 1.1)
    with gemm.fast_matmul():
        assert torch.get_float32_matmul_precision() == "highest"
    assert "1.10" in gemm.describe()


def test_a_fast_library_with_bf16_errors_is_not_kept(monkeypatch):
    monkeypatch.setattr(gemm, "ERROR", 0.0)  # no library is exact
    monkeypatch.setattr(gemm, "_time", lambda product: pytest.fail("timed although already rejected"))
    assert not gemm._decide()
    assert "relative error" in gemm.describe()


def test_the_real_probe_keeps_fp32_accuracy():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 200, generator=generator), torch.randn(200, 100, generator=generator)
    with gemm.fast_matmul():
        found = a @ b
    exact = a.double() @ b.double()
    assert float((found.double() - exact).norm() / exact.norm()) < gemm.ERROR


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("TARE_GEMM", "plain")
    monkeypatch.setattr(gemm, "_probe", lambda: pytest.fail("probed"))
    with gemm.fast_matmul():
        pass
    assert "TARE_GEMM=plain" in gemm.describe()


def test_fake_tensors_do_not_decide_anything(monkeypatch):
    monkeypatch.setattr(gemm, "_probe", lambda: pytest.fail("probed"))
    with FakeTensorMode(), gemm.fast_matmul():
        assert (torch.empty(3, 4) @ torch.empty(4, 2)).shape == (3, 2)
    assert gemm._fast is None


def test_a_probe_that_fails_leaves_the_default_and_says_why(monkeypatch):
    def broken():
        raise RuntimeError("mixed settings\nsecond line")

    monkeypatch.setattr(gemm, "_probe", broken)
    with gemm.fast_matmul():
        assert torch.get_float32_matmul_precision() == "highest"
    assert gemm.describe().endswith("(mixed settings)")


def test_it_is_probed_once_and_not_at_import(monkeypatch):
    calls = []
    monkeypatch.setattr(gemm, "_probe", lambda: (calls.append(1), (False, "line"))[1])
    for _ in range(3):
        with gemm.fast_matmul():
            pass
    assert calls == [1]
    code = "from tare.kernels import gemm, library, native; assert gemm._fast is None and library._reason is None"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
