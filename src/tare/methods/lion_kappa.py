"""Lion-K: Lion with the gradient of another convex function in the place of the sign."""

from typing import Any

from torch import Tensor

from tare.core.checks import check_choice
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base import TARGETS, Method
from tare.methods.registry import Card, register
from tare.rules.lion import Lion
from tare.rules.lion_kappa import LionKappa as LionKappaRule
from tare.rules.maps import DeadZone, Huber, Orthogonal, PostMap, UnitNorm

KAPPAS = ("l1", "l2", "nuclear", "dead-zone", "huber")

CARD = Card(
    key="lion-kappa",
    title="Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
    authors="Chen, Liu, Liang, Liu",
    year=2024,
    arxiv="2310.05898",
    idea="Replace Lion's sign by the gradient of any convex K: with weight decay, W is kept in the ball of K's dual norm.",
    axes={
        "rule": "Lion-K", "subspace": "none", "post": "sign, unit norm, orthogonal, dead zone or clip", "storage": "fp32",
        "release": "yes",
    },
    defaults={
        "lr": "1e-4 (as Lion)", "betas": "(0.9, 0.99) (as Lion)", "kappa": "nuclear (ours)", "width": "1e-3 (ours)",
        "size": "rms (ours)", "weight_decay": "0; the ball has radius size / weight_decay",
    },
    presets={
        **{f"llama-{name}": {"lr": 5e-4, "weight_decay": 0.1} for name in ("tiny", "3m", "9m", "20m")},
        "*": {"lr": 1e-4, "weight_decay": 0.1},
    },
    limits=(
        "K acts on matrices; embedding, head, norms and biases take Lion's sign.",
        "width of dead-zone and huber is in units of the gradient, so that it depends on the loss's scale.",
    ),
    differences=(
        "The paper is about theory: no code, no recommended K. kappa='l1' is Lion itself.",
        "size='rms' multiplies unit-norm and orthogonal directions so that their entries have the size of a sign; "
        "size='unit' is the bare gradient of K.",
        "The polar factor of kappa='nuclear' is Newton-Schulz's; backend='svd' is exact.",
    ),
    auto_rank=68,
    state="4 m n",
)  # fmt: skip


def kappa_rule(
    kappa: str | PostMap, width: float, size: str, betas: tuple[float, float], ns_dtype: str, backend: str
) -> Transform:
    """The rule for one K."""
    if isinstance(kappa, PostMap):
        return LionKappaRule(kappa, betas, size)  # type: ignore[arg-type]
    check_choice("kappa", kappa, KAPPAS)
    posts = {
        "l2": UnitNorm(), "nuclear": Orthogonal(dtype=ns_dtype, backend=backend),  # type: ignore[arg-type]
        "dead-zone": DeadZone(width), "huber": Huber(width),
    }  # fmt: skip
    other = LionKappaRule(posts[kappa if kappa != "l1" else "l2"], betas, size)  # type: ignore[arg-type]
    return Lion(betas) if kappa == "l1" else other


def lion_kappa_recipe(
    kappa: str | PostMap, width: float, size: str, betas: tuple[float, float], ns_dtype: str, backend: str,
    targets: Match,
) -> Recipe:  # fmt: skip
    rule = kappa_rule(kappa, width, size, betas, ns_dtype, backend)
    return Recipe(((targets, rule), ("*", Lion(betas))), decay="before")


@register(CARD)
class LionKappa(Method):
    """W <- (1 - lr wd) W - lr size grad K(b1 M + (1-b1) G); M <- b2 M + (1-b2) G (arXiv 2310.05898).

    Args:
        params: module, tensors, named tensors or groups.
        lr: learning rate, as Lion's.
        kappa: K: `l1` (Lion), `l2` (normalised momentum), `nuclear` (orthogonalised), `dead-zone` (sign of what exceeds
            `width`), `huber` (clipped at `width`), or a `PostMap`.
        width: of the dead zone or of Huber's quadratic part.
        size: `rms` or `unit`; see `tare.rules.lion_kappa`.
        betas: read-out, average. weight_decay: decoupled, before the step.
        ns_dtype, backend: of the polar factor; see `tare.rules.orthogonal`.
        targets: on which leaves K acts; sign elsewhere.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> LionKappa(torch.nn.Linear(4, 3), lr=1e-4, kappa="l2").state_bytes().total
    60
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, kappa: str | PostMap = "nuclear", width: float = 1e-3, *,
        size: str = "rms", betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, ns_dtype: str = "bf16",
        backend: str = "newton-schulz", targets: Match = TARGETS, storage: Storage | dict[str, Any] | None = None,
        release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "kappa": kappa, "width": width, "size": size, "betas": betas, "ns_dtype": ns_dtype, "backend": backend,
            "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, lion_kappa_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release,
            seed=seed, maximize=maximize,
        )  # fmt: skip
