"""What a training step needs besides the optimizer: activations, gradients and temporaries, event by event.

One forward, loss and backward of the real model runs on fake tensors (shapes without storage) under the tracker. All
layers run: a LLaMA-7B takes about two seconds, so nothing is extrapolated and any architecture is exact.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tare.core.errors import InputError
from tare.core.weights import quantize_weights_
from tare.plan.cache import cached
from tare.plan.kinds import Kind
from tare.plan.models import DTYPES, build_skeleton, enable_checkpointing, full, identity, plannable, positions
from tare.plan.profile import LeafMoment, Moment, StepProfile, decode
from tare.plan.shapes import ModelShape
from tare.plan.stretches import Stretches
from tare.plan.tracker import MemoryTracker, Peak

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Precision = Literal["fp32", "bf16-autocast", "bf16"]


class Workload:
    """What a run feeds its model where that is not packed text: other batches, another loss, another kind of model."""

    kind: Kind = "causal"

    def key(self) -> Any:
        """All that decides about memory, as JSON values."""
        raise NotImplementedError

    def adapt(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """The config of the model that is run."""
        return config

    def alter(self, model: nn.Module) -> nn.Module | None:
        """What is changed about the model before it is trained: in place, or another that it returns."""
        return None

    def layers(self) -> Any:
        """All that decides what `alter` does, as JSON values; None where it does nothing."""
        return None

    def batches(self) -> tuple[Any, Any]:
        """The widest batches of training and of evaluation, with zeros in them; made under fake tensors."""
        raise NotImplementedError

    def tensors(self, batch: Any) -> list[torch.Tensor]:
        """Those of a batch."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss of a training batch."""
        raise NotImplementedError

    def look(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """What an evaluation computes of a batch."""
        raise NotImplementedError


class Tokens(Workload):
    """Packed text: the usual workload. tokens [b, t]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def batches(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens, self.tokens

    def tensors(self, batch: torch.Tensor) -> list[torch.Tensor]:
        return [batch]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return causal_loss(model, batch)

    look = loss


def profile_model(
    model: "str | Path | PretrainedConfig | ModelShape",
    batch: int,
    seq: int,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    precision: Precision | None = None,
    checkpointing: bool = False,
    quantized: bool = False,
    trained: tuple[str, ...] | None = None,
    work: Workload | None = None,
) -> StepProfile:
    """The memory of a forward, loss and backward with `batch` sequences of `seq` tokens, from disk if known.

    Args:
        model: a name, folder or file as for `config_for`, or a config.
        batch: sequences per micro-batch.
        seq: tokens per sequence, at most the positions of the model.
        dtype: of the weights.
        precision: of the arithmetic; default: the dtype of the weights.
        checkpointing: activations of each layer recomputed in backward.
        quantized: linear weights are int8 (`Storage(weight="int8")`): decoded for the length of each product.
        trained: names of the parameters that get gradients; None: all.
        work: what the model is fed; None: packed text.

    Raises:
        InputError: a bad model, batch or sequence length, or a combination that makes no sense.
    """
    config = plannable(model) if isinstance(model, (str, Path)) else model
    precision = precision or dtype
    check_step(config, batch, seq, dtype, precision)
    what = {
        "kind": "step",
        "config": identity(config),
        "batch": batch,
        "seq": seq,
        "dtype": dtype,
        "precision": precision,
        "checkpointing": checkpointing,
        "quantized": quantized,
    }
    if trained is not None:
        what["trained"] = sorted(trained)
    if work is not None:
        what["work"] = work.key()
    return cached(
        what,
        lambda: _run(full(config), batch, seq, DTYPES[dtype], precision, checkpointing, quantized, trained, work),
        dataclasses.asdict,
        decode,
    )


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[Any]:
    """The context in which forward and loss of a step run."""
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16-autocast" else nullcontext()


def causal_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of `tokens` [b, t]. Logits are let go: backward needs only their log-softmax."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have shapes, dtypes and sizes but no bytes."""
    from tare.plan.quick import QuickFakeMode

    with QuickFakeMode(), _no_packing():
        yield


@contextmanager
def _no_packing() -> Iterator[None]:
    """transformers looks into position ids for packed sequences; fake ids have no values, so it would assume the worst
    and build a full [b, 1, t, t] mask and a copy per layer that no real run has."""
    from unittest.mock import patch

    from transformers import masking_utils

    if hasattr(masking_utils, "find_packed_sequence_indices"):
        with patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None):
            yield
    else:
        yield


def _run(
    config: "PretrainedConfig",
    batch: int,
    seq: int,
    dtype: torch.dtype,
    precision: Precision,
    checkpointing: bool,
    quantized: bool = False,
    trained: tuple[str, ...] | None = None,
    work: Workload | None = None,
) -> StepProfile:
    with fake_tensors():
        model = skeleton(config, dtype, work).train()
        if quantized:
            quantize_weights_(model)
        if trained is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
        if checkpointing:
            enable_checkpointing(model)
        return track_step(model, work or Tokens(torch.zeros(batch, seq, dtype=torch.long)), precision)


def skeleton(config: "PretrainedConfig", dtype: torch.dtype, work: Workload | None) -> nn.Module:
    """The model that a workload is for, without storage."""
    if work is None:
        return build_skeleton(config, dtype)
    model = build_skeleton(work.adapt(config), dtype, work.kind)
    altered = work.alter(model)
    return model if altered is None else altered


def opened(model: nn.Module, work: Workload) -> tuple[MemoryTracker, Any, Any, int]:
    """A tracker that knows the tensors of a model and of its widest batch; that batch, the one of evaluation, and the bytes of weights
    and buffers."""
    batch, held = work.batches()
    tracker = MemoryTracker()
    tracker.mark(model.parameters(), "parameter")
    tracker.mark(model.buffers(), "parameter")
    weights = tracker.total
    tracker.mark(work.tensors(batch), "input")
    return tracker, batch, held, weights


def track_step(model: nn.Module, work: Workload | torch.Tensor, precision: Precision = "fp32") -> StepProfile:
    """Track one evaluation and one training micro-batch of `model`; works on fake and on real tensors. work: or tokens [b, t]."""
    work = Tokens(work) if isinstance(work, torch.Tensor) else work
    tracker, batch, held, weights = opened(model, work)
    leaves: list[LeafMoment] = []
    hooks = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(_finished(tracker, name, leaves)))
    stretches = Stretches(model, tracker)
    with tracker, stretches:
        with (
            tracker.phase("evaluation", born="activation"),
            stretches.phase("evaluation"),
            torch.no_grad(),
            autocast(precision),
        ):
            work.look(model, held)
        with tracker.phase("forward", born="activation"), stretches.phase("forward"), autocast(precision):
            loss = work.loss(model, batch)
        with tracker.phase("backward"), stretches.phase("backward"):
            loss.backward()
    for hook in hooks:
        hook.remove()
    return StepProfile(
        weights=weights,
        gradients=tracker.current["gradient"],
        forward=Moment.of(tracker.peak("forward")),
        backward=Moment.of(tracker.peak("backward")),
        released=dataclasses.replace(Moment.of(tracker.peak("backward", without_gradients=True)), gradients=0),
        evaluation=Moment.of(tracker.peak("evaluation")),
        leaves=tuple(leaves),
        stretches=tuple(stretches.found),
    )


def _finished(tracker: MemoryTracker, name: str, leaves: list[LeafMoment]):  # type: ignore[no-untyped-def]
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        now = Moment.of(Peak(0, tracker.current))
        size = parameter.grad.untyped_storage().nbytes()
        leaves.append(LeafMoment(name, dataclasses.replace(now, gradients=0), size))
        tracker.mark([parameter.grad], "gradient")

    return hook


def check_step(config: "PretrainedConfig | ModelShape", batch: int, seq: int, dtype: str, precision: str) -> None:
    """Raise InputError for a batch, a length or a precision that no step of the model can have."""
    for name, value in (("batch", batch), ("seq", seq)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} {value!r} must be a whole number of at least 1")
    longest = positions(config)
    if longest is not None and seq > longest:
        raise InputError(f"seq {seq} is longer than the {longest} positions of the model: use --seq {longest} or less")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
    if precision not in ("fp32", "bf16-autocast", "bf16"):
        raise InputError(f"precision {precision!r} is not known: use one of fp32, bf16-autocast, bf16")
    if (dtype == "bf16") != (precision == "bf16"):
        raise InputError(f"precision {precision!r} does not go with {dtype} weights: bf16 weights compute in bf16")
