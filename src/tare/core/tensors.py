"""Small facts about tensors that several rooms need: fake or real, healthy or not, how to reduce to a Python number."""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tare.kernels import native_norms, plain_norms


def is_fake(tensor: Tensor) -> bool:
    """True for tensors without data (fake or meta): data-dependent branches must take the ordinary way."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return any(is_fake(part) for part in parts if isinstance(part, Tensor))  # a DTensor lists its mesh too
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def healthy(tensor: Tensor) -> bool:
    """Finite and not all zero: fit to compute a basis from. One device synchronisation; True for fake tensors."""
    if is_fake(tensor):
        return True
    if tensor.numel() == 0:
        return False
    # One pass without temporaries; NaN comes out at both ends.
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    return math.isfinite(low) and math.isfinite(high) and (low != 0.0 or high != 0.0)


def column_norms(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Euclidean norms over `dim`, kept as a broadcastable dimension. dtype: of sums and result, that of x if left out.

    Down the columns `vector_norm` is 4-6 times slower than along rows, hence the native kernel, or else its twin.
    """
    dtype = dtype or x.dtype
    if x.ndim == 3 and dim == -2 and x.device.type == "cpu":
        return torch.stack([column_norms(each, dim, dtype) for each in x])
    columns = dim in (0, -2)
    if x.ndim == 2 and dtype == torch.float32 and (columns or x.dtype != dtype):  # narrower ones are read as they are
        out = torch.empty(x.shape[1 if columns else 0], dtype=dtype, device=x.device)
        if native_norms.squares(x, "columns" if columns else "rows", out):
            return out.sqrt_().unsqueeze(dim)
    x = x if x.dtype == dtype else x.to(dtype)
    if x.ndim == 2 and columns:
        return plain_norms.squares(x, "columns").sqrt_().unsqueeze(0)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True)


def matrix_norms(x: Tensor) -> Tensor:
    """Frobenius norm of a matrix as a 0-d tensor, of each matrix of a batch [E, m, n] as [E, 1, 1]."""
    return whole_norm(x) if x.ndim < 3 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def whole_norm(x: Tensor) -> Tensor:
    """Frobenius norm as a 0-d tensor."""
    if x.is_contiguous():
        flat = x.reshape(-1)
        return torch.dot(flat, flat).sqrt_()
    return torch.linalg.vector_norm(x)
