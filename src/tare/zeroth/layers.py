"""Layer scales: a number for each layer that perturbs it less or more than the others (MeZO, arXiv 2305.17333, appendix B.3)."""

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tare.core.checks import check_number, check_whole
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import StateSpec
from tare.zeroth.directions import Draw
from tare.zeroth.probes import Asking, Estimate, Probe, away
from tare.zeroth.wrapped import Wrapped

SCALE = "layer_scale"  # in the state of a leaf: the bits of a float64, since state is tensors and ints, and this is read at every use
ALONE = 1 << 40  # member ALONE + k moves layer k only
MEASURED = "measured"


def layer_of(name: str) -> str:
    """A leaf's layer: its name up to the first number; else `embeddings` or `head`.

    >>> layer_of("model.layers.3.mlp.up.weight"), layer_of("roberta.embeddings.word.weight"), layer_of("lm_head.bias")
    ('model.layers.3', 'embeddings', 'head')
    """
    numbered = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    if numbered:
        return numbered[0]
    return "embeddings" if re.search(r"embed|\bw[tp]e\b", name) else "head"


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """The layers of some leaves, in alphabetical order, whatever theirs is."""
    return tuple(sorted(set(map(layer_of, names))))


def to_bits(number: float) -> int:
    """
    >>> from_bits(to_bits(0.1))
    0.1
    """
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def from_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


@dataclass(frozen=True)
class LayerScaled(Wrapped):
    """z / c where a loss is evaluated, and c z (`variance`) or z (`expectation`) where the gradient is put together.

    Variance-modified: the mean is the gradient, as without scales. Expectation-modified: the mean is that of layer l over c_l, the
    gradient normalised where c_l is its norm. layers: names of all layers, for members that move one of them alone.
    """

    layers: tuple[str, ...]
    expectation: bool = False

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        return self.law.fuses

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        return {**self.law.spec(leaf), SCALE: StateSpec((), "count", init=float(to_bits(1.0)))}

    def learn(self, leaf: Leaf, state: State, kept: Mapping[str, float]) -> None:
        self.law.learn(leaf, state, kept)
        key = scale_key(self.layers.index(layer_of(leaf.name)))
        if key in kept:
            state[SCALE] = to_bits(kept[key])

    def add_(self, target: Tensor, draw: Draw, state: State, weight: Tensor, scale: float, start: int = 0) -> None:
        self.gather_(target, [(draw, scale)], state, weight, start)

    def gather_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, start: int = 0
    ) -> None:
        if mine := self._mine(terms):
            self.law.gather_(target, mine, state, weight, start)

    def moved(self, source: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor) -> Tensor:
        mine = self._mine(terms)
        return self.law.moved(source, mine, state, weight) if mine else source.clone()

    def write_(
        self, target: Tensor, terms: Sequence[tuple[Draw, float]], state: State, weight: Tensor, **how: Any
    ) -> None:
        self.law.write_(target, self._mine(terms), state, weight, **how)

    def _mine(self, terms: Sequence[tuple[Draw, float]]) -> list[tuple[Draw, float]]:
        """Those of members that move every layer, or this one alone."""
        return [
            (draw, scale) for draw, scale in terms
            if draw.member < ALONE or self.layers[draw.member - ALONE] == layer_of(draw.leaf.name)
        ]  # fmt: skip

    def perturbation(self, leaf: Leaf, state: State) -> float:
        return self.law.perturbation(leaf, state) / from_bits(state[SCALE])

    def update(self, leaf: Leaf, state: State) -> float:
        return self.law.update(leaf, state) * (1.0 if self.expectation else from_bits(state[SCALE]))

    def describe(self) -> str:
        return f"{self.law.describe()}, scaled by layer ({'expectation' if self.expectation else 'variance'})"


def scale_key(number: int) -> str:
    """Under which a probe keeps the scale of a layer."""
    return f"scale {number}"


@dataclass(frozen=True)
class Measured:
    """`probe`, after a look at each layer alone: c = |delta| of a two-sided difference, an estimate of the norm of its gradient.

    That look is a step of its own, the first one and every `every`-th after it (0: no other), in which nothing moves: 2 evaluations for
    each layer. A layer whose loss does not change has c = 1.
    """

    probe: Probe
    layers: tuple[str, ...]
    eps: float = 1e-3
    every: int = 0

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0)
        check_whole("rescale_every", self.every, 0)

    def ask(self, step: int, kept: Mapping[str, float]) -> Asking:
        known = {name: value for name, value in kept.items() if name != "lr"}
        if MEASURED in kept and not (self.every and step - kept[MEASURED] >= self.every):
            estimate = yield from self.probe.ask(step, kept)
            if estimate is not None and estimate.keep is not None:
                estimate.keep = {**known, **estimate.keep}
            return estimate
        number = range(len(self.layers))
        values = yield [away(ALONE + k, sign * self.eps) for k in number for sign in (1.0, -1.0)]
        before = [kept.get(scale_key(k), 1.0) for k in number]
        deltas = [(values[2 * k] - values[2 * k + 1]) / (2.0 * self.eps) * before[k] for k in number]
        scales = {scale_key(k): abs(delta) or 1.0 for k, delta in enumerate(deltas)}
        return Estimate([], deltas, {**known, **scales, MEASURED: float(step)}, moves=False)

    @property
    def evaluations(self) -> float:
        return self.probe.evaluations + (2.0 * len(self.layers) / self.every if self.every else 0.0)

    def describe(self) -> str:
        again = f", again every {self.every} steps" if self.every else ""
        return f"{self.probe.describe()}; norms of {len(self.layers)} layers measured first{again}"


def scales_from(scales: Mapping[str, float] | str, named: list[tuple[str, Tensor]]) -> dict[str, float]:
    """c of every leaf by its name: from a mapping of words in names (the first that fits), or the norm of its layer's weights.

    Raises:
        InputError: no word fits a leaf, or a number that is not positive.
    """
    if scales == "parameter-norm":
        squares: dict[str, float] = {}
        for name, p in named:
            squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + float(p.detach().double().square().sum())
        return {name: squares[layer_of(name)] ** 0.5 or 1.0 for name, _ in named}
    assert not isinstance(scales, str)
    found = {}
    for name, _ in named:
        word = next((word for word in scales if word in name), None)
        if word is None:
            raise InputError(f"scales: none for {name}; words: {', '.join(map(repr, scales))}; add '' for the rest")
        found[name] = check_number(f"scale {word!r}", scales[word], 0.0)
    return found


def set_scales(state: dict[str, Any], scale: float) -> None:
    """Into `state[p]` of a leaf."""
    state[SCALE] = to_bits(scale)
