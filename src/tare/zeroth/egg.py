"""EGG: a recurrent language model over bytes whose weights, activations and loss are integers (EGGROLL, arXiv 2511.16652).

Fixed point: 16 stands for 1. Layer norm by mean absolute value, a minimal gated unit, a two-layer block without activation (saturation at
+-127 is the only nonlinearity), and the log-likelihood in base 2 from tables. Divisions and shifts round down, as published.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tare.core.checks import check_whole
from tare.core.errors import InputError
from tare.core.random import make_key, normal

FIXED = 4  # bits after the point
MOST = 127
EXACT = (1 << 24) // MOST**2  # terms of a product of int8 that float32 sums without rounding: 1040

MATRICES = ("emb", "wf", "uf", "wh", "uh", "mlp_in", "mlp_out", "head")
VECTORS = ("ln1", "ln2", "bf", "bh", "ln_out")


@dataclass(frozen=True)
class Noise:
    """What members have of their own in one step.

    factors: name -> (A [M, (layers,) m], B [M, (layers,) n]) int32, A with its sign; for the embedding A runs over the vocabulary.
    vectors: name -> [M, (layers,) d] int32, added to the weight. shift: the product of two factors is shifted right by so much.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    vectors: Mapping[str, Tensor]
    shift: int


class EggNet(nn.Module):
    """The net; all its tensors are int8 buffers, those of the layers with the layer as first axis.

    Args:
        vocabulary: tokens, at most 256; token 0 begins a document and clears the state.
        width: d. layers: how many.
        seed: of the initial weights: matrices 16 N(0, 1) rounded, norms 16, biases 0.

    >>> net = EggNet(vocabulary=8, width=4, layers=1)
    >>> scores, state = net.read(torch.tensor([[1, 2, 3]]))
    >>> scores.shape, state.shape, net.wf.dtype
    (torch.Size([1]), torch.Size([1, 1, 4]), torch.int8)
    """

    emb: Tensor
    powers: Tensor
    thresholds: Tensor

    def __init__(self, vocabulary: int = 256, width: int = 256, layers: int = 6, seed: int = 0):
        super().__init__()
        if check_whole("vocabulary", vocabulary, 2) > 256:
            raise InputError(f"Invalid vocabulary: {vocabulary}; expected at most 256: tokens are bytes")
        self.vocabulary, self.width = vocabulary, check_whole("width", width, 1)
        self.layers = check_whole("layers", layers, 1)
        d = width
        shapes = {
            "emb": (vocabulary, d), "wf": (layers, d, d), "uf": (layers, d, d), "wh": (layers, d, d), "uh": (layers, d, d),
            "mlp_in": (layers, 4 * d, d), "mlp_out": (layers, d, 4 * d), "head": (vocabulary, d),
        }  # fmt: skip
        for name, shape in shapes.items():
            drawn = normal(make_key(seed, f"egg/{name}"), shape, scale=float(1 << FIXED))
            self.register_buffer(name, drawn.round().clamp(-MOST, MOST).to(torch.int8))
        for name in ("ln1", "ln2", "ln_out"):
            self.register_buffer(
                name, torch.full((d,) if name == "ln_out" else (layers, d), 1 << FIXED, dtype=torch.int8)
            )
        for name in ("bf", "bh"):
            self.register_buffer(name, torch.zeros(layers, d, dtype=torch.int8))
        self.register_buffer("powers", torch.tensor([_root(64 + q) for q in range(256)]), persistent=False)
        roots = [_root(64 + k) + (0 if k % 16 == 0 else 1) for k in range(16 * 28)]
        self.register_buffer("thresholds", torch.tensor(roots), persistent=False)

    def weights(self) -> dict[str, Tensor]:
        """Every trained tensor by name."""
        return {name: self.get_buffer(name) for name in (*MATRICES, *VECTORS)}

    def fresh(self, members: int) -> Tensor:
        """The state before the first token, [members, layers, d] int8."""
        return torch.zeros(members, self.layers, self.width, dtype=torch.int8, device=self.emb.device)

    def read(self, tokens: Tensor, state: Tensor | None = None, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Read a stretch of text each, scoring every token but the first.

        Args:
            tokens: [M, T + 1], any integer dtype. state: [M, layers, d], where each left off; None: afresh.
            noise: of the M members; None reads with the weights as they are.

        Returns:
            (scores [M] int64: sums of log2-likelihoods, 16 for one bit; the state after the last input).
        """
        tokens = tokens.to(self.emb.device, torch.int64)
        step = _Step(self, noise, tokens.shape[0])
        hidden = (self.fresh(len(tokens)) if state is None else state).to(torch.int32)
        scores = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        for t in range(tokens.shape[1] - 1):
            hidden = hidden.masked_fill((tokens[:, t] == 0)[:, None, None], 0)
            logits, hidden = step.token(tokens[:, t], hidden)
            scores += self.score(logits, tokens[:, t + 1])
        return scores, hidden.to(torch.int8)

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        """16 log2 of the target's share of sum 2^(logit / 16), [M] int64: table look-ups and a subtraction."""
        q = logits.to(torch.int64) + 128
        total = self.powers[q].sum(-1)  # sum of floor(16 * 2^(q / 16))
        log = torch.bucketize(total, self.thresholds, right=True) - 1  # floor(16 * log2(total / 16))
        return q.gather(-1, target[:, None]).squeeze(-1) - log


class _Step:
    """The net with one step's noise, ready to read tokens: what does not depend on the token is done once."""

    def __init__(self, net: EggNet, noise: Noise | None, members: int):
        self.net, self.noise, self.members = net, noise, members
        self.matrices = {}
        for name in MATRICES:
            weight = net.get_buffer(name)
            self.matrices[name] = weight.to(torch.float32 if weight.shape[-1] <= EXACT else torch.float64)
        self.vectors = {}
        for name in VECTORS:
            weight = net.get_buffer(name).to(torch.int32)
            if noise is not None:
                weight = saturate(weight + (noise.vectors[name] >> noise.shift))
            self.vectors[name] = weight

    def token(self, token: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [M, vocabulary] and state [M, layers, d] after one token [M]; int32."""
        x = self._embed(token)
        after = []
        for layer in range(self.net.layers):
            residual, past = x, hidden[:, layer]
            u = self._norm("ln1", layer, x)
            gate = saturate(
                self._product("wf", layer, u) + self._product("uf", layer, past) + self._vector("bf", layer)
            )
            gate = gate + MOST  # [0, 254]
            gated = (gate * past) >> 8
            new = saturate(
                self._product("wh", layer, u) + self._product("uh", layer, gated) + self._vector("bh", layer)
            )
            past = past + ((gate * (new - past)) >> 8)  # stays between the two
            after.append(past)
            x = saturate(past + residual)
            inner = self._product("mlp_in", layer, self._norm("ln2", layer, x))
            x = saturate(x + self._product("mlp_out", layer, inner))
        return self._product("head", None, self._norm("ln_out", None, x)), torch.stack(after, 1)

    def _embed(self, token: Tensor) -> Tensor:
        x = self.net.emb[token].to(torch.int32)
        if self.noise is not None:
            a, b = self.noise.factors["emb"]  # [M, vocabulary], [M, d]
            x = x + ((a.gather(1, token[:, None]) * b) >> self.noise.shift)
        return saturate(x)

    def _product(self, name: str, layer: int | None, x: Tensor) -> Tensor:
        """clip((W x + (x . B) A >> shift) // (16 floor(sqrt(n)))), [M, m]."""
        weight = self.matrices[name] if layer is None else self.matrices[name][layer]
        out = (x.to(weight.dtype) @ weight.mT).to(torch.int32)  # exact: see EXACT
        if self.noise is not None:
            a, b = self.noise.factors[name]
            a, b = (a, b) if layer is None else (a[:, layer], b[:, layer])
            dot = (x * b).sum(-1, dtype=torch.int32)
            out += (dot[:, None].to(_wide(x)) * a >> self.noise.shift).to(torch.int32)
        return saturate(floor_divide(out, (1 << FIXED) * math.isqrt(x.shape[-1])))

    def _norm(self, name: str, layer: int | None, x: Tensor) -> Tensor:
        """clip(x w // mean |x|); a mean below 1 counts as 1."""
        mean = x.abs().sum(-1, keepdim=True, dtype=torch.int32) // x.shape[-1]
        return saturate(torch.div(x * self._vector(name, layer), mean.clamp(min=1), rounding_mode="floor"))

    def _vector(self, name: str, layer: int | None) -> Tensor:
        weight = self.vectors[name]
        return weight if layer is None else weight[..., layer, :]


def saturate(x: Tensor) -> Tensor:
    """To [-127, 127]."""
    return x.clamp(-MOST, MOST)


def floor_divide(x: Tensor, divisor: int) -> Tensor:
    """x // divisor, rounded down; a shift where the divisor is a power of two."""
    if divisor & (divisor - 1) == 0:
        return x >> (divisor.bit_length() - 1)
    return torch.div(x, divisor, rounding_mode="floor")


def _wide(x: Tensor) -> torch.dtype:
    """An integer dtype that holds (x . B) A: 127^3 for every input."""
    return torch.int32 if x.shape[-1] * MOST**3 < 1 << 31 else torch.int64


def _root(power: int) -> int:
    """floor(2^(power / 16)), exactly.

    >>> _root(64), _root(80), _root(65)
    (16, 32, 16)
    """
    low = 1 << (power // 16)
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**16 <= 1 << power else (low, middle)
    return low
