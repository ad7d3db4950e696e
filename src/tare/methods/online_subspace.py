"""Online Subspace Descent: the projection follows the gradient by one optimizer step at every update instead of a periodic SVD."""

from typing import Any, Literal

from torch import Tensor

from tare.core.checks import check_choice
from tare.core.recipe import Match, Recipe
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base import TARGETS, Method
from tare.methods.galore import LARGE_PRESETS, llama_presets, side_name
from tare.methods.registry import Card, register
from tare.rules.adafactor import Adafactor
from tare.rules.adam import Adam
from tare.rules.lion import Lion
from tare.rules.maps import Sign
from tare.subspace.bases import Basis
from tare.subspace.catalogue import instead
from tare.subspace.online import OnlineBasis
from tare.subspace.refresh import Refresh
from tare.subspace.wrapper import Subspace

NEVER = 10**12  # updates: P starts from the first usable gradient and is never computed anew

CARD = Card(
    key="online-subspace",
    title="Memory-Efficient LLM Training with Online Subspace Descent",
    authors="Liang, Liu, Chen, Liu",
    year=2024,
    arxiv="2408.12857",
    idea="Replace GaLore's periodic SVD by one optimizer step on an online-PCA loss for the projection at every update.",
    axes={
        "rule": "Adam (eps before bias correction), Adafactor, or Lion with the sign taken after lifting",
        "basis": "SVD once, then AdamW on ||P P^T G - G||^2", "refresh": "every step", "transfer": "keep",
        "lift": "back-projection x 0.25", "residual": "dropped", "release": "yes, one micro-batch per step",
    },
    defaults={
        "lr": "1e-2 (as GaLore)", "rank": "as GaLore", "gap": "200: lr of P is lr / (first lr) / gap", "scale": "0.25",
        "eps": "1e-6 (code)", "basis_weight_decay": "0.01 (torch's AdamW default, as in the code)",
    },
    presets={
        **{n: {k: v for k, v in p.items() if k != "period"} for n, p in llama_presets(1e-2).items()},
        **{n: {k: v for k, v in p.items() if k != "period"} for n, p in LARGE_PRESETS.items()},
        "llama-7b": {"lr": 5e-3, "rank": 1024, "gap": 500},
    },
    limits=(
        "P is not orthonormal after the first step; its scale drifts (AdamW's decay shrinks it) and enters the update.",
        "In a bf16 basis small steps of P are lost: keep storage basis='fp32'.",
        "Needs the whole gradient at every step: no small accumulation in release mode.",
    ),
    differences=(
        "The paper adds lambda ||P^T P - I||^2 (argument orthogonality) and decays P; the code has no such term: 0 is the "
        "default.",
        "The gradient of the loss is formed from two thin products; the code differentiates through two m x n matrices.",
        "A zero gradient divides by zero in the code; here it leaves P but for its decay.",
    ),
    auto_rank=70,
    release="yes",
    state="4 (2 r l + 3 r s)",
)  # fmt: skip


def online_recipe(
    rank: int, gap: int, scale: float, rule: str, side: str, basis: str | Basis | None, mover: str,
    basis_weight_decay: float, orthogonality: float, betas: tuple[float, float], eps: float, targets: Match,
) -> Recipe:  # fmt: skip
    check_choice("rule", rule, ("adam", "lion", "adafactor"))
    rules: dict[str, Transform] = {"adam": Adam(betas, eps, "before"), "lion": Lion(betas, sign=False)}
    inner = rules.get(rule) or Adafactor(betas[0])
    own = OnlineBasis(rank, gap, mover, weight_decay=basis_weight_decay, orthogonality=orthogonality)  # type: ignore[arg-type]
    low = Subspace(
        inner, instead(basis, own), Refresh(NEVER), side_name(side), scale=1.0 if rule == "lion" else scale,
        post=Sign() if rule == "lion" else None,
    )  # fmt: skip
    dense = Lion(betas) if rule == "lion" else inner
    # The code's Adafactor decays before its update, its AdamW and its Lion after.
    return Recipe(((targets, low), ("*", dense)), decay="before" if rule == "adafactor" else "after")


@register(CARD)
class OnlineSubspace(Method):
    """GaLore with P <- P - lr_P AdamW(d||P P^T H - H||^2 / dP), H = G / |G|, after every update (Liang et al. 2024).

    Args:
        params: module, tensors, named tensors or groups. Linear, convolution and expert weights are projected.
        lr: learning rate; also what the learning rate of P is relative to, see `gap`.
        rank, scale, side, eps, targets: as `GaLore`.
        gap: the learning rate of P is lr_t / (lr * gap): it follows the schedule.
        rule: `adam`, `lion` (betas default to (0.9, 0.99) there; sign in the full space, scale without effect), `adafactor`.
        mover: how P steps: `adamw`, `lion`, `sgd`. basis_weight_decay: of it. orthogonality: lambda of the paper.
        basis: a recorded or other basis in place of the moving one.
        storage, release, seed, maximize: see `tare.Optimizer`.

    >>> import torch
    >>> opt = OnlineSubspace(torch.nn.Linear(16, 8, bias=False), lr=1e-2, rank=4)
    >>> opt.state_bytes().total == 4 * (2 * 4 * 16 + 3 * 4 * 8)
    True
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, rank: int = 128, gap: int = 200, scale: float = 0.25, *,
        rule: Literal["adam", "lion", "adafactor"] = "adam", side: str = "shorter", basis: str | Basis | None = None,
        mover: Literal["adamw", "lion", "sgd"] = "adamw", basis_weight_decay: float = 0.01, orthogonality: float = 0.0,
        betas: tuple[float, float] | None = None, eps: float = 1e-6, weight_decay: float = 0.0, targets: Match = TARGETS,
        storage: Storage | dict[str, Any] | None = None, release: bool = False, seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        if betas is None:
            betas = (0.9, 0.99) if rule == "lion" else (0.9, 0.999)
        hyper = {
            "rank": rank, "gap": gap, "scale": scale, "rule": rule, "side": side, "basis": basis, "mover": mover,
            "basis_weight_decay": basis_weight_decay, "orthogonality": orthogonality,
            "betas": betas, "eps": eps, "targets": targets,
        }  # fmt: skip
        super().__init__(
            params, lr, online_recipe, hyper, weight_decay=weight_decay, storage=storage, release=release, seed=seed,
            maximize=maximize,
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # the lr that the lr of P is relative to: state, as it outlives a schedule
            lr = param_group.get("lr", self.defaults["lr"])
            lone = isinstance(lr, int | float) or (isinstance(lr, Tensor) and lr.numel() == 1)
            param_group.setdefault("reference_lr", float(lr) if lone else 1.0)  # a bad lr is refused below
        super().add_param_group(param_group)
