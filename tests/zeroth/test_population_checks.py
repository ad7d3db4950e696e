"""Forms of the population methods beside their default ones keep the checks that every forward-only method keeps."""

from typing import Any

import pytest

from tare.methods import registry
from tare.testing.forward import ForwardSubject, checks
from tare.zeroth.optimizer import ForwardOptimizer

SAVED = (
    "resume_is_bit_exact", "distributed_checkpoint", "a_log_replays_the_run", "not_finite_losses_are_skipped",
    "state_bytes_are_those_allocated", "copies_continue_alike", "evaluations_are_counted",
)  # fmt: skip
ALL = (*SAVED, "frozen_leaves_rest", "order_does_not_matter", "groups_may_come_later", "sixteen_bit_weights_move")

FORMS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "particles": (
        "consensus",
        {"form": "particles", "n": 12, "sigma": 0.6, "alpha": 40.0, "spread": 0.1, "batch": 6, "kick": 1e-4},
        ALL,
    ),
    "all leaves": ("eggroll", {"members": 16, "sigma": 5e-2, "vectors": "gaussian", "embeddings": True, "rule": "adam"}, ALL),
    "baseline": ("eggroll", {"members": 16, "sigma": 5e-2, "shaping": "baseline"}, SAVED),
    "line search": ("zo-rank", {"mu": 5e-2, "line_search": 2, "keep_best": False}, (*ALL, "loss_falls")),
    "line search, recalling": ("zo-rank", {"mu": 5e-2, "line_search": 2}, SAVED),
}  # fmt: skip


class Form(ForwardSubject):
    """One form of a method: its options in the place of those on the card."""

    def build(self, params: Any, lr: Any = None, **own: Any) -> ForwardOptimizer:
        key, options, _ = FORMS[self.key]
        made = registry.build(key, params, registry.card(key).trial.lr if lr is None else lr, **{**options, **own})
        assert isinstance(made, ForwardOptimizer)
        return made

    @property
    def trial(self) -> registry.Trial:
        return registry.card(FORMS[self.key][0]).trial

    @property
    def options(self) -> list[str]:
        return list(registry.options(FORMS[self.key][0]))


@pytest.mark.parametrize(("form", "name"), [(form, name) for form, (_, _, names) in FORMS.items() for name in names])
def test_form(form: str, name: str) -> None:
    checks()[name](Form(form))
