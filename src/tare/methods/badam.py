"""BAdam: Adam on one layer at a time; the others are frozen meanwhile, and have neither state nor gradients."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from tare.core.blocks import Layers, Rotation
from tare.core.checks import check_choice, check_whole
from tare.core.errors import InputError
from tare.core.orders import Order, Reshuffled
from tare.core.recipe import Recipe
from tare.core.storage import Storage
from tare.methods.base import Method
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.rotating import Rotating, make_order

ALL = ("embed", "lm_head", "norm")  # what FRUGAL's comparison keeps on when it pretrains with BAdam

CARD = Card(
    key="badam",
    title="BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    authors="Luo, Yu, Li",
    year=2024,
    arxiv="2404.02827",
    idea="Train one transformer layer at a time with Adam and an fp32 master copy, then the next: state, master and gradients exist "
    "for one layer only, and every weight is still trained.",
    axes={
        "rule": "Adam, counted from the start of a layer's turn", "basis": "whole layers",
        "refresh": "K = 50", "transfer": "zero, step count too", "lift": "identity", "residual": "frozen, no gradient",
        "storage": "fp32 master of 16-bit weights of the layer that is on", "release": "yes",
    },
    defaults={
        "lr": "1e-5 (fine-tuning; 1e-3 to pretrain)", "period": "50 (class in the code; README 100 and the advice "
        "min(max(n / (B D), 50), 100) for n samples, batch B, D layers)",
        "order": "random, each layer once a round (paper, README; class in the code: descending)",
        "include_embedding, include_lm_head": "False (code)", "form": "paper", "weight_decay": "0",
    },
    presets={
        **{
            f"llama-{n}": {"lr": 1e-3, "period": 20, "active_modules": ALL} for n in ("tiny", "3m", "9m", "20m")
        },
        **{f"llama-{n}": {"lr": 1e-3, "period": 100, "active_modules": ALL} for n in ("60m", "130m", "350m", "1b")},
        "*": {"lr": 1e-5, "period": 100},
    },
    limits=(
        "Embedding and head are never trained unless included or listed as active modules: made for fine-tuning. The presets of "
        "models that are trained from nothing keep them, and the norms, on.",
        "It switches requires_grad of parameters; `close()` gives it back. What has to know beforehand which parameters get "
        "gradients (DDP, compiled graphs) has to be told at every turn.",
        "The end of an update is the call of step(), also in release mode.",
        "state_bytes and the plan show the layer with most state; the layer nearest to the input keeps most activations.",
        "torch.distributed.checkpoint's own state-dict functions see only what has requires_grad: load through "
        "load_state_dict, or they refuse.",
    ),
    differences=(
        "First turn: the code switches when the number of steps done plus one is a multiple of K, so the first layer gets K - 1; "
        "form='paper' (default) gives it K, form='code' K - 1.",
        "Always-active modules: the code drops all state at every turn, theirs too; form='paper' (default) keeps it.",
        "Decay: the code means to spare biases and norms, but its defaults override that and all that is on decays. So it is here in "
        "both forms; groups with weight_decay=0 spare what they hold, as with every method.",
        "include_lm_head without include_embedding: the code puts the embedding into the head's block; here it stays frozen.",
        "Layers are found by the first number in a name, so also `h.3.` and `layer.3.`; the code knows `layers.` only. Models "
        "without numbers rotate module by module, unnamed tensors one by one.",
        "Orders are drawn from a generator keyed by (seed, round, layer), not from the global one of each rank.",
        "order='greedy' (Gauss-Southwell-Lipschitz, arXiv 1712.08859) compares what each layer's gradients were at its last turn: a "
        "survey of all layers would need all gradients at once.",
    ),
    auto_rank=62,
    release="yes",
    every_leaf={"active_modules": ("*",)},
    state="8 m n (+ 4 m n master of 16-bit weights) of one layer",
)  # fmt: skip


def badam_recipe(
    period: int, order: str | Order, include_embedding: bool, include_lm_head: bool, active_modules: Sequence[str],
    betas: tuple[float, float], eps: float, form: str,
) -> Recipe:  # fmt: skip
    check_choice("form", form, ("paper", "code"))
    code = form == "code"
    first = max(1, check_whole("period", period) - 1) if code else None
    layers = Layers(include_embedding, include_lm_head, active_modules)  # type: ignore[arg-type]
    turns = make_order(order, random=Reshuffled)
    rotation = Rotation(layers, turns, period, first, gate=True, reset_always=code)
    return Recipe((("*", Rotating(Adam(betas, eps), None, rotation)),), decay="before")


def with_master(storage: Storage | dict[str, Any] | None) -> Storage:
    """16-bit weights have an fp32 master while they are trained, unless a whole policy says otherwise."""
    return storage if isinstance(storage, Storage) else Storage.of({"weight": "master", **(storage or {})})


@register(CARD)
class BAdam(Method):
    """W_b <- W_b - lr Adam(G_b) for the layer b that is on, for K updates; then its state is dropped (Luo 2024, arXiv 2404.02827).

    Args:
        params: module, named tensors or groups: layers are found by name.
        lr: learning rate of what is on.
        period: K, updates of a turn.
        order: `random` (each layer once a round), `ascending`, `descending`, `mirror`, `fixed`, `greedy`, or an `Order` such as
            `Greedy(curvature={...})` or `Recorded({0: (2,), 50: (1,)})`.
        include_embedding, include_lm_head: whether the embedding takes turns, and the head with all that is in no layer.
        active_modules: parts of names, or patterns with `*`, of what is always trained, such as a fresh head.
        betas, eps, weight_decay: of AdamW.
        form: `paper`, or `code` with its shorter first turn and resets of what is always on.
        storage: as for `tare.Optimizer`; single fields go on top of an fp32 master of 16-bit weights.
        release, seed, maximize: see `tare.Optimizer`.

    Raises:
        InputError: nothing is ever trained, or an active module is in no name.

    >>> import torch
    >>> net = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    >>> opt = BAdam(net, lr=1e-3, order="descending")
    >>> opt.state_bytes().total, [p.requires_grad for p in net.parameters()]
    (128, [False, False, True])
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-5, period: int = 50, *, order: str | Order = "random",
        include_embedding: bool = False, include_lm_head: bool = False, active_modules: Sequence[str] = (),
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        form: Literal["paper", "code"] = "paper", storage: Storage | dict[str, Any] | None = None, release: bool = False,
        seed: int = 0, maximize: bool = False,
    ):  # fmt: skip
        hyper = {
            "period": period, "order": order, "include_embedding": include_embedding, "include_lm_head": include_lm_head,
            "active_modules": active_modules, "betas": betas, "eps": eps, "form": form,
        }  # fmt: skip
        super().__init__(
            params, lr, badam_recipe, hyper, weight_decay=weight_decay, storage=with_master(storage), release=release,
            seed=seed, maximize=maximize,
        )  # fmt: skip
        layers = Layers(include_embedding, include_lm_head, active_modules)  # type: ignore[arg-type]
        names = layers.names(self.leaves)
        if not any(names):
            self.close()
            raise InputError(
                f"badam: nothing is trained; {self.leaves[0].name!r} and all others are embedding or head; set "
                "include_embedding or include_lm_head, or name active_modules"
            )
        if unused := layers.unused(self.leaves):
            self.close()
            raise InputError(f"active_modules: {unused[0]!r} is in no name; names look like {self.leaves[0].name!r}")
