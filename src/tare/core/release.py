"""Release: stepping a leaf inside backward, as soon as its gradient is whole, and freeing the gradient at once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Release:
    """The hooks of one optimizer, and what it has gathered between micro-batches.

    Back-projecting methods sum the *projected* gradient ([r, n] instead of [m, n]), which is exact while the basis stays.
    """

    def __init__(self, step: Callable[[Tensor], None]):
        self._step = step
        self._handles: list[Any] = []
        self._parts: dict[Tensor, Tensor] = {}
        self.accumulating = False

    def attach(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(self._step))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def add(self, p: Tensor, part: Tensor) -> None:
        if p in self._parts:
            self._parts[p].add_(part)
        else:
            self._parts[p] = part

    def take(self, p: Tensor) -> Tensor | None:
        return self._parts.pop(p, None)

    def clear(self) -> None:
        """Forget what was gathered: the step it belonged to is dropped."""
        self._parts.clear()

    def waiting(self) -> list[Tensor]:
        """Leaves whose gathered gradients no backward has stepped."""
        return list(self._parts)

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.accumulating = self.accumulating, True
        try:
            yield
        finally:
            self.accumulating = before
