"""Stream: the blocks of a model rest on the host and come to the device one after another, each while its forward runs.

Wang et al. (2025), "ZO2", arXiv 2503.12668. Steps that a block has not taken yet are owed to it, and taken when it is next there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.zeroth.stream_blocks import Block, bytes_of, find_blocks
from tare.zeroth.stream_codecs import codec
from tare.zeroth.stream_device import Host, Room, Slot, carrier

if TYPE_CHECKING:
    from tare.zeroth.reads import Reads
    from tare.zeroth.record import Record


@dataclass(frozen=True)
class StreamReport:
    """What a stream has moved, in bytes. of the last step: brought, written, moves (blocks brought). peak: weights on the device."""

    blocks: int
    block_bytes: int
    resident_bytes: int
    slots: int
    brought: int
    written: int
    moves: int
    peak: int

    def __str__(self) -> str:
        return (
            f"{self.blocks} blocks of up to {self.block_bytes:,} bytes, {self.slots} at a time beside {self.resident_bytes:,} that stay; "
            f"last step: {self.moves} brought ({self.brought:,} bytes, {self.written:,} back); peak {self.peak:,}"
        )


class Gate:
    """The hooks of one block."""

    def __init__(self, stream: "Stream", block: Block):
        self.stream, self.block, self.depth = stream, block, 0
        self.homes: list[Tensor] = []

    def before(self, module: nn.Module, arguments: Any) -> None:
        if module is not self.block.module:  # a replica shares the hooks
            return
        self.depth += 1
        if self.depth == 1:
            self.stream.enter(self)

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if module is self.block.module and self.depth:
            self.depth -= 1
            if not self.depth:
                self.stream.leave(self)

    def passed(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if module is self.block.module and not self.depth and self.stream.turn is not None:
            self.stream.turn()


class Stream:
    """Args:
        model: the module that is run.
        blocks: names of its lists of blocks; see `find_blocks`.
        device: `cuda`, `cpu` (which only counts), or None: CUDA where there is one.
        budget: bytes of weights that may be on the device; None: all of a CUDA device, or any number.
        ahead: blocks that are brought while another one computes. Fewer where the budget is short.
        transfer: how matrices of blocks (float32, and bf16 to 8 bits) are kept on the host and moved: `exact`, or rounded to `bf16`,
            `fp16`, `fp8` or `int8`, at random after each step. The model is then what is kept; parameters hold it after a flush.

    Everything but the blocks, and all buffers, is on the device for good. A parameter's `data` is its copy on the device while its block
    runs, and what rests on the host at all other times. `owed`: the steps that parameters have not taken; `pay` takes one, and returns
    a key for the rounding that follows it.

    Raises:
        InputError: as `find_blocks`; a device that is none, or too small.
    """

    turn: Callable[[], None] | None = None  # called when a block has been left
    reads: "Reads | None" = None  # told where weights are while an evaluation is watched
    pay: Callable[[Tensor, "Record"], int] | None = None

    def __init__(
        self, model: nn.Module, blocks: str | Sequence[str] | None = None, *, device: str | torch.device | None = None,
        budget: int | None = None, ahead: int = 1, transfer: str = "exact",
    ):  # fmt: skip
        self.transfer, self._codec = transfer, codec(transfer)
        self.model, self._where, self._wanted = model, (device, budget), ahead
        self.blocks = find_blocks(model, blocks)
        self.gates = [Gate(self, block) for block in self.blocks]
        self.owed: dict[Tensor, list[Record]] = {}
        self.streamed = {p for block in self.blocks for p in block.params}
        self.rest = [p for p in model.parameters() if p not in self.streamed]
        self.brought = self.written = self.moves = 0
        self._handles: list[Any] = []
        self.codes: dict[Tensor, list[Tensor]] = {}  # what matrices are kept as, where that is not the matrix
        if self._codec is not None:
            self.codes = {p: self._codec.empty(p) for block in self.blocks for p in block.params if _coded(p, transfer)}
        self._seen: dict[Tensor, int] = {}  # their versions when codes and parameter agreed, or codes were newer
        self._stale: set[Tensor] = set()  # codes are newer
        self.resident = bytes_of([*self.rest, *model.buffers()])
        self.largest = max(bytes_of(self._wanted_of(block)) for block in self.blocks)
        self.copies = max(bytes_of([p for p in m._parameters.values() if p is not None]) for m in model.modules())
        self._open()
        self.settle_in()
        self.attach()

    def _open(self) -> None:
        """The device, and how many blocks it has room for."""
        planned = any(p.is_meta for p in (*self.rest, *self.streamed))  # nothing will be moved
        self.carrier: Host = Host(torch.device("meta"), Room(self._where[1])) if planned else carrier(*self._where)
        self._passing, self._clock = 0, 0
        room = self.carrier.room
        left = None if room.limit is None else room.limit - self.resident - self.copies
        if left is not None and left < self.largest:
            raise InputError(
                f"budget: {room.limit:,} bytes are too few: {self.resident:,} for what is outside of blocks and buffers, "
                f"{self.largest:,} for the largest block and {self.copies:,} for perturbed copies are needed; give "
                f"{self.resident + self.largest + self.copies:,}, or name more blocks"
            )
        self.ahead = self._wanted if left is None else min(self._wanted, left // max(1, self.largest) - 1)
        self._slots = [Slot() for _ in range(self.ahead + 1)]
        room.take(self.resident, "what is outside of blocks")
        room.take(self.copies, "the perturbed copy of a module's weights")

    @property
    def footprint(self) -> tuple[int, int]:
        """Bytes beside the weights: of slots on the device, and of codes on the host."""
        return len(self._slots) * self.largest, bytes_of([code for codes in self.codes.values() for code in codes])

    def settle_in(self) -> None:
        """Every weight to where it rests."""
        for p in self.rest:
            p.data = self.carrier.keep(p.data)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.carrier.keep(buffer)
        for block in self.blocks:
            for one in block.params:
                one.data = self.carrier.home(one.data)
        for one, codes in self.codes.items():
            self.codes[one] = [self.carrier.home(code) for code in codes]

    def _wanted_of(self, block: Block) -> list[Tensor]:
        """What a slot holds for a block: its weights, and then the codes that some are made from."""
        return [p.data for p in block.params] + [code for p in block.params for code in self.codes.get(p, ())]

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks where they come first before a forward, and last after it; those of an older stream are taken out."""
        self.detach()
        for gate in self.gates:
            module = gate.block.module
            for older in [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]:
                if isinstance(older, Gate):
                    older.stream.flush()
                    older.stream.detach()
            self._handles += [
                module.register_forward_pre_hook(gate.before, prepend=True),
                module.register_forward_hook(gate.after, always_call=True),
                module.register_forward_hook(gate.passed),
                module.register_state_dict_pre_hook(self._saved),
            ]
        root = self.model
        self._handles += [
            root.register_forward_pre_hook(self._begins, prepend=True),
            root.register_forward_hook(self._ends, always_call=True),
            root.register_state_dict_pre_hook(self._saved),
            root.register_load_state_dict_pre_hook(self._loaded),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begins(self, module: nn.Module, arguments: Any) -> None:
        if not self._passing:
            self._drop()
            self._whole = True

    def _ends(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._whole = False
        if not self._passing:
            self._drop()

    def _saved(self, *about: Any) -> None:
        self.flush()

    def _loaded(self, *about: Any) -> None:
        self.flush()

    _whole = False  # whether the model as a whole runs, outside of a step

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside, weights change by what is owed only, so that a block that is there need not be brought again."""
        if not self._passing:
            self._drop()
        self._passing += 1
        try:
            yield
        finally:
            self._passing -= 1
            if not self._passing:
                self._drop()

    def _drop(self) -> None:
        """Nothing is on the device any more but what stays."""
        for gate in self.gates:
            if gate.homes:  # its forward was interrupted
                gate.depth = 0
                self._restore(gate)
        for slot in self._slots:
            slot.block, slot.last = None, 0
        self.carrier.settle()

    # -- coming and going ----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what it makes is written again outside of that mode
    @torch.no_grad()
    def enter(self, gate: Gate, alone: bool = False) -> None:
        """A block's forward begins: its weights are there, up to date."""
        if torch.compiler.is_compiling():
            raise InputError(f"{gate.block.name}: a compiled model cannot be streamed; run it uncompiled")
        block = gate.block
        with self.reads.paused() if self.reads is not None else nullcontext():
            slot = self._bring(block)
            if not alone and (self._passing or self._whole):
                for following in self.blocks[block.number + 1 : block.number + 1 + self.ahead]:
                    self._bring(following, used=False)
            self.carrier.enter(slot)
            if slot.fresh and self._codec is not None:
                for _, view, parts in self._parts(block, slot):
                    self._codec.decode(parts, view)
            slot.fresh = False
            gate.homes = [p.data for p in block.params]
            for p, view in zip(block.params, slot.views, strict=False):
                p.data = view
                if self.reads is not None:
                    self.reads.moved(p)
            self._pay(gate, slot)

    def leave(self, gate: Gate) -> None:
        """It has ended."""
        self._restore(gate)
        slot = next((slot for slot in self._slots if slot.block == gate.block.number), None)
        if slot is not None:
            self.carrier.leave(slot)
            if not (self._passing or self._whole):
                slot.block = None
                self.carrier.settle()

    def _restore(self, gate: Gate) -> None:
        for p, home in zip(gate.block.params, gate.homes, strict=True):
            if torch.is_grad_enabled() and p.requires_grad:  # a backward would find other weights there
                torch.autograd.graph.increment_version(p)
            p.data = home
            if p in self._seen:
                self._seen[p] = p._version
        gate.homes = []

    def _bring(self, block: Block, used: bool = True) -> Slot:
        """The slot that holds a block; its transfer is begun where it does not yet."""
        slot = next((slot for slot in self._slots if slot.block == block.number), None)
        if slot is None:
            busy = {gate.block.number for gate in self.gates if gate.homes}
            free = [slot for slot in self._slots if slot.block is None or slot.block not in busy]
            if not free:  # one block runs inside of another
                free = [Slot()]
                self._slots += free
            slot = min(free, key=lambda s: (s.block is not None, s.last))
            self._check(block)
            wanted = self._wanted_of(block)
            self.carrier.fit(slot, wanted)
            slot.block, slot.fresh = block.number, True
            coded = [p in self.codes for p in block.params] + [False] * (len(wanted) - len(block.params))
            pairs = [(view, w) for view, w, skip in zip(slot.views, wanted, coded, strict=True) if not skip]
            self.carrier.bring(slot, pairs)
            self.brought += bytes_of([source for _, source in pairs])
            self.moves += 1
        self._clock += 1
        slot.last = self._clock
        return slot

    def _parts(self, block: Block, slot: Slot) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """(parameter, its place, its codes' place) of what is coded."""
        codes = iter(slot.views[len(block.params) :])
        for p, view in zip(block.params, slot.views, strict=False):
            if p in self.codes:
                yield p, view, [next(codes) for _ in self.codes[p]]

    def _check(self, block: Block) -> None:
        """Before a block leaves the host: it is there, and its codes are those of its weights."""
        for p in block.params:
            if p.device.type != "cpu":
                raise InputError(
                    f"{block.name}: its weights are on {p.device}, but streamed blocks rest on the host; do not move the model"
                )
            if p in self.codes and self._seen.get(p) == COPIED:
                self._seen[p] = p._version
            elif p in self.codes and self._seen.get(p) != p._version:  # the first time, or somebody has changed it
                assert self._codec is not None
                self._codec.encode(p.data, self.codes[p], None)
                self._stale.add(p)
                self._seen[p] = p._version

    def _pay(self, gate: Gate, slot: Slot) -> None:
        """Take the steps that are owed, and begin to write the block back."""
        block, changed = gate.block, []
        coded = {p: parts for p, _, parts in self._parts(block, slot)}
        for p, home, view in zip(block.params, gate.homes, slot.views, strict=False):
            records = self.owed.pop(p, [])
            for record in records:
                assert self.pay is not None
                key = self.pay(p, record)
                if self._codec is not None and p in coded:
                    self._codec.encode(view, coded[p], key)
                    self._codec.decode(coded[p], view)
            if records and p in coded:
                self._stale.add(p)
                changed += list(zip(self.codes[p], coded[p], strict=True))
            elif records:
                changed.append((home, view))
        if changed:
            self.carrier.write(slot, changed)
            self.written += bytes_of([home for home, _ in changed])

    def flush(self, params: Iterable[Tensor] | None = None) -> None:
        """Take all steps that are owed; to some parameters, or to all."""
        if not self.owed and not self._stale:
            return
        wanted = set(self.owed) if params is None else set(params) & set(self.owed)
        counts = self.brought, self.written, self.moves
        with self.passing():
            for gate in self.gates:
                if wanted.intersection(gate.block.params):
                    self.enter(gate, alone=True)
                    self.leave(gate)
        self.brought, self.written, self.moves = counts  # of steps
        if self._codec is not None and not self._passing:
            for p in self._stale:
                self._codec.decode(self.codes[p], p.data)
            self._stale.clear()

    def count(self) -> None:
        """Begin to count what is moved, for the report."""
        self.brought = self.written = self.moves = 0

    # -- words ---------------------------------------------------------------------------------------------------------

    def report(self) -> StreamReport:
        return StreamReport(
            len(self.blocks), self.largest, self.resident, len(self._slots), self.brought, self.written, self.moves,
            self.carrier.room.peak,
        )  # fmt: skip

    def describe(self) -> str:
        first = self.blocks[0].name.rpartition(".")[0] or self.blocks[0].name
        short = f" ({self._wanted} were wanted, the budget is short)" if self.ahead < self._wanted else ""
        limit = self.carrier.room.limit
        kept = f", {len(self.codes)} matrices kept as {self.transfer}" if self.codes else ""
        most = self.resident + self.copies + len(self._slots) * self.largest
        return (
            f"streamed: {len(self.blocks)} blocks of {first}, {self.largest:,} bytes the largest, to {self.carrier.describe()}{kept}; "
            f"{self.ahead} ahead{short}; at most {most:,} bytes of weights there"
            + ("" if limit is None else f", of {limit:,}")
        )

    def __getstate__(self) -> dict[str, Any]:
        gone = ("carrier", "_slots", "turn", "reads")
        return {name: value for name, value in self.__dict__.items() if name not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._seen = dict.fromkeys(self._seen, COPIED)
        self._open()


COPIED = -1  # a copied tensor counts its versions anew


def _coded(p: Tensor, transfer: str) -> bool:
    """Vectors are few, and stay as they are; so does what has as few bits already."""
    return (
        p.ndim >= 2
        and p.is_contiguous()
        and (p.dtype == torch.float32 or (p.dtype == torch.bfloat16 and "8" in transfer))
    )
