"""An adapter of PEFT in a loop of one's own: LoRA stepped by GaLore with 8-bit state, saved by PEFT, resumed.

pip install "tare[peft]"; python examples/peft_loop.py (by command: adapter_run.py)
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tare


def base() -> LlamaForCausalLM:
    """A LLaMA of 60 thousand fresh weights, the same at every call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, max_position_embeddings=32))


def optimizer_of(net: nn.Module) -> tare.Optimizer:
    """Frozen weights get no state. A factor of rank 8 has no subspace of rank 8: the rank must be below it."""
    storage = tare.Storage(moment="int8", min_quantized=64)
    return tare.GaLore(net, lr=5e-2, rank=4, period=5, scale=1.0, storage=storage)


def batch(step: int) -> Tensor:
    return (torch.arange(16) + torch.arange(8)[:, None] * 7 + step) % 64


def steps(net: nn.Module, optimizer: tare.Optimizer, first: int, last: int) -> list[float]:
    """Train; the loss of each step."""
    losses = []
    for step in range(first, last):
        loss = net(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder: Path) -> tuple[list[float], Any, Any]:
    """Train twenty steps; and ten, save, load, ten more. Returns the losses and both nets."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    whole = get_peft_model(base(), lora)
    losses = steps(whole, optimizer_of(whole), 0, 20)

    net = get_peft_model(base(), lora)
    optimizer = optimizer_of(net)
    steps(net, optimizer, 0, 10)
    net.save_pretrained(folder / "adapter")  # the adapter alone
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    again = PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True)
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    steps(again, optimizer, 10, 20)
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the resumed run has the same bits: {same}")
    return losses, whole, again


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
