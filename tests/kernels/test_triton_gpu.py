"""The same cases on a device. Skipped without one: there the kernels are interpreted and compiled, but not run."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run with -m gpu where there is one"),
]

if torch.cuda.is_available():
    from triton_cases import *  # noqa: F403
else:

    def test_triton_kernels_on_a_device():
        """Stands for the cases of triton_cases.py, so that a run without a device counts what it left out."""
