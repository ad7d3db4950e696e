"""A quick lower bound of the peak, so that the search need not track every combination of settings in full.

Weights and state are exact. The rest is tracked on two and three layers and continued linearly: a peak is a maximum over moments that
each grow linearly with the number of layers, hence convex in it, hence never below that line.
"""

import copy
from typing import TYPE_CHECKING

from tare.plan.activations import StepProfile, profile_model
from tare.plan.rows import Settings
from tare.plan.steps import state_bytes, trained_sets, weight_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Bound:
    """Remembers what it has found out about one model and one budget."""

    def __init__(self, budget: int):
        self._budget = budget
        self._weights: dict[tuple[str, bool], int] = {}
        self._state: dict[tuple[str, ...], tuple[int, bool]] = {}
        self._step: dict[tuple[object, ...], tuple[int, int, int]] = {}

    def may_fit(self, settings: Settings, key: str) -> bool:
        """False only if the method certainly does not fit."""
        quantized = settings.choice(key).storage.weight == "int8"
        weights, whole = (self._weight_bytes(settings, form) for form in (quantized, False))
        what = (key, settings.dtype, repr(settings.storage), repr(settings.hyper))
        if what not in self._state:
            choice, config = settings.choice(key), settings.config
            some = bool(trained_sets(choice, config, settings.dtype))
            self._state[what] = state_bytes(choice, config, settings.dtype), some
        state, some = self._state[what]
        room = self._budget - weights - state
        if some:  # only some leaves have gradients, and not all activations are kept
            return room >= 0
        inside = settings.release and settings.accumulate == 1
        gradients = 0 if inside else whole
        if room < gradients:
            return False
        how = (settings.dtype, settings.precision, settings.batch, settings.seq, settings.checkpointing)
        if how not in self._step:
            self._step[how] = step_bound(settings)
        forward, backward, released = self._step[how]
        if settings.accumulate > 1:
            return max(forward, released) + gradients <= room
        return max(forward, released if inside else backward) <= room

    def _weight_bytes(self, settings: Settings, quantized: bool) -> int:
        form = settings.dtype, quantized
        if form not in self._weights:
            self._weights[form] = weight_bytes(settings.config, *form)
        return self._weights[form]


def step_bound(settings: Settings) -> tuple[int, int, int]:
    """Bytes beyond weights and state that a micro-batch needs at least: in forward, in backward, in backward with release."""
    layers = getattr(settings.config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers <= 3:
        return 0, 0, 0
    try:
        few, more = (_totals(_shallow(settings, number)) for number in (2, 3))
    except (
        Exception
    ):  # a config whose depth cannot be changed on its own; the search is slower without a bound, not wrong
        return 0, 0, 0
    forward, backward, released = (a + (b - a) * (layers - 2) for a, b in zip(few, more, strict=True))
    return forward, backward, released


def _shallow(settings: Settings, layers: int) -> StepProfile:
    config: PretrainedConfig = copy.deepcopy(settings.config)
    config.num_hidden_layers = layers
    return profile_model(
        config,
        settings.batch,
        settings.seq,
        dtype=settings.dtype,
        precision=settings.precision,
        checkpointing=settings.checkpointing,
    )


def _totals(profile: StepProfile) -> tuple[int, int, int]:
    return profile.forward.total, profile.backward.total, profile.released.total
