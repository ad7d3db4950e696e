"""Scion: every layer steps along the oracle of its own norm ball."""

import warnings
from typing import Any

import torch
from torch import Tensor

from tare.core.errors import InputError
from tare.core.random import make_key
from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.lmo import Norm, make_norm
from tare.rules.maps import Orthogonal
from tare.rules.scion import Scion as ScionRule

# The published nanoGPT settings: hidden radius 50, sign radius 3000 on the tied embedding and head, lr 2^-12.
NANOGPT = {"lr": 2**-12, "scale": 50.0, "embedding_scale": 3000.0, "head_scale": 3000.0, "weight_decay": 0.0}

CARD = Card(
    key="scion",
    title="Training Deep Learning Models with Norm-Constrained LMOs",
    authors="Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher",
    year=2025,
    arxiv="2502.07529",
    idea="Give every layer a norm; step along the steepest direction of that norm, optionally staying in its ball. One "
    "moment, or none beside the gradient.",
    axes={
        "rule": "averaged gradient", "subspace": "none", "post": "spectral on hidden matrices, sign on embedding and head, "
        "RMS on vectors", "storage": "fp32", "release": "yes, not with light",
    },
    defaults={
        "lr": "2^-12 (nanoGPT example)", "averaging": "0.1 (example; one minus the usual momentum)",
        "scale": "1 (class); 50 hidden and 3000 embedding and head in the nanoGPT example, which is the preset",
        "weight_decay": "1: the constrained form; 0 is the unconstrained one",
    },
    presets={"*": NANOGPT},
    limits=(
        "The constrained form shrinks weights by lr at every step, also where the gradient is zero.",
        "light=True keeps the average in p.grad: nothing else may zero, replace or clip gradients, they are not in the "
        "checkpoint (a resumed run starts its average anew), and release is refused.",
        "A step needs room for the matrix in bf16 and its Gram matrix.",
    ),
    differences=(
        "constrained and unconstrained are weight_decay = 1 and 0, the same algebra.",
        "The published light form asks the user never to call zero_grad; here the optimizer's zero_grad does nothing with light.",
        "Spectral on a convolution takes its flattened matrix; the published class accepts matrices only.",
    ),
    auto_rank=65,
    state="4 m n; 0 with light",
)  # fmt: skip


def scion_recipe(
    averaging: float, hidden: str | Norm, embedding: str | Norm, head: str | Norm, vector: str | Norm, scale: float,
    embedding_scale: float, head_scale: float, vector_scale: float, ns_steps: int, ns_dtype: str,
) -> Recipe:  # fmt: skip
    post = Orthogonal(ns_steps, ns_dtype)  # type: ignore[arg-type]

    def rule(name: str, norm: str | Norm, radius: float) -> ScionRule:
        return ScionRule(make_norm(name, norm, post), averaging, radius)

    return Recipe((
        (TARGETS, rule("hidden", hidden, scale)), ("embedding", rule("embedding", embedding, embedding_scale)),
        ("head", rule("head", head, head_scale)), ("*", rule("vector", vector, vector_scale)),
    ), decay="before")  # fmt: skip


@register(CARD)
class Scion(Method):
    """B <- (1-a) B + a G; W <- (1 - lr wd) W - lr scale lmo(B), wd = 1 constrained, 0 unconstrained (arXiv 2502.07529).

    Args:
        params: module, tensors, named tensors or groups; a group may hold its own norms and scales.
        lr: learning rate.
        averaging: a, one minus the usual momentum factor.
        hidden, embedding, head, vector: norms of the four kinds of leaves: `auto`, `spectral`, `spectral-conv`, `sign`,
            `col-norm`, `row-norm`, `bias-rms`, or a `Norm`. hidden: linear, convolution and expert weights.
        scale, embedding_scale, head_scale, vector_scale: radii of their balls.
        light: keep no state: the average lives in p.grad, which `step` multiplies by 1 - a and `zero_grad` leaves alone. The
            gradient is added with weight 1, so that the stored average is B / a; the oracle does not feel the scale.
        ns_steps, ns_dtype: of Newton-Schulz: 5, `bf16` (published) or `fp32`.
        weight_decay: 1 keeps W in the ball (constrained); 0 is unconstrained.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = Scion(torch.nn.Linear(16, 8, bias=False), lr=2**-12, scale=50.0)
    >>> opt.state_bytes().total == 4 * 16 * 8
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 2**-12, averaging: float = 0.1, *, hidden: str | Norm = "auto",
        embedding: str | Norm = "sign", head: str | Norm = "sign", vector: str | Norm = "bias-rms", scale: float = 1.0,
        embedding_scale: float = 1.0, head_scale: float = 1.0, vector_scale: float = 1.0, light: bool = False,
        ns_steps: int = 5, ns_dtype: str = "bf16", weight_decay: float = 1.0,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        if light and release:
            raise InputError("light: the average is kept in p.grad, which release frees; leave out one of the two")
        self.light, self.averaging = light, averaging
        hyper = {
            "averaging": averaging, "hidden": hidden, "embedding": embedding, "head": head, "vector": vector,
            "scale": scale, "embedding_scale": embedding_scale, "head_scale": head_scale, "vector_scale": vector_scale,
            "ns_steps": ns_steps, "ns_dtype": ns_dtype,
        }  # fmt: skip
        scion_recipe(**hyper)  # type: ignore[arg-type]  # checks `averaging` before light replaces it
        super().__init__(
            params, lr, scion_recipe, {**hyper, "averaging": 1.0} if light else hyper, weight_decay=weight_decay,
            storage=storage, release=release, seed=seed, maximize=maximize,
        )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; with light nothing, since p.grad is the average."""
        if not self.light:
            super().zero_grad(set_to_none)

    def stepped(self) -> None:
        if self.light:
            self._fade()

    def _fade(self) -> None:
        """p.grad <- (1-a) p.grad, and a mark on it, by which a replaced one is noticed."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.state[p]["step"] > 1 and not getattr(p.grad, "is_average", False):
                    warnings.warn(
                        "Scion(light=True): p.grad was replaced or zeroed since the last step, so the average starts anew; "
                        "leave gradients alone, or use light=False",
                        stacklevel=3,
                    )
                p.grad.mul_(1.0 - self.averaging)
                p.grad.is_average = True

    @torch.no_grad()
    def init_(self) -> None:
        """Re-initialise every weight on the ball of its norm, of the radius of its scale (published `init`).

        Matrices: scaled semi-orthogonal, random signs or normalised normals; vectors: zero, gains of norms included, which
        need another norm or no call of this where they multiply. Random numbers depend on seed and name only.
        """
        for p, entry in self._entries.items():
            rule = entry.transform
            assert isinstance(rule, ScionRule)
            key = make_key(int(entry.group["seed"]), f"{entry.key}/init")
            if p.numel():
                p.copy_(rule.norm.initial(entry.leaf, key) * rule.scale)
