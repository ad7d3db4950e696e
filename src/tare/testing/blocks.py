"""A model with a list of blocks, for methods that need one: embedding, blocks, norm and head."""

import torch
from torch import Tensor, nn

from tare.testing.forward import Problem
from tare.testing.subject import loss_of


class Block(nn.Module):
    """x + down(tanh(up(gain norm(x)))), with a parameter of its own beside its modules."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.gain * self.norm(x))))
        return out


class Decoder(nn.Module):
    """A regression from tokens, as `tare.testing.subject.Net`. dropout: between the blocks."""

    def __init__(
        self, layers: int = 3, width: int = 8, vocabulary: int = 13, *, tied: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(vocabulary, width)
            self.drop = nn.Dropout(dropout)
            self.layers = nn.ModuleList(Block(width) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.offset = nn.Parameter(torch.zeros(width))  # the root's own
        self.register_buffer("scale", torch.ones(()))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.offset
        for layer in self.layers:
            x = self.drop(layer(x))
        out: Tensor = self.head(self.norm(x)) * self.scale
        return out


def regression(dtype: torch.dtype = torch.float32) -> Problem:
    """The generic checks' problem: targets that are a function of the token. Weights are read through `state_dict`."""
    net = Decoder().to(dtype)

    @torch.no_grad()
    def measure() -> float:
        return float(loss_of(net))

    def tensors() -> dict[str, Tensor]:
        names = {name for name, _ in net.named_parameters()}
        return {name: value for name, value in net.state_dict(keep_vars=True).items() if name in names}

    return Problem(net, lambda number: loss_of(net, number), tensors, measure)
