"""What else decides the bits of a run: the process-wide random generators, and the arithmetic that this process chose.

Dropout and whatever else a model draws use these generators; `tare`'s own randomness does not (see `core.random`).
"""

import random
from typing import Any

import numpy as np
import torch

from tare.kernels import gemm


def seed_everything(seed: int, part: int = 0) -> None:
    """Seed Python, NumPy and torch: dropout and whatever else a model draws. part: of the data; each draws apart."""
    seed = (seed + part * 0x9E3779B97F4A7C15) % 2**63
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (CPU and every CUDA device in use), as plain lists."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back; with fewer or more CUDA devices than then, those that exist in both."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if torch.cuda.is_available():
        for index, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(torch.tensor(saved, dtype=torch.uint8), index)


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What may differ between two processes and then changes the last bits: library, versions, device."""
    return {"torch": str(torch.__version__), "device": str(device), "fast_matmul": gemm.decided()}


def restore_arithmetic(saved: dict[str, Any], device: torch.device) -> list[str]:
    """Choose again what the saved run chose, where this process may; one line for each thing that differs.

    Which matrix library our products use is settled by a timing in each process, so chance could settle it otherwise.
    """
    if "fast_matmul" in saved:
        gemm.pin(bool(saved["fast_matmul"]))
    own = arithmetic(device)
    differs = [name for name in own if name in saved and saved[name] != own[name]]
    return [f"{name} was {saved[name]} and is now {own[name]}: results may differ in the last bits" for name in differs]
