"""Muon: momentum, orthogonalised by Newton-Schulz; Adam for what is no hidden matrix."""

from typing import Any

from torch import Tensor

from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.maps import Orthogonal
from tare.rules.muon import Muon as MuonRule
from tare.rules.own_rate import OwnRate

CARD = Card(
    key="muon",
    title="Muon: An optimizer for hidden layers in neural networks",
    authors="Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein",
    year=2024,
    arxiv="kellerjordan.github.io/posts/muon",
    idea="Step along U V^T of the Nesterov momentum of each hidden matrix: every singular direction moves alike. One moment.",
    axes={
        "rule": "EMA momentum 0.95, Nesterov; Adam elsewhere", "subspace": "none", "post": "Newton-Schulz, 5 steps, bf16",
        "storage": "fp32", "release": "yes",
    },
    defaults={
        "lr": "2e-2 (code)", "momentum": "0.95 (code)", "ns_steps": "5 (code)", "factor": "max(1, rows/cols)^0.5 (code)",
        "adam_ratio": "0.015: Adam at 3e-4 (code)", "adam_betas": "(0.9, 0.95), adam_eps 1e-10 (code)",
        "weight_decay": "0 (code); 0.1 in Moonlight",
    },
    presets={  # small models run for hundreds of steps, in which their embeddings have to move too
        **{f"llama-{name}": {"lr": 2e-2, "adam_ratio": 0.1} for name in ("tiny", "3m", "9m", "20m")},
        "*": {"lr": 2e-2},
    },
    limits=(
        "Embedding, head, norms and biases keep dense Adam.",
        "Newton-Schulz with these coefficients leaves singular values between 0.68 and 1.2, and those below 1e-3 of the "
        "norm smaller still; backend='svd' is exact and slow.",
        "A step needs room for the matrix in bf16 and its Gram matrix.",
    ),
    differences=(
        "The published step writes the Nesterov average into p.grad; here gradients are only read.",
        "Convolutions are flattened to out x (in * kernel), but the published shape factor looks at the kernel's sides: "
        "factor='original' keeps that, factor='matrix' uses the flattened shape.",
        "Published bf16 products are done in fp32 on the bf16 iterate where a CPU has no bf16 units.",
        "The published parameter groups carry two learning rates; here Adam's is adam_ratio times the group's.",
        "Moonlight's variant is factor='moonlight' with weight_decay=0.1.",
    ),
    auto_rank=64,
    state="4 m n",
)  # fmt: skip


def muon_recipe(
    momentum: float, nesterov: bool, ns_steps: int, ns_dtype: str, backend: str, factor: str, adam_ratio: float,
    adam_betas: tuple[float, float], adam_eps: float, targets: Match,
) -> Recipe:  # fmt: skip
    post = Orthogonal(ns_steps, ns_dtype, backend)  # type: ignore[arg-type]
    rule = MuonRule(momentum, nesterov, post, factor)  # type: ignore[arg-type]
    return Recipe(((targets, rule), ("*", OwnRate(Adam(adam_betas, adam_eps), adam_ratio))), decay="before")


@register(CARD)
class Muon(Method):
    """M <- b M + (1-b) G; W <- (1 - lr wd) W - lr factor NS((1-b) G + b M) (Jordan 2024).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights are orthogonalised.
        lr: learning rate of those, 2e-2 in the published code.
        momentum: b.
        nesterov: orthogonalise the average of M and G (published) or M.
        ns_steps: Newton-Schulz steps. ns_dtype: `bf16` (published) or `fp32`. backend: `newton-schulz` or exact `svd`.
        factor: `original`, `matrix` or `moonlight`; see `tare.rules.muon`.
        adam_ratio: learning rate of Adam over lr, on all other leaves; adam_betas, adam_eps: of that Adam.
        weight_decay: decoupled, before the step.
        targets: which leaves are orthogonalised: roles, name patterns or a function.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> Muon(torch.nn.Linear(16, 8, bias=False), lr=2e-2).state_bytes().total == 4 * 16 * 8
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-2, momentum: float = 0.95, *, nesterov: bool = True,
        ns_steps: int = 5, ns_dtype: str = "bf16", backend: str = "newton-schulz", factor: str = "original",
        adam_ratio: float = 0.015, adam_betas: tuple[float, float] = (0.9, 0.95), adam_eps: float = 1e-10,
        weight_decay: float = 0.0, targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None,
        release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype, "backend": backend,
            "factor": factor, "adam_ratio": adam_ratio, "adam_betas": adam_betas, "adam_eps": adam_eps, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, muon_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip
