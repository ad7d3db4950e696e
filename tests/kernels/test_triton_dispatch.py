"""When a Triton kernel takes a call: never by surprise, never on the CPU, and nothing breaks where Triton is missing."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tare.kernels import calls, device, native
from tare.kernels.triton import dispatch

installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_tensors_are_left_to_the_cpu():
    x = torch.ones(4, 4)
    assert not dispatch.wants(x)
    assert not device.write_(x, x, decay=1.0, alpha=1.0)
    assert not device.write_scaled_(x, x, torch.ones(()), decay=1.0, alpha=1.0)
    assert not device.lift_(x, x, x, decay=1.0, alpha=1.0)
    assert device.project(x, x, "left") is None
    assert torch.equal(x, torch.ones(4, 4))


def test_the_interpreter_is_asked_for_twice(monkeypatch):
    monkeypatch.setenv("TARE_TRITON", "interpret")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not dispatch.wants(torch.ones(1))


@installed
def test_what_a_kernel_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "wants", lambda x: True)
    fp32, x = (torch.float32,), torch.ones(8, 8)
    assert dispatch.takes(64, (x, fp32, None))
    assert not dispatch.takes(64, (x.mT[:, 1:], fp32, 56))
    assert not dispatch.takes(64, (x.half(), fp32, None))
    assert not dispatch.takes(64, (x, fp32, 63))
    assert not dispatch.takes(0, (torch.ones(0), fp32, None))
    assert not dispatch.takes(64, (torch._neg_view(x), fp32, None))
    with FakeTensorMode():
        assert not dispatch.takes(64, (torch.ones(8, 8), fp32, None))


def test_a_device_that_fails_its_trial_is_left_to_the_twins_and_the_reason_is_kept(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "_verdicts", {gpu: "no C compiler found"})
    assert not dispatch._trusted(gpu)
    if dispatch.present():
        assert dispatch.reason() == "plain torch kernels on cuda:0: no C compiler found"


def test_a_native_entry_point_without_a_counterpart_refuses_what_is_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "wants", lambda x: True)

    @calls.kernel
    def made_up(x: torch.Tensor) -> bool:
        raise AssertionError("the native kernel was given a tensor that is not on the CPU")

    assert not made_up(torch.ones(1))


def test_blocks_that_are_no_power_of_two_are_left_to_the_twin():
    assert dispatch.block_fits(256)
    assert not dispatch.block_fits(192)
    assert not dispatch.block_fits(8192)
    assert not dispatch.block_fits(0)


def test_noise_that_crosses_a_multiple_of_2_to_the_32_is_left_to_the_twin():
    assert dispatch.seed_of(1, (1 << 32) - 10, 10) is not None
    assert dispatch.seed_of(1, (1 << 32) - 10, 11) is None
    assert dispatch.seed_of(1, -1, 1) is None


def test_triton_is_not_imported_before_it_is_needed():
    code = (
        "import sys, tare, torch; from tare.core import write; from tare.kernels import native, device; x = torch.ones(16);"
        "device.write_(x, x, decay=1.0, alpha=1.0); print('triton' in sys.modules)"
    )
    assert python(code).strip() == "False"


def test_every_file_imports_without_triton_and_reason_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from importlib import util; found = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else found(name, *a)\n"
        "from tare.kernels.triton import dense, dispatch, eightbit, fourbit, products\n"
        "print(dispatch.present(), dispatch.reason())"
    )
    assert python(code).strip() == "False plain torch kernels on CUDA: triton is not installed"


@installed
def test_reason_names_the_version(monkeypatch):
    monkeypatch.delenv("TARE_TRITON", raising=False)
    assert dispatch.reason().startswith("Triton 3.")
    monkeypatch.setenv("TARE_TRITON", "0")
    assert dispatch.reason() == "plain torch kernels on CUDA: TARE_TRITON=0"


def test_native_kernels_still_take_cpu_tensors():
    if not native.available():
        pytest.skip(native.reason())
    x = torch.ones(32)
    assert native.write_stochastic_(x.bfloat16(), x, decay=1.0, alpha=1.0, key=1)
