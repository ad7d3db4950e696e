"""How the native kernels are built, tested, cached and done without."""

import ctypes
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tare.kernels import blockwise, build, library, native


@pytest.fixture
def unloaded(compiler, monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.delenv("TARE_NATIVE", raising=False)
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_reason", None)
    monkeypatch.setattr(library, "_library", None)
    return tmp_path / "cache" / "native"


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("TARE_NATIVE", "0")
    monkeypatch.setattr(build, "library", lambda *a: pytest.fail("compiled"))
    assert not native.available()
    assert native.reason() == "plain torch kernels: TARE_NATIVE=0"
    codes, absmax = blockwise.encode(torch.zeros(300), True)
    assert native.encode_into(torch.ones(300), codes, absmax, True) is False
    assert absmax.tolist() == [0, 0]


def test_it_loads_under_fake_tensors_and_grad(unloaded):
    with FakeTensorMode():
        assert native.available(), native.reason()


def test_no_compiler_is_a_reason_and_not_an_error(unloaded, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not native.available()
    assert native.reason() == "plain torch kernels: no C++ compiler found (looked for no-such-compiler)"
    monkeypatch.setattr(library, "_reason", None)
    monkeypatch.setenv("CXX", "false")
    assert not native.available()
    assert native.reason().startswith("plain torch kernels: false failed")


def test_a_damaged_cache_is_built_again_and_a_blocked_one_is_done_without(unloaded, monkeypatch, tmp_path):
    assert native.available(), native.reason()
    (file,) = unloaded.glob("*.so")
    # another folder: the loader would hand out again what it has loaded under this name
    damaged = tmp_path / "other" / "native" / file.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not a library")
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(library, "_reason", None)
    assert native.available(), native.reason()
    assert damaged.stat().st_size > 1000
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TARE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(library, "_reason", None)
    assert native.available(), native.reason()


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("q = 0.25f", "q = 0.10f", "codes differ"),
        ("0x846CA68Bu", "0x846CA68Du", "steps differ"),
        ("s.beta1 + gi * s.rest1;\n            F v", "s.beta1 + gi * s.rest2;\n            F v", "fp32 steps differ"),
        ('#include "light.hpp"', '#define sqrt\n#include "light.hpp"', "light steps differ"),
        ("void tare_write", "void tare_wrote", "lacks"),
    ],
)
def test_a_library_that_differs_from_the_twins_is_rejected(unloaded, monkeypatch, tmp_path, right, wrong, message):
    text = library.SOURCE.read_text()
    assert text.count(right) == 1
    broken = tmp_path / "native.cpp"
    broken.write_text(text.replace(right, wrong))
    monkeypatch.setattr(build, "CHOICES", (("-march=native",),))
    with pytest.raises(build.Unavailable, match=message):
        build.library(broken, library.accept)
    assert not list(unloaded.iterdir())  # what failed is not kept


@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma"), ("-mavx2",)], ids=lambda x: " ".join(x) or "baseline")
def test_builds_for_smaller_cpus_pass_the_same_test(unloaded, monkeypatch, flags):
    if flags and "avx2" not in build.cpu_description():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(build, "CHOICES", (flags,))
    built = build.library(library.SOURCE, library.accept)
    assert isinstance(built, ctypes.CDLL)
    assert built.tare_lanes() == (8 if flags else 4)


def test_two_processes_may_build_at_the_same_time(unloaded):
    code = "from tare.kernels import native; assert native.available(), native.reason(); print(native.reason())"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert "C++ kernels in use" in out
    assert len(list(unloaded.iterdir())) == 1  # one library, no left-over of a build
