"""What holds for any registered forward-only method, and the little problem that it is tried on. A method is checked by being registered.

A method whose nature forbids a check says so on its card: `Card.trial.exempt`, with the reason. Other problems than `regression` are
functions named by `Card.trial.problem`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tare.methods import registry
from tare.methods.registry import Trial
from tare.testing.subject import Net, loss_of, snapshot
from tare.zeroth.optimizer import ForwardOptimizer


@dataclass
class Problem:
    """Something small to train, always the same when made anew.

    params: what the constructor is given; a module, or named tensors. loss: of step `number`, a tensor of one element or a number; it
    draws no random numbers. tensors: everything that may change, by name. measure: the loss that must fall.
    """

    params: Any
    loss: Callable[[int], Any]
    tensors: Callable[[], dict[str, Tensor]]
    measure: Callable[[], float]

    @property
    def module(self) -> nn.Module | None:
        return self.params if isinstance(self.params, nn.Module) else None

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        return snapshot(self.tensors().items())


def regression(dtype: torch.dtype = torch.float32) -> Problem:
    """Embedding, norm, tall, wide and square matrices, biases, a head: targets that are a function of the token."""
    net = Net().to(dtype)

    @torch.no_grad()
    def measure() -> float:
        return float(loss_of(net))

    return Problem(net, lambda number: loss_of(net, number), lambda: dict(net.named_parameters()), measure)


@dataclass(frozen=True)
class ForwardSubject:
    """A forward-only method by its key."""

    key: str

    @property
    def trial(self) -> Trial:
        return registry.card(self.key).trial

    @property
    def options(self) -> list[str]:
        return list(registry.options(self.key))

    def problem(self, dtype: torch.dtype = torch.float32) -> Problem:
        module, _, name = self.trial.problem.partition(":")
        made: Problem = getattr(importlib.import_module(module), name)(dtype)
        return made

    def build(self, params: Any, lr: Any = None, **own: Any) -> ForwardOptimizer:
        made = registry.build(self.key, params, self.trial.lr if lr is None else lr, **{**self.trial.hyper, **own})
        assert isinstance(made, ForwardOptimizer)
        return made

    def start(self, dtype: torch.dtype = torch.float32, **own: Any) -> tuple[Problem, ForwardOptimizer]:
        """A new problem, and an optimizer for it."""
        problem = self.problem(dtype)
        return problem, self.build(problem.params, **own)


def drive(opt: ForwardOptimizer, problem: Problem, first: int, last: int) -> None:
    """Steps first .. last - 1."""
    for number in range(first, last):
        opt.step(lambda number=number: problem.loss(number))  # type: ignore[misc]


Check = Callable[[ForwardSubject], None]


def checks() -> dict[str, Check]:
    """All of them, by name."""
    from tare.testing import forward_faults, forward_objects, forward_saved, forward_steps

    modules = (forward_steps, forward_faults, forward_objects, forward_saved)
    return {check.__name__: check for module in modules for check in module.CHECKS}


def check(key: str, name: str) -> None:
    """One check of one method. Raises AssertionError with what differs."""
    checks()[name](ForwardSubject(key))


def exempt(key: str, name: str) -> str | None:
    """Why a method is spared a check; None where it is not."""
    return registry.card(key).trial.exempt.get(name)


def check_all(key: str) -> dict[str, str]:
    """Every check of one method: name -> what failed, empty when all hold. For a method in a file of its own, once it is registered."""
    failed: dict[str, str] = {}
    for name in checks():
        if exempt(key, name) is None:
            try:
                check(key, name)
            except Exception as error:  # a check that cannot run has failed too
                failed[name] = f"{type(error).__name__}: {error}"
    return failed
