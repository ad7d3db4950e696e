"""The parameters of a named model without `transformers`: enough to count weights and optimizer state, and quick to make."""

from types import SimpleNamespace

import torch
from torch import nn

from tare.plan.shapes import ModelShape


class Outline(nn.Module):
    """The parameters of a named model under the names that `transformers` gives them, on the meta device, with no forward.

    >>> from tare.plan.shapes import MODELS
    >>> sum(p.numel() for p in Outline(MODELS["llama-tiny"], torch.float32).parameters())
    1053824
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, how = shape.hidden, {"device": "meta", "dtype": dtype}

        def linear(rows: int, columns: int) -> nn.Linear:  # [rows, columns]
            return nn.Linear(columns, rows, bias=False, **how)

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(hidden, **how)  # type: ignore[arg-type]

        def layer() -> nn.Module:
            attention = {f"{name}_proj": linear(hidden, hidden) for name in "qkvo"}
            mlp = {
                "gate_proj": linear(shape.mlp, hidden),
                "up_proj": linear(shape.mlp, hidden),
                "down_proj": linear(hidden, shape.mlp),
            }
            return nn.ModuleDict(
                {
                    "self_attn": nn.ModuleDict(attention),
                    "mlp": nn.ModuleDict(mlp),
                    "input_layernorm": norm(),
                    "post_attention_layernorm": norm(),
                }
            )

        self.config = SimpleNamespace(
            hidden_size=hidden, num_attention_heads=shape.heads, head_dim=hidden // shape.heads
        )
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab, hidden, **how),  # type: ignore[arg-type]
                "layers": nn.ModuleList(layer() for _ in range(shape.layers)),
                "norm": norm(),
            }
        )
        self.lm_head = linear(shape.vocab, hidden)
