"""A workload on a model that was changed before it is trained: layers in few bits, an adapter, leaves that are frozen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tare.plan.activations import Tokens, Workload


class Altered(Workload):
    """The same batches; other layers.

    Args:
        work: what the model is fed; None: packed text, `batch` sequences of `seq` tokens.
        change: changes a model in place, or returns another.
        said: all that decides what it changes, as JSON values.
    """

    def __init__(
        self, work: Workload | None, batch: int, seq: int, change: Callable[[nn.Module], nn.Module | None], said: Any
    ) -> None:
        self.inner, self.batch, self.seq, self.change, self.said = work, batch, seq, change, said
        if work is not None:
            self.kind = work.kind

    def key(self) -> Any:
        inner = ["tokens", self.batch, self.seq] if self.inner is None else self.inner.key()
        return [inner, self.said]

    def layers(self) -> Any:
        return self.said

    def adapt(self, config: Any) -> Any:
        return config if self.inner is None else self.inner.adapt(config)

    def alter(self, model: nn.Module) -> nn.Module | None:
        return self.change(model)

    def batches(self) -> tuple[Any, Any]:
        return self._fed().batches()

    def tensors(self, some: Any) -> list[Tensor]:
        return self._fed().tensors(some)

    def loss(self, model: nn.Module, some: Any) -> Tensor:
        return self._fed().loss(model, some)

    def look(self, model: nn.Module, some: Any) -> Tensor:
        return self._fed().look(model, some)

    def _fed(self) -> Workload:
        return self.inner or Tokens(torch.zeros(self.batch, self.seq, dtype=torch.long))
