"""A quick lower bound of the peak, so that the search need not track every combination of settings in full.

Weights and state are exact. The rest is tracked on two and three layers and continued linearly: a peak is a maximum over moments that
each grow linearly with the number of layers, hence convex in it, hence never below that line.
"""

import copy
from dataclasses import replace

from tare.methods import registry
from tare.plan.activations import profile_model
from tare.plan.profile import StepProfile
from tare.plan.rows import Settings
from tare.plan.shapes import ModelShape
from tare.plan.steps import state_bytes, trained_sets, weight_bytes


class Bound:
    """Remembers what it has found out about one model and one budget."""

    def __init__(self, budget: int):
        self._budget = budget
        self._weights: dict[tuple[str, bool], int] = {}
        self._state: dict[tuple[str, ...], tuple[int, bool]] = {}
        self._step: dict[tuple[object, ...], tuple[int, int, int]] = {}

    def may_fit(self, settings: Settings, key: str, slack: float = 1.0) -> bool:
        """False only if the method certainly does not fit `slack` times the budget."""
        limit = int(slack * self._budget)
        return self.least(settings, key, limit) <= limit

    def least(self, settings: Settings, key: str, limit: int | None = None) -> int:
        """Bytes that the method needs at least; activations are not looked at where the rest is above `limit`."""
        if settings.ranks is not None and settings.ranks.sharded:
            return 0  # a line costs little there
        if settings.work is not None and settings.work.layers() is not None:
            return 0  # other layers, or few of them trained: the model's own figures are no bound
        quantized = settings.choice(key).storage.weight == "int8"
        weights, whole = (self._weight_bytes(settings, form) for form in (quantized, False))
        what = (key, settings.dtype, repr(settings.storage), repr(settings.hyper))
        if what not in self._state:
            choice, config = settings.choice(key), settings.config
            some = bool(trained_sets(choice, config, settings.dtype))
            self._state[what] = state_bytes(choice, config, settings.dtype), some
        state, some = self._state[what]
        fixed = weights + state
        if (
            some or registry.card(key).kind == "forward"
        ):  # only some leaves have gradients, and not all activations are kept
            return fixed
        inside = settings.release and settings.accumulate == 1
        gradients = 0 if inside or self._small(settings, key) else whole
        if limit is not None and fixed + gradients > limit:
            return fixed + gradients
        how = (settings.dtype, settings.precision, settings.batch, settings.seq, settings.checkpointing)
        if how not in self._step:
            self._step[how] = step_bound(settings)
        forward, backward, released = self._step[how]
        if settings.accumulate > 1:
            return fixed + max(forward, released) + gradients
        return fixed + max(forward, released if inside else backward, gradients)

    @staticmethod
    def _small(settings: Settings, key: str) -> bool:
        """Whether there may be no moment at which all gradients are whole, although micro-batches are summed."""
        measured = settings.clip_mode == "two-pass" and settings.clip_parts == 1
        return settings.release and not measured and registry.card(key).release == "accumulates"

    def _weight_bytes(self, settings: Settings, quantized: bool) -> int:
        form = settings.dtype, quantized
        if form not in self._weights:
            self._weights[form] = weight_bytes(settings.config, *form)
        return self._weights[form]


def step_bound(settings: Settings) -> tuple[int, int, int]:
    """Bytes beyond weights and state that a micro-batch needs at least: in forward, in backward, in backward with release."""
    config = settings.config
    layers = config.layers if isinstance(config, ModelShape) else getattr(config, "num_hidden_layers", 0)
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
    config = settings.config
    if isinstance(config, ModelShape):
        config = replace(config, layers=layers)
    else:
        config = copy.deepcopy(config)
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
