"""History: gradients without the directions in which a leaf has hardly moved lately (ZOODiP, arXiv 2503.14868); and single rows of tables.

Every `tau` updates the last `tau` weights are looked at by principal components. Those that explain a share `nu` of their variance, the
smallest, are taken out of the gradients of the next `tau` updates.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tare.core.checks import check_number, check_whole
from tare.core.delta import Delta
from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.state import State
from tare.core.transform import Sharding, StateSpec, Step, Transform

PLACES, STILL, REMOVED = "places", "still", "removed"


def still_directions(places: Tensor, nu: float, standardize: bool = True) -> Tensor:
    """Principal directions of some points that explain the last `nu` of their variance, orthonormal.

    Args:
        places: points [tau, d]; one after another, but the order is not read.
        nu: a direction stays as long as those up to it, the largest first, explain no more than 1 - nu. The first always stays.
        standardize: each coordinate is divided by its standard deviation first; coordinates that do not change count as they are.

    Returns:
        [k, d] fp64 on the CPU, k < min(tau, d + 1) - 1: never more than the points span. Empty where they span nothing.
    """
    x = places.detach().double().cpu()
    x = x - x.mean(0)
    if standardize:
        scale = x.square().mean(0).sqrt()
        noise = 16.0 * torch.finfo(places.dtype).eps * places.detach().double().cpu().abs().amax(0)
        constant = scale <= noise  # or only rounding has moved it, by no more than this
        x = torch.where(constant, torch.zeros_like(x), x / torch.where(constant, torch.ones_like(scale), scale))
    most = min(x.shape[0] - 1, x.shape[1])  # what centred points can span
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    s, vh = s[:most], vh[:most]
    variance = s.square()
    total = float(variance.sum())
    if not total > 0.0 or not nu:
        return vh[:0]
    spanned = int((s > s[0] * torch.finfo(x.dtype).eps * max(x.shape)).sum())  # the rest is rounding
    explained = variance.cumsum(0) / total
    beyond = (explained > 1.0 - nu).nonzero()
    first = int(beyond[0]) if len(beyond) else spanned
    return vh[first + 1 : spanned]


def without(grad: Tensor, still: Tensor) -> Tensor:
    """g - g V^T V. still: V [k, d], orthonormal rows, or zero ones."""
    flat = grad.reshape(-1)
    return (flat - (still.to(flat.dtype) @ flat) @ still.to(flat.dtype)).view(grad.shape)


@dataclass(frozen=True)
class Moving(Transform):
    """`rule` on gradients without the directions in which the leaf hardly moved in `tau` former updates.

    Args:
        rule: what steps the leaf.
        tau: updates between two looks at the history, and how many it holds.
        nu: share of the variance that may be left out.
        standardize: whether coordinates are compared by their own spread, as the published code does.
        n: directions of the estimate, for its length: the gradient is divided by sqrt((D + n - 1) / n), D what is left of the leaf's
            dimensions (published code); 0: it is left as long as it is.
    """

    rule: Transform
    tau: int = 128
    nu: float = 1e-3
    standardize: bool = True
    n: int = 0

    sharding: ClassVar[Sharding] = "matrix"  # principal components are of the whole leaf

    def __post_init__(self) -> None:
        check_whole("tau", self.tau, 2)
        if check_number("nu", self.nu, 0.0, inclusive=True) > 1.0:
            raise InputError(f"Invalid nu: {self.nu!r}; expected a share of the variance, at most 1")
        check_whole("n", self.n, 0)

    @property
    def workspace(self) -> float:  # type: ignore[override]
        return self.rule.workspace + 2.0

    @property
    def rate(self) -> float:  # type: ignore[override]
        return self.rule.rate

    @property
    def recalls(self) -> int | None:  # type: ignore[override]
        return self.rule.recalls

    def most_of(self, numel: int) -> int:
        """Directions that may be taken out of so many."""
        return max(0, min(self.tau - 1, numel) - 1)

    def spec(self, leaf: Leaf) -> dict[str, StateSpec]:
        dtype = leaf.compute_dtype
        return {
            **self.rule.spec(leaf),
            PLACES: StateSpec((self.tau, leaf.numel), "exact", dtype=dtype),
            STILL: StateSpec((self.most_of(leaf.numel), leaf.numel), "exact", dtype=dtype),
            REMOVED: StateSpec((), "count"),
        }

    def check(self, leaf: Leaf, storage: Any) -> None:
        self.rule.check(leaf, storage)
        if self.rule.recalls != 0:
            raise InputError(
                f"{leaf.name}: {self.rule.describe()} draws former gradients again, and would find them without what the history took "
                "out; keep the moments instead"
            )

    def resolve(self, leaf: Leaf) -> tuple[Transform, str]:
        return self, ""

    def update(self, grad: Tensor, state: State, step: Step, compressed: Tensor | None = None) -> Delta:
        self._look(state, step)
        if self.n:
            left = step.leaf.numel - state[REMOVED]
            grad = grad / math.sqrt((left + self.n - 1) / self.n)
        if state[REMOVED]:
            grad = without(grad, state[STILL])
        return self.rule.update(grad, state, step)

    def _look(self, state: State, step: Step) -> None:
        """Note where the last update went; after every `tau` of them, look back."""
        done = step.count - 1
        if not done or not step.leaf.numel:
            return
        numel = step.leaf.numel
        weight = step.weight.reshape(-1) if step.kept is None else step.kept.read(0, numel)
        places: Tensor = state[PLACES]
        places[(done - 1) % self.tau].copy_(weight)
        if done % self.tau == 0:
            found = still_directions(places, self.nu, self.standardize)
            still: Tensor = state[STILL]
            still.zero_()
            still[: len(found)].copy_(found)
            state[REMOVED] = len(found)

    def describe(self) -> str:
        return f"{self.rule.describe()} where it moves (tau {self.tau}, nu {self.nu:g})"


# -- single rows of a table ------------------------------------------------------------------------------------------------


class TokenRows(nn.Module):
    """A table of embeddings, some rows of which are a small parameter of their own; the table itself rests, in whatever form it is kept.

    Args:
        table: tokens -> vectors, any module.
        tokens: numbers of the rows.
        start: first values [len(tokens), d]; default: the table's.
    """

    def __init__(self, table: nn.Module, tokens: list[int], start: Tensor | None = None):
        super().__init__()
        self.table = table
        device = next((t.device for t in [*table.parameters(), *table.buffers()]), torch.device("cpu"))
        numbers = torch.tensor(tokens, dtype=torch.int64, device=device)
        self.register_buffer("tokens", numbers)
        with torch.no_grad():
            found = table(numbers) if start is None else start.to(device)
        if found.ndim != 2 or found.shape[0] != len(tokens):
            raise InputError(f"start: expected [{len(tokens)}, d], a row for each token, got {tuple(found.shape)}")
        self.rows = nn.Parameter(found.detach().clone())

    tokens: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.table(tokens)
        for number in range(len(self.tokens)):
            found = torch.where((tokens == self.tokens[number])[..., None], self.rows[number].to(found.dtype), found)
        return found


def train_rows_(model: nn.Module, table: str, tokens: list[int], start: Tensor | None = None) -> TokenRows:
    """Give rows of a table of embeddings a parameter of their own, `<table>.rows`, and freeze all else in the model.

    What reads the table's weight otherwise, such as a tied head, goes on reading the old rows.

    Args:
        table: name of the module in the model.
        tokens: numbers of the rows.
        start: their first values; default: those in the table.

    Raises:
        InputError: no such module; no token; a token twice.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    >>> _ = train_rows_(model, "0", [7])
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.rows', (1, 4))]
    """
    if table not in dict(model.named_modules()) or not table:
        near = ", ".join(name for name, m in model.named_modules() if "embed" in type(m).__name__.lower())
        raise InputError(f"table: no module is called {table!r}; embeddings here: {near or 'none'}")
    if not tokens or len(set(tokens)) != len(tokens):
        raise InputError(f"tokens: expected different row numbers, got {tokens}")
    model.requires_grad_(False)
    owner, _, last = table.rpartition(".")
    rows = TokenRows(model.get_submodule(table), tokens, start)
    model.get_submodule(owner).register_module(last, rows)
    return rows
