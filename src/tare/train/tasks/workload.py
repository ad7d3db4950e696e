"""What the planner is told of a task: the shapes of its widest batches, and how they are run."""

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tare.plan.activations import Workload
from tare.plan.models import with_labels
from tare.train.tasks.data import TaskData
from tare.train.tasks.scoring import Batch, loss_of, scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TaskWork(Workload):
    """The batches of a task with the most tokens. Args: task; batch: examples in a micro-batch."""

    def __init__(self, task: TaskData, batch: int) -> None:
        self.kind, self.outputs = task.kind, task.outputs
        self.pad = task.tokenizer.pad_token_id
        self.widest = task.widest(batch)

    def key(self) -> Any:
        shapes = [[list(tensor.shape) for tensor in batch.tensors()] for batch in self.widest]
        return [self.kind, self.outputs, shapes, [batch.only_gold for batch in self.widest]]

    def adapt(self, config: "PretrainedConfig") -> "PretrainedConfig":
        changed = copy.deepcopy(with_labels(config, self.outputs))
        if getattr(changed, "pad_token_id", None) is None:
            changed.pad_token_id = self.pad
        return changed

    def batches(self) -> tuple[Batch, Batch]:
        first, second = self.widest
        return first.blank(), second.blank()

    def tensors(self, batch: Batch) -> list[Tensor]:
        return batch.tensors()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(scores(model, self.kind, batch), batch)

    def look(self, model: nn.Module, batch: Batch) -> Tensor:
        return scores(model, self.kind, batch)
