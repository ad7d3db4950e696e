"""GaLore+: GaLore for fine-tuning with one head's projection for all heads, a randomized basis, and a sparse correction."""

from typing import Any

from torch import Tensor, nn

from tare.core.leaf import Leaf
from tare.core.recipe import Match, Recipe, matches
from tare.core.storage import Storage
from tare.methods.base import TARGETS, Method
from tare.methods.galore import CARD as GALORE
from tare.methods.galore import LARGE_PRESETS, llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.subspace.bases import Basis, RandomizedBasis
from tare.subspace.catalogue import make_basis
from tare.subspace.heads import HeadBasis
from tare.subspace.refresh import Refresh
from tare.subspace.sparse import SparseResidual
from tare.subspace.wrapper import Subspace

# Names of query and key weights in transformers' decoders and encoders.
HEADS = ("*.q_proj.weight", "*.k_proj.weight", "*.query.weight", "*.key.weight")

CARD = Card(
    key="galore-plus",
    title="GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection",
    authors="Liao, Li, Zhang, Wang, Chen, Xiong",
    year=2024,
    arxiv="2412.19820",
    idea="GaLore whose query and key weights share the projection of one random head, found by randomized subspace "
    "iteration; the few entries that the subspace misses most get Adam of their own.",
    axes={
        **GALORE.axes, "basis": "randomized subspace iteration; one head for all in query and key weights",
        "residual": "Adam on a sparse set of entries", "release": "yes, one micro-batch per step",
    },
    defaults={
        "lr": "1e-2 pretraining, fine-tuning far less", "rank": "32 (paper's ablation)", "period": "200", "scale": "0.25",
        "density": "0.012 (paper's ablation: 0, 0.6, 1.2, 1.8 %)", "power": "2, oversample 8 (not stated in what was read)",
        "weight_decay": "0",
    },
    presets={
        **llama_presets(1e-2, {"tiny": 16, "3m": 24, "9m": 32, "20m": 32, "60m": 32, "130m": 32, "350m": 32}),
        **{name: {**p, "rank": 32} for name, p in LARGE_PRESETS.items()},
    },
    limits=(
        "No code was published and the exact algorithm could not be opened: abstract, reviews and summaries only.",
        "rank must not exceed the dimension of a head; where it does, these weights take the ordinary projection.",
        "Grouped queries: key weights have fewer heads, each still gives and takes one basis.",
        "Needs the whole gradient: no small accumulation in release mode.",
    ),
    differences=(
        "The paper chooses the sparse entries after a window with full-size statistics; here at the first usable step, which "
        "needs no such memory.",
        "The correction is multiplied by the same alpha as the lifted update.",
    ),
    auto_rank=74,
    release="yes",
    state="4 (2 r l + r s) + 12 density m n; query and key: r d in place of r s",
)  # fmt: skip


def galore_plus_recipe(
    rank: int, period: int, scale: float, density: float, head_dim: int | None, heads: tuple[str, ...], power: int,
    oversample: int, side: str, basis: str | Basis | None, betas: tuple[float, float], eps: float, transfer: str,
    stagger: bool, targets: Match,
) -> Recipe:  # fmt: skip
    rule = Adam(betas, eps, "before")
    residual = SparseResidual(density, betas) if density else None
    finder = (
        RandomizedBasis(rank, power, warm=False, oversample=oversample) if basis is None else make_basis(basis, rank)
    )

    def low(of: Basis) -> Subspace:
        return Subspace(
            rule, of, Refresh(period, stagger), side_name(side), transfer, scale=scale, residual=residual  # type: ignore[arg-type]
        )  # fmt: skip

    entries: list[Any] = [(targets, low(finder)), ("*", rule)]
    if head_dim is not None and rank <= head_dim:

        def has_heads(leaf: Leaf) -> bool:
            named = any(matches(pattern, leaf) for pattern in heads)
            return named and matches(targets, leaf) and leaf.matrix is not None and leaf.matrix[0] % head_dim == 0

        entries.insert(0, (has_heads, low(HeadBasis(rank, head_dim, finder))))
    return Recipe(tuple(entries), decay="after")


def head_dim_of(model: nn.Module) -> int | None:
    """Rows of one head, from a transformers config; None where the model does not say."""
    config = getattr(model, "config", None)
    found = getattr(config, "head_dim", None)
    if isinstance(found, int) and found > 0:
        return found
    width, count = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return width // count if isinstance(width, int) and isinstance(count, int) and count else None


@register(CARD)
class GaLorePlus(Method):
    """GaLore with P of one head for all heads and Adam on the sparse rest (Liao et al. 2024, arXiv 2412.19820).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights are projected.
        lr, period, scale, side, betas, eps, weight_decay, transfer, stagger, targets: as `GaLore`.
        rank: r; for query and key weights the rank within a head.
        density: share of entries with Adam of their own; 0 drops the residual.
        head_dim: rows of a head; None takes it from a transformers model's config, or does without heads.
        heads: name patterns of the weights whose rows are heads.
        power, oversample: of the randomized subspace iteration.
        basis: another basis (`svd` for GaLore's own).
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = GaLorePlus(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4, density=0.125)
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16 + 4 * 8) + 12 * 16
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 32, period: int = 200, scale: float = 0.25, *,
        density: float = 0.012, head_dim: int | None = None, heads: tuple[str, ...] = HEADS, power: int = 2,
        oversample: int = 8, side: str = "shorter", basis: str | Basis | None = None,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0, transfer: str = "keep",
        stagger: bool = False, targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None,
        release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        if head_dim is None and isinstance(params, nn.Module):
            head_dim = head_dim_of(params)
        hyper = {
            "rank": rank, "period": period, "scale": scale, "density": density, "head_dim": head_dim, "heads": heads,
            "power": power, "oversample": oversample, "side": side, "basis": basis, "betas": betas, "eps": eps,
            "transfer": transfer, "stagger": stagger, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, galore_plus_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release,
            seed=seed, maximize=maximize,
        )  # fmt: skip
