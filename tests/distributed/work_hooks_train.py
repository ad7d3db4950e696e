"""What the ranks do for `test_hooks_train`: a run of `tare train` in the group that they are in."""

from typing import Any

from tare.core.errors import InputError
from tare.train.config import RunConfig
from tare.train.loop import train
from tare.train.progress import Note, StepDone, Warned
from tare.train.workers import Elsewhere


def run(rank: int, size: int, config: RunConfig) -> dict[str, Any]:
    """Losses of steps, and what was said; or the line of a refusal, on the rank that tells it."""
    losses: list[float] = []
    said: list[str] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)
        if isinstance(event, Note | Warned):
            said.append(event.text)

    try:
        train(config, on_event=note)
    except Elsewhere:
        return {"elsewhere": True}
    except InputError as fault:
        return {"refused": str(fault)}
    return {"losses": losses, "said": said}
