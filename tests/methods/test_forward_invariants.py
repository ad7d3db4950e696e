"""Every registered forward-only method keeps every check. A new one is picked up from the registry with no further code."""

import pytest

from tare.methods import registry
from tare.testing import forward


@pytest.mark.filterwarnings("ignore:.*drop out", "ignore:the loss is float16", "ignore:.*updates were too small")
@pytest.mark.parametrize("name", forward.checks())
@pytest.mark.parametrize("key", registry.keys("forward"))
def test_forward_invariant(key: str, name: str) -> None:
    if reason := forward.exempt(key, name):
        pytest.skip(reason)
    forward.check(key, name)


@pytest.mark.parametrize("key", registry.keys("forward"))
def test_exemptions_name_checks(key: str) -> None:
    """A card that is spared a check of a name that is none would hide a spelling mistake."""
    unknown = set(registry.card(key).trial.exempt) - set(forward.checks())
    assert not unknown, f"{key}: no checks called {sorted(unknown)}"


# Options of MeZO that change what is kept, drawn or evaluated: each is a method of its own to the checks.
VARIANTS = {
    "momentum": {"rule": "momentum"}, "adam": {"rule": "adam"}, "adam by replay": {"rule": "adam", "moments": "replay", "tolerance": 0.0},
    "momentum by replay": {"rule": "momentum", "moments": "replay", "tolerance": 0.5}, "four samples": {"n": 4},
    "one-point": {"probe": "one-point", "eps": 1e-2}, "conservative": {"probe": "conservative"},
    "forward-gradient": {"probe": "forward-gradient"}, "gradient-norm": {"scales": "gradient-norm"}, "sign": {"coefficients": "sign"},
    "rademacher": {"directions": "rademacher"},
}  # fmt: skip
SAVED = ("resume_is_bit_exact", "distributed_checkpoint", "not_finite_losses_are_skipped", "a_closure_that_raises_loses_nothing",
         "state_bytes_are_those_allocated", "frozen_leaves_rest", "copies_continue_alike", "order_does_not_matter")  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_mezo(variant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant == "forward-gradient" and name == "order_does_not_matter":
        pytest.skip("needs the module as params")
    build = forward.ForwardSubject.build
    monkeypatch.setattr(
        forward.ForwardSubject,
        "build",
        lambda self, params, lr=None, **own: build(self, params, lr, **VARIANTS[variant], **own),
    )
    forward.check("mezo", name)
