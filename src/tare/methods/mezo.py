"""MeZO: fine-tuning with forward passes only; the direction is drawn again instead of being kept. With the variants of ZO-LLM."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from tare.core.checks import check_choice, check_whole
from tare.core.errors import InputError
from tare.core.recipe import Match
from tare.core.storage import Storage
from tare.core.transform import Transform
from tare.methods.base_forward import NO_DECAY, forward_recipe, law_of, named_leaves, pick
from tare.methods.registry import Card, register
from tare.rules.adam import Adam
from tare.rules.momentum import Momentum
from tare.zeroth.coefficients import Coefficients, Plain, Sign
from tare.zeroth.directions import Law
from tare.zeroth.exchange import Exchange
from tare.zeroth.layers import LayerScaled, Measured, layers_of, scales_from, set_scales
from tare.zeroth.memory import Memory
from tare.zeroth.optimizer import ForwardOptimizer
from tare.zeroth.probes import OnePoint, OneSided, Probe, TwoSided
from tare.zeroth.published import PublishedSGD, RoundedTwice
from tare.zeroth.recall import Recall, updates_until
from tare.zeroth.record import Recorder
from tare.zeroth.trials import Conservative, ForwardGradient

CARD = Card(
    key="mezo",
    title="Fine-Tuning Language Models with Just Forward Passes",
    authors="Malladi, Gao, Nichani, Damian, Lee, Chen, Arora",
    year=2023,
    arxiv="2305.17333",
    idea="Two forward passes at theta +- eps z give one number; z is drawn again from its seed to step with, and is never stored.",
    axes={"directions": "Gaussian", "probe": "two-sided", "rule": "SGD", "memory": "in forward"},
    defaults={
        "lr": "1e-6 (paper: 1e-6 or 1e-7 for OPT, full parameters)", "eps": "1e-3 (paper; LoRA 1e-2, prefix 1e-1)", "n": "1 (paper)",
        "weight_decay": "0 (paper); skips names with bias, layer_norm, layernorm (code)", "momentum": "0.9 (ZO-LLM)",
        "betas": "(0.9, 0.999) (torch)", "tolerance": "1e-4 (ours)",
    },
    presets={"*": {"lr": 1e-6}},
    limits=(
        "Needs a task close to what the model was pretrained on: a prompt, and thousands of steps. Twice the best lr diverges.",
        "moments='replay' draws the last K directions again at each step: 88 at the default tolerance; 9,206 for Adam with tail='none'.",
        "probe='forward-gradient' holds z and the tangents of a layer, and needs operations with forward-mode derivatives.",
        "A module outside of which its weights are read cannot be perturbed inside forward: see the memory plans.",
    ),
    differences=(
        "The paper's Adam and momentum by replay of the scalars is not in the code, which keeps dense moments. Both are here. By replay "
        "Adam's second moment of steps that are no longer drawn is their mean over directions (tail='mean', ours); tail='none' truncates.",
        "The code perturbs in place: +eps, -2 eps, +eps does not return to where it was (bf16: 8e-5 rms a step), and bf16 updates "
        "below half a unit are lost. Default here: perturbed inside forward, 16-bit weights rounded stochastically. legacy=True "
        "reproduces the code's roundings.",
        "The code draws from torch's global generator, reseeded four times a step; here directions have a generator of their own.",
        "The paper's listing takes a new batch for each of n samples, the code (and this) the same one. Its displayed one-point "
        "estimator lacks the direction.",
        "ZO-LLM's released sign and conservative trainers leave the framework's AdamW in place; here they step with SGD.",
        "The RoBERTa code divides a parameter norm by the root of itself instead of the count; scales='parameter-norm' is the norm.",
    ),
    release="no",
    auto_rank=200,
    kind="forward",
    state="none; 4 m n with momentum and 8 m n with Adam unless they are replayed",
)  # fmt: skip

PROBES = ("two-sided", "one-sided", "one-point", "conservative", "forward-gradient")


@register(CARD)
class MeZO(ForwardOptimizer):
    """W <- W - lr (delta z + wd W), delta = (f(W + eps z) - f(W - eps z)) / (2 eps), z ~ N(0, I) (arXiv 2305.17333).

    Args:
        params: the model that the closure runs (preferred), or what `tare.Optimizer` takes.
        lr: learning rate.
        eps: length of the perturbation.
        n: directions a step; their estimates are averaged, or summed where `mean` is False.
        probe: `two-sided`, `one-sided` (n + 1 evaluations), `one-point` (one; n = 1), `conservative` (best of the step, its opposite and
            staying; five), `forward-gradient` (exact derivatives), or a `Probe`.
        coefficients: `plain`, `sign` (of the scalar, arXiv 2402.11592), or a map of them.
        rule: `sgd`, `momentum`, `adam`, or a rule of `tare.rules`.
        moments: `dense`, or `replay`: computed anew at each step from the directions of former ones, no state.
        tolerance: with replay, former steps are left out once beta^k is below it; 0: never, then the numbers are those of `dense`.
        tail: what Adam's second moment gets for them: `mean`, one number (then only beta1 counts), or `none` (then both do).
        directions: `gaussian`, `rademacher`, or a `Law`.
        scales: a number for each layer, which perturbs z / c: a mapping from words in names, `parameter-norm`, or `gradient-norm`
            (measured at the first step, and every `rescale_every`).
        modify: `variance` updates with c z, so the mean stays the gradient; `expectation` with z.
        targets: which leaves are trained; as the patterns of a `Recipe`.
        undecayed: words of names that weight decay passes by (the code's).
        memory: how the model comes to the points; see `ForwardOptimizer`, also for the rest.
        legacy: round as the published code does, in place: 16-bit weights drift and small updates are lost.

    Raises:
        InputError: values out of range, or choices that exclude one another.

    >>> import torch
    >>> net = torch.nn.Linear(4, 1)
    >>> opt = MeZO(net, lr=1e-2)
    >>> x = torch.ones(8, 4)
    >>> losses = [opt.step(lambda: net(x).square().mean()) for _ in range(20)]
    >>> opt.state_bytes().total
    0
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-6, eps: float = 1e-3, *, n: int = 1, mean: bool = True,
        probe: str | Probe = "two-sided", coefficients: Literal["plain", "sign"] | Coefficients = "plain",
        rule: Literal["sgd", "momentum", "adam"] | Transform = "sgd", momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, moments: Literal["dense", "replay"] = "dense",
        tolerance: float = 1e-4, tail: Literal["mean", "none"] = "mean", directions: str | Law = "gaussian",
        scales: Mapping[str, float] | Literal["parameter-norm", "gradient-norm"] | None = None, rescale_every: int = 0,
        modify: Literal["variance", "expectation"] = "variance", targets: Match = "*", undecayed: tuple[str, ...] = NO_DECAY,
        memory: str | Memory = "auto", exchange: Exchange | None = None, legacy: bool = False, weight_decay: float = 0.0,
        storage: Storage | dict[str, Any] | None = None, seed: int = 0, maximize: bool = False, patience: int = 10,
        on_step: Recorder | None = None, model: nn.Module | None = None,
    ):  # fmt: skip
        law, transform = law_of(directions), _rule(rule, momentum, betas, adam_eps, moments, tolerance, tail)
        asking = _probe(
            probe,
            eps,
            check_whole("n", n, 1),
            mean,
            pick("coefficients", coefficients, {"plain": Plain(), "sign": Sign()}),
        )
        if isinstance(asking, Conservative) and rule != "sgd":
            raise InputError("probe: 'conservative' tries steps of plain SGD; use rule='sgd'")
        params, named = named_leaves(params)
        check_choice("modify", modify, ("variance", "expectation"))
        if scales is not None:
            if isinstance(scales, str):
                check_choice("scales", scales, ("parameter-norm", "gradient-norm"))
            layers = layers_of(name for name, _ in named)
            law = LayerScaled(law, layers, modify == "expectation")
            if scales == "gradient-norm":
                asking = Measured(asking, layers, eps, rescale_every)
        decay = weight_decay
        if legacy:
            elsewhere = isinstance(memory, str) and memory not in ("auto", "in-place")
            if rule != "sgd" or elsewhere or storage not in (None, Storage()):
                raise InputError(
                    "legacy: the published arithmetic is that of rule='sgd', memory='in-place' and plain storage"
                )
            law, transform, decay = RoundedTwice(law), PublishedSGD(weight_decay, undecayed), 0.0
            memory, storage = "in-place", Storage()
        super().__init__(
            params, forward_recipe(law, transform, targets, undecayed), lr, probe=asking, memory=memory, exchange=exchange,
            weight_decay=decay, storage=storage, seed=seed, maximize=maximize, patience=patience, on_step=on_step, model=model,
        )  # fmt: skip
        if scales is not None and scales != "gradient-norm":
            found = scales_from(scales, named)
            for leaf in self._moved():
                set_scales(leaf.state.raw, found[leaf.draw(0).leaf.name])


def _rule(
    rule: str | Transform, momentum: float, betas: tuple[float, float], eps: float, moments: str, tolerance: float, tail: str
) -> Transform:  # fmt: skip
    """The rule, without its moments where they are replayed."""
    known = {"sgd": Momentum(0.0), "momentum": Momentum(momentum), "adam": Adam(betas, eps)}
    found: Transform = pick("rule", rule, known)
    mean = check_choice("tail", tail, ("mean", "none")) == "mean" and rule == "adam"
    if check_choice("moments", moments, ("dense", "replay")) == "dense" or rule == "sgd":
        return found
    longest = (
        {"momentum": momentum, "adam": betas[0] if mean else max(betas)}.get(rule) if isinstance(rule, str) else None
    )
    if longest is None:
        raise InputError(
            "moments: 'replay' by tolerance is for 'momentum' and 'adam'; give rule=Recall(your rule, last)"
        )
    return Recall(found, updates_until(longest, tolerance), mean)


def _probe(probe: str | Probe, eps: float, n: int, mean: bool, coefficients: Coefficients) -> Probe:
    """A probe by its name, or as it is given."""
    if probe in ("one-point", "conservative") and n != 1:
        raise InputError(f"n: {probe} probes one direction a step, got {n}; use probe='two-sided'")
    known = {
        "two-sided": TwoSided(eps, n, mean, coefficients), "one-sided": OneSided(eps, n, mean, coefficients),
        "one-point": OnePoint(eps, coefficients), "conservative": Conservative(eps, coefficients),
        "forward-gradient": ForwardGradient(n, mean, coefficients),
    }  # fmt: skip
    found: Probe = pick("probe", probe, known)
    return found
