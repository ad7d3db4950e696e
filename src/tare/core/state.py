"""State: a leaf's flat dict of tensors and ints seen through its storage: rules read and write fp32, whatever is kept.

`state["exp_avg"]` is the tensor itself where that is what is kept (change it in place), else a decoded copy that `flush` encodes again.
"""

from typing import Any

import torch
from torch import Tensor

from tare.core.random import make_key
from tare.core.storage import Slot
from tare.kernels import blockwise, native, rounding


def allocate(slots: dict[str, Slot], device: torch.device) -> dict[str, Any]:
    """Fresh state for one leaf: tensors at their initial value, counts at their initial number."""
    raw: dict[str, Any] = {"step": 0}
    for slot in slots.values():
        if slot.form == "count":
            raw[slot.name] = int(slot.spec.init)
            continue
        for name, shape, dtype in slot.parts():
            raw[name] = torch.full(shape, slot.spec.init if slot.form == "plain" else 0, dtype=dtype, device=device)
        if slot.form == "int8":
            raw[f"{slot.name}_codes"].fill_(blockwise.zero_code(slot.spec.signed))
    return raw


class State:
    """A view of one leaf's state, or of a flat slice of it, for the length of one update."""

    def __init__(self, raw: dict[str, Any], slots: dict[str, Slot], key: int = 0, window: slice | None = None):
        self.raw, self.slots, self.key, self.window = raw, slots, key, window
        self._open: dict[str, Tensor] = {}

    def part(self, start: int, stop: int) -> "State":
        """The same state seen through elements start .. stop - 1 (block-aligned), for chunked element-wise rules."""
        return State(self.raw, self.slots, self.key, slice(start, stop))

    def _cut(self, tensor: Tensor, per: int = 1) -> Tensor:
        if self.window is None:
            return tensor
        start, stop = self.window.start, self.window.stop
        return tensor.view(-1)[start // per : -(-stop // per)]

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
            return self._cut(self.raw[name])
        if name not in self._open:
            if slot.form == "int8":
                codes = self._cut(self.raw[f"{name}_codes"])
                absmax = self._cut(self.raw[f"{name}_absmax"], slot.block)
                self._open[name] = _decode(codes, absmax, slot)
            else:
                self._open[name] = self._cut(self.raw[name]).float()
        return self._open[name]

    def __setitem__(self, name: str, value: Any) -> None:
        slot = self.slots[name]
        if slot.form == "count":
            self.raw[name] = int(value)
        elif slot.form == "plain":
            self._cut(self.raw[name]).copy_(value)
        elif slot.form != "seed":
            self._open[name] = value

    def flush(self) -> None:
        """Encode what was decoded. The update itself used the unquantised values."""
        for name, value in self._open.items():
            slot = self.slots[name]
            if slot.form == "int8":
                codes = self._cut(self.raw[f"{name}_codes"])
                absmax = self._cut(self.raw[f"{name}_absmax"], slot.block)
                if not native.encode_into(value, codes, absmax, slot.spec.signed, slot.block):
                    blockwise.encode_into(value, codes, absmax, slot.spec.signed, slot.block)
            else:
                start = self.window.start if self.window else 0
                key = make_key(self.key, name)
                rounding.round_stochastic_(self._cut(self.raw[name]), value.contiguous(), key, start)
        self._open.clear()


def _decode(codes: Tensor, absmax: Tensor, slot: Slot) -> Tensor:
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if not native.decode_into(codes, absmax, slot.spec.signed, out, slot.block):
        blockwise.decode(codes, absmax, slot.spec.signed, slot.block, out=out)
    return out
