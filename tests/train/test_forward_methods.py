"""Every forward-only method that `tare train` offers trains by it, in the memory that was planned; the others say how they are used."""

from pathlib import Path
from typing import Any

import pytest
from train_runs import config

from tare.core.errors import InputError
from tare.methods import registry
from tare.train.loop import train

OWN: dict[str, dict[str, Any]] = {
    "qzo": {"quantize": "int4:group=32"}, "deepzero": {"options": {"sparsity": 0.9999}},
}  # fmt: skip
REFUSED = {
    "fzoos": "train a prompt, scales or a token, or use mezo",
    "zo-ae-ds": "train it in a loop of your own with the box",
}


@pytest.mark.parametrize("key", registry.keys("forward"))
def test_it_trains_as_planned_or_says_why_not(key: str, tmp_path: Path) -> None:
    job = config(tmp_path / "run", key, steps=2, batch=4, checkpoint_every=2, **OWN.get(key, {}))
    if key in REFUSED:
        with pytest.raises(InputError, match=REFUSED[key]):
            train(job)
        return
    done = train(job)
    assert done.steps == 2
    assert done.forwards > 0
    assert done.measured["state"] == done.predicted["state"]
    if key == "deepzero":  # the scores of all coordinates before the first step are not planned
        return
    # half a MiB: what zo-sah multiplies its directions in is of one size for all models, and not planned
    assert done.measured["peak"] == pytest.approx(done.predicted["peak"], rel=0.05, abs=2**19)
