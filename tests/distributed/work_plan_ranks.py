"""What the ranks do for `test_plan_measured`: real steps of real models, measured."""

import statistics
from typing import Any

import torch
from torch import distributed as dist

from tare.core.shard.layout import local
from tare.parallel.group import Crew
from tare.parallel.wrap import replicate, shard
from tare.plan.activations import autocast, causal_loss
from tare.plan.measure import StepMeter
from tare.plan.models import build_model, config_for, enable_checkpointing
from tare.plan.resolve import resolve

UNEVEN = {"hidden_size": 96, "intermediate_size": 261, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 4, "vocab_size": 301, "max_position_embeddings": 128}  # fmt: skip


def config_of(name: str) -> Any:
    """A named model, or one whose rows divide by no number of ranks."""
    config = config_for("llama-tiny" if name == "uneven" else name)
    for field, value in UNEVEN.items() if name == "uneven" else ():
        setattr(config, field, value)
    return config


def measured(
    rank: int, size: int, name: str, key: str, parallel: str, batch: int, seq: int, steps: int = 4, precision: str = "fp32",
    checkpointing: bool = False, hyper: dict[str, Any] | None = None, accumulate: int = 1, shards: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes of this rank's state, and its usual and its highest peak over some steps after the first, which makes tables and buckets.

    The usual one is the median: gloo's threads let go of what they have sent when they come to it, on a busy machine late.
    batch: of all ranks.
    """
    model = build_model(config_of(name), dtype="bf16" if precision == "bf16" else "fp32").train()
    if checkpointing:
        enable_checkpointing(model)
    crew = Crew(rank, size)
    choice = resolve(key, name, dtype="bf16" if precision == "bf16" else "fp32", hyper=hyper)
    if parallel == "ddp":
        spread = replicate(model)
        optimizer = choice.build(model)
    else:
        spread = shard(model, crew, torch.device("cpu"), shards=shards)
        optimizer = choice.build(model)
    tokens = torch.randint(0, 300, (batch // size, seq), generator=torch.Generator().manual_seed(rank))
    peaks = []
    for _ in range(steps):
        with StepMeter(model, optimizer, extra=[tokens]) as meter:
            optimizer.zero_grad()  # DDP's buckets are seen as the gradients of the step before
            for number in range(accumulate):
                spread.micro_batch(number == accumulate - 1)
                with autocast(precision):  # type: ignore[arg-type]
                    loss = causal_loss(spread.module, tokens)
                loss.backward()
                del loss
            optimizer.step()
        peaks.append(meter.peak)
        if parallel != "ddp":
            optimizer.zero_grad()
    kept = [local(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    found = {
        "state": sum(v.numel() * v.element_size() for v in kept),
        "peak": int(statistics.median(peaks[1:])),
        "most": max(peaks),
    }
    spread.close()
    del model, optimizer, spread, meter
    dist.barrier()
    return found
