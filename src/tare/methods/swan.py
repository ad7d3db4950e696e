"""SWAN: no state for matrices; the gradient with normalised rows, whitened."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.maps import Whiten
from tare.rules.stateless import Stateless

CARD = Card(
    key="swan",
    title="SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training",
    authors="Ma, Gong, Scetbon, Meeds",
    year=2025,
    arxiv="2412.13148",
    idea="Normalise the rows of the gradient, then whiten it: both moments of Adam without keeping either.",
    axes={
        "rule": "none on matrices; Adam elsewhere", "subspace": "none",
        "post": "rows centred and scaled, (G G^T)^(-1/2) G by 10 Newton-Schulz steps", "storage": "none", "release": "yes",
    },
    defaults={
        "lr": "2e-2 (ours)", "matrix_ratio": "0.05 (ours, as SinkGD's)", "iterations": "10", "rows": "centred (paper)",
        "rescale": "to the norm before whitening", "weight_decay": "0",
    },
    presets={
        **{f"llama-{name}": {"lr": 1e-2} for name in ("tiny", "3m", "9m", "20m")},
        "*": {"lr": 2e-2},
    },
    limits=(
        "Nothing averages the gradient over steps: it must be that of the whole batch, so release with accumulation is refused.",
        "Embedding, head, norms and biases keep dense Adam.",
        "Whitening takes 60 s^3 multiplications on the shorter side s.",
    ),
    differences=(
        "No official code exists. Some implementations divide rows by their root mean square without centring: rows='rms'.",
        "Rows run along the longer side: a tall gradient is transposed first.",
    ),
    auto_rank=67,
    state="0",
)  # fmt: skip


def swan_recipe(
    matrix_ratio: float, iterations: int, rows: str, rescale: bool, backend: str, adam_betas: tuple[float, float], adam_eps: float,
    targets: Match,
) -> Recipe:  # fmt: skip
    post = Whiten(iterations, rows, rescale, backend)  # type: ignore[arg-type]
    return Recipe(((targets, Stateless(post, matrix_ratio)), ("*", Adam(adam_betas, adam_eps))), decay="before")


@register(CARD)
class SWAN(Method):
    """W <- W - lr matrix_ratio D, D = (N N^T)^(-1/2) N rescaled to |N|_F, N the row-normalised gradient (arXiv 2412.13148).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights keep no state.
        lr: learning rate; of Adam on the other leaves too.
        matrix_ratio: learning rate of the matrices over lr.
        iterations: of Newton-Schulz. backend: `newton-schulz` or the exact `eigh`.
        rows: `centred` (paper), `rms` (without centring) or `none`.
        rescale: give D the Frobenius norm of N.
        adam_betas, adam_eps: of Adam elsewhere. weight_decay: decoupled, before the step.
        targets: which leaves are whitened: roles, name patterns or a function.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> SWAN(torch.nn.Linear(16, 8, bias=False), lr=2e-2).state_bytes().total
    0
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-2, matrix_ratio: float = 0.05, iterations: int = 10, *,
        rows: str = "centred", rescale: bool = True, backend: str = "newton-schulz",
        adam_betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, weight_decay: float = 0.0,
        targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "matrix_ratio": matrix_ratio, "iterations": iterations, "rows": rows, "rescale": rescale, "backend": backend,
            "adam_betas": adam_betas, "adam_eps": adam_eps, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, swan_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
