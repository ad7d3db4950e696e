"""State: a leaf's flat dict of tensors and ints seen through its storage: rules read and write fp32, whatever is kept.

`state["exp_avg"]` is the tensor itself where that is what is kept (change it in place), else a decoded copy that `flush` encodes again.
"""

from typing import Any

import torch
from torch import Tensor

from tare.core import codecs
from tare.core.storage import Slot


def allocate(slots: dict[str, Slot], device: torch.device) -> dict[str, Any]:
    """Fresh state for one leaf: tensors at their initial value, counts at their initial number."""
    raw: dict[str, Any] = {"step": 0}
    for slot in slots.values():
        if slot.form == "count":
            raw[slot.name] = int(slot.spec.init)
            continue
        raw.update(codecs.fresh(slot, device))
    return raw


class State:
    """A view of one leaf's state, or of a flat slice of it, for the length of one update."""

    def __init__(self, raw: dict[str, Any], slots: dict[str, Slot], key: int = 0, window: slice | None = None):
        self.raw, self.slots, self.key, self.window = raw, slots, key, window
        self._open: dict[str, tuple[Tensor, int]] = {}  # decoded, and its version then

    def part(self, start: int, stop: int) -> "State":
        """The same state seen through elements start .. stop - 1 (block-aligned), for chunked element-wise rules."""
        return State(self.raw, self.slots, self.key, slice(start, stop))

    def kept(self, name: str) -> bool:
        """False where the storage keeps only a seed."""
        return self.slots[name].form != "seed"

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    def __getitem__(self, name: str) -> Any:
        slot = self.slots[name]
        if slot.form == "count":
            return self.raw[name]
        if slot.form == "plain":
            return codecs.cut(self.raw[name], self.window)
        if name not in self._open:
            self._hold(name, codecs.decode(slot, self.raw, self.window))
        return self._open[name][0]

    def _hold(self, name: str, value: Tensor) -> None:
        self._open[name] = (value, 0 if value.is_inference() else value._version)

    def __setitem__(self, name: str, value: Any) -> None:
        slot = self.slots[name]
        if slot.form == "count":
            self.raw[name] = int(value)
        elif slot.form == "plain":
            codecs.cut(self.raw[name], self.window).copy_(value)
        elif slot.affine:  # whoever reads it next, in this very step, must see what is kept
            self._open.pop(name, None)
            codecs.encode(slot, self.raw, value, self.window, self.key)
        elif slot.form != "seed":
            self._hold(name, value)

    def settle(self, *names: str) -> None:
        """Encode now what was set, for kernels that read the codes themselves. Forms without codes are left for `flush`."""
        for name in names:
            if name in self._open and self.slots[name].form in ("int8", "int4"):
                codecs.encode(self.slots[name], self.raw, self._open.pop(name)[0], self.window, self.key)

    def flush(self) -> None:
        """Encode what was decoded. The update itself used the unquantised values.

        Affine forms only where the decoded copy was changed in place: encoding them again would not give the same codes.
        """
        for name, (value, version) in self._open.items():
            slot = self.slots[name]
            if not slot.affine or (not value.is_inference() and value._version != version):
                codecs.encode(slot, self.raw, value, self.window, self.key)
        self._open.clear()
