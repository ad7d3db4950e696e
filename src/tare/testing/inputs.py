"""T1, the refusals: what no constructor may accept, and that the message names the option at fault and what is allowed."""

import math
import warnings
from typing import Any

import torch
from torch import nn

from tare.methods import registry
from tare.testing.subject import LR, Subject, leaves, refuses

# option -> (a word of the message, values that must be refused). Options that a method lacks are passed over.
BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "weight_decay": ("weight_decay", (-0.1, math.nan, math.inf, "much")),
    "betas": ("beta", ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9, (math.nan, 0.9))),
    "eps": ("eps", (-1e-8, math.nan)),
    "rank": ("rank", (0, -1, 2.5, True)),
    "period": ("period", (0, -3, 1.5)),
    "scale": ("scale", (-1.0, math.nan)),
    "gamma": ("gamma", (-1.0, math.nan)),
    "side": ("side", ("top",)),
    "basis": ("basis", ("svdd",)),
    "transfer": ("transfer", ("kep",)),
    "lift": ("lift", ("chanel",)),
    "form": ("form", ("papr",)),
    "limiter_zero": ("zero", ("never",)),
    "seed": ("seed", (-1, 0.5)),
    "beta1": ("beta1", (1.0, -0.1)),
    "clip_threshold": ("clip_threshold", (0.0, -1.0)),
    "decay_rate": ("decay_rate", (math.nan, 0.5)),
    "block": ("block", (0, 2.5)),
    "min_quantized": ("min_quantized", (-1,)),
    "targets": ("no.such.layer", ("no.such.layer",)),
    "storage": ("storage", ({"momnt": "fp32"}, {"moment": "int9"}, {"block": 0}, {"weight": "rounded"})),
}


def bad_values_are_refused(subject: Subject) -> None:
    """Every option out of range raises InputError at construction, naming the option."""
    for value in (-1.0, math.nan, math.inf, "fast", None):
        with refuses("learning rate"):
            subject.build(leaves(), lr=value)  # type: ignore[arg-type]
    for name, (word, values) in BAD.items():
        for value in values:
            if name in subject.options:
                with refuses(word):
                    subject.build(leaves(), **{name: value})


def bad_group_values_are_refused(subject: Subject) -> None:
    """A parameter group's own options are checked like the constructor's."""
    (name, p), (other, q) = leaves()[:2]
    for option in ("lr", "weight_decay", "betas"):
        if option in (*subject.options, "lr"):
            value = -1.0 if option != "betas" else (2.0, 0.9)
            with refuses("learning rate" if option == "lr" else option[:4]):
                subject.build([{"params": [(name, p)]}, {"params": [(other, q)], option: value}])
    with refuses("role", "linear"):
        subject.build([{"params": [p], "role": "linaer"}])


def unknown_option_names_the_nearest(subject: Subject) -> None:
    with refuses("weight_decy", "did you mean 'weight_decay'"):
        registry.build(subject.key, leaves(), LR, weight_decy=0.1)


def bad_parameters_are_refused(subject: Subject) -> None:
    """Sets, lone tensors, nothing, duplicates over groups, mixtures of named and unnamed, complex and sparse."""
    p, q = (parameter for _, parameter in leaves()[:2])
    for wrong in ({p, q}, p, 3, None):
        with refuses("params", kind=TypeError):
            subject.build(wrong)
    with refuses("params", kind=TypeError):
        subject.build([{"params": {p, q}}])
    empty: tuple[Any, ...] = ([], iter(()), nn.ReLU())
    for nothing in empty:
        with refuses("param"):
            subject.build(nothing)
    with refuses("more than one", kind=ValueError):
        subject.build([{"params": [p]}, {"params": [p, q]}])
    with refuses(kind=ValueError):
        subject.build([("p", p), q])
    with refuses(kind=ValueError):
        subject.build([{"params": [("p", p)]}, {"params": [q]}])
    with refuses("complex"):
        subject.build([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        subject.build([p, p])
    assert any("duplicate" in str(w.message) for w in seen), "a parameter given twice in a group must warn"
    table = nn.Embedding(6, 4, sparse=True)
    optimizer = subject.build(table)
    table(torch.tensor([1, 2])).sum().backward()
    with refuses("sparse"):
        optimizer.step()


def tensor_lr_needs_one_element(subject: Subject) -> None:
    with refuses("1-element"):
        subject.build(leaves(), lr=torch.tensor([0.1, 0.2]))


def changed_parameter_is_refused(subject: Subject) -> None:
    """A parameter that was cast or resized after the optimizer was built is named, not stepped."""
    net = nn.Linear(6, 4, bias=False)
    optimizer = subject.build(net)
    net.to(torch.float64)
    net.weight.grad = torch.ones_like(net.weight)
    with refuses("weight", "float64"):
        optimizer.step()


CHECKS = (
    bad_values_are_refused, bad_group_values_are_refused, unknown_option_names_the_nearest, bad_parameters_are_refused,
    tensor_lr_needs_one_element, changed_parameter_is_refused,
)  # fmt: skip
