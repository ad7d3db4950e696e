"""`tare train --adapter lora`, from Python: an adapter trained, saved as PEFT reads it, and put on its base again.

pip install "tare[peft]"; python examples/adapter_run.py
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tare.train.adapters import AdapterConfig
from tare.train.config import DataConfig, MethodConfig, ModelConfig, RunConfig, RunSection, TrainConfig
from tare.train.loop import train


def files(folder: Path) -> tuple[str, str]:
    """A base model of 80 thousand fresh weights, in a folder, and a text for it. Give your own instead."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=300, max_position_embeddings=64)).save_pretrained(folder / "base")
    text = "\n\n".join(f"The number {n} is followed by the number {n + 1}, and that by {n + 2}." for n in range(900))
    (folder / "text.txt").write_text(text)
    from tare.train.tokenizer import train_bpe

    train_bpe([text], 300).save(str(folder / "tokenizer.json"))
    return str(folder / "base"), str(folder / "text.txt")


def main(folder: Path, steps: int = 30) -> tuple[float, float, nn.Module]:
    """Train a LoRA of all linear layers; returns the loss before and after, and the model as PEFT loads it."""
    base, text = files(folder)
    config = RunConfig(
        ModelConfig(base, str(folder / "tokenizer.json")),
        DataConfig(text, seq=32, eval_tokens=1000),
        MethodConfig("adamw", lr=2e-2),
        TrainConfig(steps, batch=8),
        RunSection(str(folder / "run"), device="cpu"),
        adapter=AdapterConfig("lora", rank=8, targets="all-linear"),
    )
    result = train(config)
    losses = [line["loss"] for line in result.history if line["event"] == "step"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.out / "model")
    size = (result.out / "model" / "adapter_model.safetensors").stat().st_size
    print(
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the adapter has {size:,} bytes, peak {result.measured_peak:,} bytes"
    )
    return losses[0], losses[-1], model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
