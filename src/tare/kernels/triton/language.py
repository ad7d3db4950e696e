"""Triton where it is installed; else a stand-in with which the kernels' files still import, though nothing in them can run."""

from typing import Any

__all__ = ["tl", "triton"]


class _Absent:
    """Stands for any name of Triton; as a decorator it gives the function back."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else self


try:
    import triton as _triton
    import triton.language as _language

    triton: Any = _triton
    tl: Any = _language
except ImportError:
    triton = tl = _Absent()
