"""transformers' Trainer: `optimizers=` and `optimizer_cls_and_kwargs`, 8-bit state, release mode with gradient accumulation, resumed.

pip install accelerate; python examples/hf_trainer.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import tare
from tare.parallel.frameworks import follow_accelerate

GALORE = {"lr": 5e-3, "rank": 8, "period": 3, "storage": {"moment": "int8", "min_quantized": 256}}


def model() -> LlamaForCausalLM:
    """A LLaMA of 60 thousand fresh weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, max_position_embeddings=32))


def data(count: int = 64) -> list[dict[str, Any]]:
    """Sequences that count upwards."""
    rows = [(torch.arange(16) + start) % 64 for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


class Stop(TrainerCallback):
    """Ends the training after a step, as a killed job does: the plan of its learning rates is that of the whole."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_training_stop = state.global_step >= self.after


def trainer(folder: Path, release: bool, stop: int = 100) -> Trainer:
    """One that makes the optimizer itself (release), or is given one."""
    net = model()
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=5e-3, save_steps=4,
        max_grad_norm=0.0 if release else 1.0,  # in release mode gradients are gone before Trainer could clip them
        use_cpu=True, report_to="none", logging_steps=4, disable_tqdm=True,
    )  # fmt: skip
    given: dict[str, Any] = {"model": net, "args": arguments, "train_dataset": data(), "callbacks": [Stop(stop)]}
    if not release:
        return Trainer(**given, optimizers=(tare.GaLore(net, **GALORE), None))  # type: ignore[arg-type]
    # "params": net tells which leaf is what. Without it Trainer hands over bare tensors, and the embedding is taken for a layer.
    made = Trainer(**given, optimizer_cls_and_kwargs=(tare.GaLore, {**GALORE, "params": net, "release": True}))
    follow_accelerate(made.create_optimizer())  # Trainer tells which micro-batches of a step are still to come
    return made


def main(folder: Path, release: bool = True) -> tuple[Trainer, Trainer]:
    """Train 8 steps; and 4 steps, then 4 more from Trainer's own checkpoint. Returns both."""
    whole = trainer(folder / "whole", release)
    whole.train()
    trainer(folder / "cut", release, stop=4).train()
    resumed = trainer(folder / "cut", release)
    resumed.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-4"))
    same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    print(f"loss {whole.state.log_history[-1]['train_loss']:.3f}; the resumed run has the same bits: {same}")
    return whole, resumed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
