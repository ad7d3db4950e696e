"""Subject: one registered method in a small setting, with the leaves, the gradients and the little model that every check uses.

Gradients come from the counter-based generator, so that every check can be repeated and the global generator stays untouched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.core.optimizer import Optimizer
from tare.core.random import make_key, normal
from tare.core.storage import Storage
from tare.methods import registry

LR = 5e-3
PERIOD = 3  # refreshes at updates 1, 4, 7, ...

# One leaf of every kind that a user may have. Names decide the roles.
SHAPES: dict[str, tuple[int, ...]] = {
    "tall.weight": (12, 5), "wide.weight": (5, 12), "square.weight": (6, 6), "uneven.weight": (11, 7),
    "conv.weight": (4, 3, 3, 3), "row.weight": (1, 9), "column.weight": (9, 1), "one.weight": (1, 1),
    "experts.weight": (3, 4, 5), "embed.weight": (10, 6), "norm.weight": (7,), "tall.bias": (12,), "gain": (),
    "empty.weight": (0, 4), "nothing": (0,),
}  # fmt: skip
FEW = ("tall.weight", "wide.weight", "square.weight", "conv.weight", "norm.weight", "gain")

# Every form a moment is kept in, 4-bit bases with 4-bit moments; small blocks and no lower bound, so that small leaves are
# really quantised.
FORMS: dict[str, Storage] = {
    "fp32": Storage(),
    "bf16": Storage("bf16", "bf16"),
    "int8": Storage("int8", block=64, min_quantized=1),
    "int4": Storage("int4", "int4", block=64, min_quantized=1, group=64),
    "bf16_legacy": Storage("bf16_legacy"),
}


@dataclass(frozen=True)
class Subject:
    """A method by its key, made small: rank 2 (or its default where that is lower), refresh every three updates."""

    key: str

    @property
    def options(self) -> dict[str, Any]:
        return {name: parameter.default for name, parameter in registry.options(self.key).items()}

    def hyper(self, **own: Any) -> dict[str, Any]:
        small: dict[str, Any] = {"weight_decay": 0.0}
        if "rank" in self.options:
            small["rank"] = min(2, self.options["rank"])
        if "period" in self.options:
            small["period"] = PERIOD
        for ratio in ("adam_ratio", "matrix_ratio"):  # rates of some leaves over lr: alike, so that LR is everyone's
            if ratio in self.options:
                small[ratio] = 1.0
        return {**small, **registry.card(self.key).every_leaf, **own}

    def build(self, params: Any, lr: float | Tensor = LR, **own: Any) -> Optimizer:
        return registry.build(self.key, params, lr, **self.hyper(**own))  # type: ignore[arg-type]

    @property
    def coupled(self) -> bool:
        """Whether a leaf steps otherwise in company: what compares the two is then passed over."""
        return registry.card(self.key).coupled

    @property
    def refreshes(self) -> bool:
        """Whether some leaf of this method keeps a basis that is computed anew."""
        optimizer = self.build(leaves())
        return any("refreshed" in entry for entry in optimizer.state.values())


def leaves(names: tuple[str, ...] | None = None, dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the leaves above, with weights of unit size."""
    return [
        (name, nn.Parameter(_numbers(1, name, 0, SHAPES[name]).to(dtype, copy=True)))
        for name in (names if names is not None else tuple(SHAPES))
    ]


@lru_cache(maxsize=4096)
def _numbers(seed: int, name: str, step: int, shape: tuple[int, ...]) -> Tensor:
    return normal(make_key(seed, name, step), shape)


def gradient(name: str, step: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A fixed gradient of a named leaf at a step: nothing depends on the weights."""
    return _numbers(2, name, step, shape).to(dtype, copy=True)


def drive(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], first: int, last: int) -> None:
    """Updates first .. last - 1 with the fixed gradients."""
    for step in range(first, last):
        for name, p in named:
            p.grad = gradient(name, step, tuple(p.shape), p.dtype)
        optimizer.step()


class Net(nn.Module):
    """Embedding, norm, a tall, a wide and a square matrix, a head, biases: a regression from tokens."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(13, 8)
            self.norm = nn.LayerNorm(8)
            self.up = nn.Linear(8, 20)
            self.down = nn.Linear(20, 8, bias=False)
            self.square = nn.Linear(8, 8)
            self.head = nn.Linear(8, 13, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        out: Tensor = self.head(self.square(x))
        return out


def batch(number: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [32] and targets [32, 13]: a fixed function of the token, so that it can be learned."""
    tokens = (torch.arange(32) * 7 + number * 5) % 13
    return tokens, normal(5, (13, 13))[tokens]


def loss_of(net: nn.Module, number: int = 0) -> Tensor:
    tokens, targets = batch(number)
    return (net(tokens).float() - targets).square().mean()


@torch.no_grad()
def measure(net: nn.Module) -> float:
    return float(loss_of(net))


def train(
    optimizer: torch.optim.Optimizer, net: nn.Module, steps: int, after: Callable[[], Any] | None = None
) -> float:
    """The loss after some steps on one batch."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        if after is not None:
            after()
    return measure(net)


def snapshot(named: Any) -> dict[str, Tensor]:
    """Copies of named parameters."""
    return {name: p.detach().clone() for name, p in named}


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and values; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def same(got: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Bit for bit equal, or an AssertionError that names the leaf."""
    assert got.keys() == wanted.keys(), f"{what}: {sorted(got)} against {sorted(wanted)}"
    for name, value in wanted.items():
        gap = (got[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert bits_equal(got[name], value), f"{what}: {name} differs by {gap:.3g}"


def near(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Equal to `tolerance`, absolute."""
    assert got.keys() == wanted.keys(), f"{what}: {sorted(got)} against {sorted(wanted)}"
    for name, value in wanted.items():
        gap = (got[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert gap <= tolerance, f"{what}: {name} differs by {gap:.3g} > {tolerance:.3g}"


def same_state(a: Any, b: Any, what: str) -> None:
    """Two `state[p]` equal in names, types, dtypes, shapes and values."""
    assert a.keys() == b.keys(), f"{what}: {sorted(a)} against {sorted(b)}"
    for name, wanted in b.items():
        got = a[name]
        assert type(got) is type(wanted), f"{what}: {name} is {type(got).__name__}, was {type(wanted).__name__}"
        if isinstance(wanted, Tensor):
            assert bits_equal(got, wanted), f"{what}: {name} is {got.dtype} {tuple(got.shape)} or differs in value"
        else:
            assert got == wanted, f"{what}: {name} is {got}, was {wanted}"


@contextmanager
def refuses(*words: str, kind: type[Exception] = InputError) -> Iterator[None]:
    """The block must raise `kind`, and its one-line message must hold every word."""
    try:
        yield
    except kind as error:
        message = str(error)
        for word in words:
            assert word in message, f"the message lacks {word!r}: {message}"
        assert "\n" not in message.strip() or kind is not InputError, f"more than one line: {message}"
    except Exception as error:
        raise AssertionError(f"expected {kind.__name__}, got {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"expected {kind.__name__} naming {', '.join(words) or 'the fault'}; nothing was raised")


@contextmanager
def untouched_rng() -> Iterator[None]:
    """The global generator must not move inside the block."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global random generator was used"
