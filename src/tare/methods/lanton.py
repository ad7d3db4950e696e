"""LANTON: Scion whose layers step less the noisier their gradients are among their kind."""

from typing import Any

from torch import Tensor

from tare.core.errors import InputError
from tare.core.leaf import Leaf
from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.lmo import Norm, make_norm
from tare.rules.maps import Orthogonal
from tare.rules.scion import Lanton

CARD = Card(
    key="lanton",
    title="Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for Deep Neural Network Training",
    authors="Hao et al.",
    year=2025,
    arxiv="2510.14009",
    idea="Estimate each layer's gradient noise in the dual of its norm, from differences of successive gradients; layers noisier "
    "than the quietest of their group step less.",
    axes={
        "rule": "averaged gradient, noise-scaled rate", "subspace": "none", "post": "spectral on hidden matrices, sign on "
        "embedding and head, RMS on vectors", "storage": "fp32", "release": "no",
    },
    defaults={
        "lr": "2^-12 (as Scion)", "betas": "(0.95, 0.9) (ours)", "alpha": "1e-3 (ours)",
        "scale": "1; presets as Scion's", "weight_decay": "0",
    },
    presets={"*": {"lr": 2**-12, "scale": 50.0, "table_scale": 3000.0}},
    limits=(
        "The largest a of a group needs all its leaves at once, so that stepping inside backward is refused.",
        "Keeps the previous gradient beside the momentum: Adam's state, with twice Muon's work.",
        "Clipping and compression of gradients change the noise that is measured.",
        "Leaves of one group share a number: what one does depends on the others of its group.",
    ),
    differences=(
        "No code was published, and the paper's constants could not be read: the form a = alpha / (alpha^2 + H)^(1/2) and the "
        "groups are from secondary sources.",
        "The nuclear norm of a difference D is estimated as <NS(D), D>.",
        "The theory uses an independent second gradient; the practical option, the previous step's, is what is offered.",
    ),
    auto_rank=70,
    release="no",
    coupled=True,
    state="8 m n + 4",
)  # fmt: skip

_QK = {"q_proj", "k_proj", "query", "key", "wq", "wk", "qkv", "c_attn", "query_key_value", "qkv_proj"}
_VO = {"v_proj", "o_proj", "value", "wv", "wo", "out_proj"}


def is_query_or_key(leaf: Leaf) -> bool:
    """Query and key projections by their usual names, fused ones too."""
    return leaf.role == "linear" and not _QK.isdisjoint(leaf.name.split("."))


def is_value_or_output(leaf: Leaf) -> bool:
    """Value and output projections of attention by their usual names."""
    return leaf.role == "linear" and not _VO.isdisjoint(leaf.name.split("."))


def lanton_recipe(
    betas: tuple[float, float], alpha: float, hidden: str | Norm, table: str | Norm, vector: str | Norm, scale: float,
    table_scale: float, vector_scale: float, ns_steps: int, ns_dtype: str,
) -> Recipe:  # fmt: skip
    post = Orthogonal(ns_steps, ns_dtype)  # type: ignore[arg-type]

    def rule(name: str, norm: str | Norm, radius: float) -> Lanton:
        """One group: a_max is taken over the leaves that share the object."""
        return Lanton(make_norm(name, norm, post), betas, alpha, radius)

    return Recipe((
        (is_query_or_key, rule("hidden", hidden, scale)), (is_value_or_output, rule("hidden", hidden, scale)),
        (TARGETS, rule("hidden", hidden, scale)), (("embedding", "head"), rule("table", table, table_scale)),
        ("*", rule("vector", vector, vector_scale)),
    ), decay="before")  # fmt: skip


@register(CARD)
class LANTON(Method):
    """W <- (1 - lr wd) W - lr sqrt(a_l / a_max) scale lmo(B_l), B <- b1 B + (1-b1) G (arXiv 2510.14009).

    a_l = alpha / sqrt(alpha^2 + H_l), H <- b2 H + (1-b2) |G_t - G_{t-1}|^2 in the dual norm, H = 0 at the first step; a_max over
    the leaves of one group: query and key, value and output, other hidden matrices, embedding and head, vectors. A parameter
    group with hyperparameters of its own has groups of its own.

    Args:
        params: module, tensors, named tensors or groups. Attention's kinds are told by names.
        lr: learning rate, an upper bound of each layer's own.
        betas: of the average and of the noise.
        alpha: noise below which layers count as alike, in the units of the gradient's dual norm.
        hidden, table, vector: norms of hidden matrices, of embedding and head, of all else; see `Scion`.
        scale, table_scale, vector_scale: radii.
        ns_steps, ns_dtype: of Newton-Schulz. weight_decay: decoupled, before the step; 1 is Scion's constrained form.
        storage, seed, maximize: see `tare.Optimizer`. release: refused.

    >>> import torch
    >>> opt = LANTON(torch.nn.Linear(16, 8, bias=False), lr=2**-12, scale=50.0)
    >>> opt.state_bytes().total == 8 * 16 * 8 + 4
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 2**-12, betas: tuple[float, float] = (0.95, 0.9),
        alpha: float = 1e-3, *, hidden: str | Norm = "auto", table: str | Norm = "sign",
        vector: str | Norm = "bias-rms", scale: float = 1.0, table_scale: float = 1.0, vector_scale: float = 1.0,
        ns_steps: int = 5, ns_dtype: str = "bf16", weight_decay: float = 0.0,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        if release:
            raise InputError(
                "release: LANTON compares all layers of a group before any of them steps; use release=False"
            )
        hyper = {
            "betas": betas, "alpha": alpha, "hidden": hidden, "table": table, "vector": vector, "scale": scale,
            "table_scale": table_scale, "vector_scale": vector_scale, "ns_steps": ns_steps, "ns_dtype": ns_dtype,
        }  # fmt: skip
        super().__init__(
            params, lr, lanton_recipe, hyper, weight_decay=weight_decay, storage=storage, seed=seed, maximize=maximize
        )  # fmt: skip
