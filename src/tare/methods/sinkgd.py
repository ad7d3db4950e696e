"""SinkGD: no state for matrices; the gradient with its rows and columns normalised in turn."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.maps import Sinkhorn
from tare.rules.stateless import Stateless

CARD = Card(
    key="sinkgd",
    title="Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    authors="Scetbon, Ma, Gong, Meeds",
    year=2025,
    arxiv="2502.06742",
    idea="Step along the gradient after Sinkhorn's alternation has given all its rows and columns the same norm: no state.",
    axes={
        "rule": "none on matrices; Adam elsewhere", "subspace": "none", "post": "rows, then columns, 5 times",
        "storage": "none", "release": "yes",
    },
    defaults={
        "lr": "2e-2 (from memory)", "matrix_ratio": "0.05 on matrices (third-party code)", "iterations": "5 (third-party code)",
        "adam_betas": "(0.9, 0.999), adam_eps 1e-8", "weight_decay": "0",
    },
    presets={
        **{f"llama-{name}": {"lr": 1e-2} for name in ("tiny", "3m", "9m", "20m")},
        "*": {"lr": 2e-2},
    },
    limits=(
        "Nothing averages the gradient over steps: it must be that of the whole batch, so release with accumulation is refused.",
        "Embedding, head, norms and biases keep dense Adam.",
    ),
    differences=(
        "No official code exists; L = 5 and the factor 0.05 are third-party defaults.",
        "The iterates are kept as two vectors of factors and the matrix is scaled once: the same numbers to rounding.",
        "Rows and columns of zeros stay zero, whatever the size of the rest; third-party code clamps norms at 1e-8.",
    ),
    auto_rank=66,
    state="0",
)  # fmt: skip


def sinkgd_recipe(
    matrix_ratio: float, iterations: int, adam_betas: tuple[float, float], adam_eps: float, targets: Match
) -> Recipe:
    return Recipe(
        ((targets, Stateless(Sinkhorn(iterations), matrix_ratio)), ("*", Adam(adam_betas, adam_eps))), decay="before"
    )


@register(CARD)
class SinkGD(Method):
    """W <- W - lr matrix_ratio X, X = diag(r) G diag(c) with rows and columns of root mean square 1 (arXiv 2502.06742).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights keep no state.
        lr: learning rate; of Adam on the other leaves too.
        matrix_ratio: learning rate of the matrices over lr.
        iterations: L, of a row and a column normalisation each.
        adam_betas, adam_eps: of Adam elsewhere. weight_decay: decoupled, before the step.
        targets: which leaves are normalised: roles, name patterns or a function.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> SinkGD(torch.nn.Linear(16, 8, bias=False), lr=2e-2).state_bytes().total
    0
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-2, matrix_ratio: float = 0.05, iterations: int = 5, *,
        adam_betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, weight_decay: float = 0.0,
        targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "matrix_ratio": matrix_ratio,
            "iterations": iterations,
            "adam_betas": adam_betas,
            "adam_eps": adam_eps,
            "targets": targets,
        }
        super().__init__(
            params, lr, sinkgd_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
