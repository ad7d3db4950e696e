"""Integer-only training of `EggNet`: table noise, the sign of each antithetic pair's difference, and steps of +-1 (arXiv 2511.16652).

Nothing is kept but the int8 weights, the members' recurrent states and the number of the step; no float takes part in a step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from tare.core.checks import check_choice, check_number, check_whole
from tare.core.errors import CheckpointError, InputError
from tare.core.random import bits, make_key, normal
from tare.zeroth.egg import FIXED, MATRICES, MOST, VECTORS, EggNet, Noise


class NoiseTable:
    """16 N(0, 1), cut to whole numbers, read at hashed places: row p of a key is a stretch of the table.

    Args:
        seed: of the table. bits: log2 of its length, 10 to 30; the published code has 2^30 bytes, and moves stretches that would pass
            the end; here none does.
    """

    def __init__(self, seed: int = 0, bits: int = 24, device: torch.device | str = "cpu"):
        if check_whole("table_bits", bits, 10) > 30:
            raise InputError(f"Invalid table_bits: {bits}; expected at most 30")
        self.entries = torch.empty(1 << bits, dtype=torch.int8, device=device)
        key, size = make_key(seed, "egg/table"), 1 << 20
        for start in range(0, 1 << bits, size):
            count = min(size, (1 << bits) - start)
            self.entries[start : start + count] = normal(key, (count,), device, scale=16.0, start=start).to(torch.int8)

    def rows(self, key: int, pairs: Sequence[int], length: int) -> Tensor:
        """[pairs, length] int8: the stretches of these pairs."""
        places = len(self.entries) - length + 1
        if places < 1:
            raise InputError(
                f"table_bits: a table of {len(self.entries)} entries has no stretch of {length}; make it larger"
            )
        device = self.entries.device
        number = torch.as_tensor(list(pairs), device=device)
        first, last = int(number.min()), int(number.max())
        start = bits(key, first, last - first + 1, device)[number - first] % places
        return self.entries[start[:, None] + torch.arange(length, device=device)]


@dataclass(frozen=True)
class Alpha:
    """The share of weights that a step moves: 1 / (rate t + 1) at step t (published: rate 0.015), or `fixed`."""

    rate: float = 0.015
    fixed: float | None = None

    def __post_init__(self) -> None:
        check_number("alpha.rate", self.rate, 0.0, inclusive=True)
        if self.fixed is not None and check_number("alpha", self.fixed, 0.0, inclusive=True) > 1.0:
            raise InputError(f"Invalid alpha: {self.fixed}; expected a share from 0 to 1")

    def __call__(self, step: int) -> float:
        return 1.0 / (self.rate * step + 1.0) if self.fixed is None else self.fixed


def threshold(alpha: float) -> int | None:
    """floor(16 Phi^-1(1 - alpha / 2)): a normal sum passes it with probability alpha. None: nothing passes.

    >>> threshold(1.0), threshold(0.5), threshold(0.0)
    (0, 10, None)
    """
    return None if alpha <= 0.0 else int(16 * NormalDist().inv_cdf(1.0 - alpha / 2.0))


@dataclass(frozen=True)
class EggStep:
    """What one step did. bits: mean bits per token over the members. changed: share of the weights that moved."""

    bits: float
    changed: float


class EggTrainer:
    """Steps an `EggNet`: member 2i reads with noise +E_i, member 2i + 1 with -E_i; F_i is the sign of the difference of their scores.

    Z = sum_i F_i A_i B_i^T; where 16 |Z| >= threshold floor(sqrt(pairs)) 256 a weight moves by the sign of Z, clipped to +-127.

    Args:
        net: changed in place.
        members: even. sigma_shift: noise is 2^-shift of the weights' unit (published: 4).
        alpha: share of weights that move, by step or fixed.
        reuse: steps that share their noise; 0: the first step's for ever.
        still: what an entry with Z = 0 does at threshold 0, where the published code moves it by -1 (`"down"`): stay.
        pairs: (first, last + 1) of the pairs that this process evaluates; others' signs come from `share`.
        share: gives the signs of all pairs for those of this process (int8 [own pairs]); None: this process has them all.
        seed: of the noise. table_bits: log2 of the noise table's size.

    >>> trainer = EggTrainer(EggNet(8, 4, 1), members=4, table_bits=12)
    >>> trainer.step(torch.randint(8, (2, 5))).bits > 0
    True
    """

    def __init__(
        self, net: EggNet, members: int = 1024, *, sigma_shift: int = 4, alpha: Alpha | float | None = None, reuse: int = 1,
        still: str = "stay", pairs: tuple[int, int] | None = None, share: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0, table_bits: int = 24,
    ):  # fmt: skip
        if check_whole("members", members, 2) % 2:
            raise InputError(f"Invalid members: {members}; expected an even number: members come in pairs")
        self.net, self.pair_count = net, members // 2
        self.sigma_shift = check_whole("sigma_shift", sigma_shift, 0)
        self.alpha = alpha if isinstance(alpha, Alpha) else Alpha(fixed=alpha)
        self.reuse, self.seed = check_whole("reuse", reuse, 0), check_whole("seed", seed, 0)
        self.still = check_choice("still", still, ("stay", "down"))
        first, last = pairs or (0, self.pair_count)
        if not 0 <= first < last <= self.pair_count:
            raise InputError(f"pairs: ({first}, {last}) is not within the {self.pair_count} pairs of {members} members")
        if share is None and last - first < self.pair_count:
            raise InputError("pairs: only some are evaluated here; give share=, which brings the others' signs")
        self.pairs, self.share = range(first, last), share
        self.count = 0
        self.hidden = net.fresh(2 * len(self.pairs))
        self._bits = table_bits

    @cached_property
    def table(self) -> NoiseTable:
        """The noise table, drawn when it is first read."""
        return NoiseTable(self.seed, self._bits, self.net.emb.device)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> EggStep:
        """One update.

        Args:
            tokens: [streams, T + 1] the next stretch of each text; the last token of one step is the first of the next. Streams are
                dealt out to the members in order: as many pairs read each as there are pairs for one stream.

        Raises:
            InputError: streams that the pairs do not divide among.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 2 or self.pair_count % tokens.shape[0]:
            raise InputError(
                f"tokens: expected [streams, at least 2] with streams dividing {self.pair_count} pairs, got {tuple(tokens.shape)}"
            )
        each = self.pair_count // tokens.shape[0]
        own = tokens[torch.tensor([pair // each for pair in self.pairs])]  # [own pairs, T + 1]
        scores, self.hidden = self.net.read(own.repeat_interleave(2, 0), self.hidden, self.noise(self.pairs))
        paired = scores.view(-1, 2)
        signs = torch.sign(paired[:, 0] - paired[:, 1]).to(torch.int8)
        changed = self.apply(signs if self.share is None else self.share(signs))
        return EggStep(-float(scores.sum()) / (16.0 * len(scores) * (tokens.shape[1] - 1)), changed)

    # -- noise -----------------------------------------------------------------------------------------------------

    def drawn(self, name: str, pairs: Sequence[int]) -> tuple[Tensor, Tensor] | Tensor:
        """Of one weight: (A [pairs, (layers,) m], B [pairs, (layers,) n]) int8, or the products E of a vector, int32."""
        weight = self.net.get_buffer(name)
        layered = name not in ("emb", "head", "ln_out")
        shape = weight.shape[1:] if layered else weight.shape
        epoch = self.count // self.reuse if self.reuse else 0
        length = sum(shape) if name in MATRICES else 2 * shape[0]
        rows = [
            self.table.rows(make_key(self.seed, f"egg/{name}/{layer}", epoch), pairs, length)
            for layer in range(weight.shape[0] if layered else 1)
        ]
        noise = torch.stack(rows, 1) if layered else rows[0]
        if name in VECTORS:
            return noise.unflatten(-1, (shape[0], 2)).to(torch.int32).prod(-1, dtype=torch.int32)
        return noise[..., shape[1] :], noise[..., : shape[1]]

    def noise(self, pairs: Sequence[int]) -> Noise:
        """Of both members of each pair."""
        sign = torch.tensor([1, -1], dtype=torch.int32, device=self.net.emb.device).repeat(len(pairs))
        factors, vectors = {}, {}
        for name in MATRICES:
            a, b = (factor.repeat_interleave(2, 0).to(torch.int32) for factor in self.drawn(name, pairs))
            factors[name] = (a * sign.view(-1, *[1] * (a.ndim - 1)), b)
        for name in VECTORS:
            e = self.drawn(name, pairs)
            assert isinstance(e, Tensor)
            vectors[name] = e.repeat_interleave(2, 0) * sign.view(-1, *[1] * (e.ndim - 1))
        return Noise(factors, vectors, FIXED + self.sigma_shift)

    # -- update ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, signs: Tensor) -> float:
        """The step that follows from the signs of all pairs, int8 [pairs]; returns the share of weights that moved."""
        if signs.shape != (self.pair_count,):
            raise InputError(f"signs: expected [{self.pair_count}], one for each pair, got {tuple(signs.shape)}")
        least = threshold(self.alpha(self.count))
        moved = total = 0
        for name, weight in self.net.weights().items():
            total += weight.numel()
            if least is not None:
                moved += self._move(weight, self._votes(name, signs.to(weight.device)), least)
        self.count += 1
        return moved / total

    def _votes(self, name: str, signs: Tensor) -> Tensor:
        """Z of one weight, int32: summed in chunks of pairs whose float32 products are exact."""
        weight = self.net.get_buffer(name)
        total = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
        voting = signs.nonzero().flatten().tolist()
        for start in range(0, len(voting), 1024):
            pairs = voting[start : start + 1024]
            sign, drawn = signs[pairs], self.drawn(name, pairs)
            if isinstance(drawn, Tensor):
                total += (drawn * sign.view(-1, *[1] * (drawn.ndim - 1))).sum(0, dtype=torch.int32)
                continue
            a, b = drawn
            a = (a * sign.view(-1, *[1] * (a.ndim - 1))).float().movedim(0, -1)  # [(layers,) m, pairs]
            total += (a @ b.float().movedim(0, -2)).to(torch.int32)
        return total

    def _move(self, weight: Tensor, votes: Tensor, least: int) -> int:
        enough = votes.abs() >= (least * math.isqrt(self.pair_count) << FIXED)
        if self.still == "down":
            way = torch.where(votes > 0, 1, -1)
        else:
            way = votes.sign()
        after = (weight + (way * enough).to(torch.int16)).clamp_(-MOST, MOST).to(torch.int8)
        moved = int((after != weight).sum())
        weight.copy_(after)
        return moved

    # -- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step and the members' states; the weights are the net's own."""
        return {"step": self.count, "hidden": self.hidden.clone(), "seed": self.seed, "table_bits": self._bits}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises CheckpointError where it was saved by a trainer of other noise or other members."""
        for name, own in (("seed", self.seed), ("table_bits", self._bits)):
            if saved[name] != own:
                raise CheckpointError(f"{name}: saved with {saved[name]}, but this trainer has {own}; build it alike")
        if saved["hidden"].shape != self.hidden.shape:
            raise CheckpointError(
                f"hidden: saved for {tuple(saved['hidden'].shape)}, but this trainer has {tuple(self.hidden.shape)}; build it alike"
            )
        self.count, self.hidden = int(saved["step"]), saved["hidden"].to(self.hidden.device).clone()
