"""A fine-tune as a list of numbers: which directions, how far. With the base weights it is the trained model, bit for bit.

MeZO (arXiv 2305.17333, section 2.1) proposes storing (seed, projected gradient) pairs; its code does not. Here a step is about 25 bytes.
"""

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from tare import __version__
from tare.core.errors import InputError
from tare.zeroth.digest import combined, digests
from tare.zeroth.directions import Directed, Law
from tare.zeroth.logfile import FORMAT, read
from tare.zeroth.logformat import Context, framed, header_bytes, seal_payload, step_payload
from tare.zeroth.portable import encode
from tare.zeroth.record import KEPT, PAST, Record

if TYPE_CHECKING:
    from tare.zeroth.optimizer import ForwardOptimizer

SAME = ("format", "method", "storage", "seeds", "maximize", "module", "options")  # what a continued log must agree in


class SeedLog:
    """Writes every step of a forward-only method to a file that only grows; give it to the optimizer as `on_step`.

    Every step is one write, so a killed run leaves whole records and perhaps a part of one, which is cut off when the log is continued
    or read. A run that resumes from a checkpoint goes on in the same file: what was written after the checkpoint is cut off first.

    Args:
        path: the file. It must be new or empty, or a log of this very run.
        overwrite: begin anew where the file holds steps and the optimizer has done none.

    Raises:
        InputError: at the first step: the file is something else, or of another run, or lacks steps that the optimizer has done; state
            that the log cannot know of.

    >>> import tempfile, torch
    >>> from tare import MeZO
    >>> net = torch.nn.Linear(4, 1)
    >>> with tempfile.TemporaryDirectory() as folder, SeedLog(f"{folder}/run.seeds") as log:
    ...     opt = MeZO(net, lr=1e-2, on_step=log)
    ...     for _ in range(3):
    ...         _ = opt.step(lambda: net(torch.ones(2, 4)).square().mean())
    ...     log.steps
    3
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self._file: IO[bytes] | None = None
        self._optimizer: ForwardOptimizer | None = None
        self._context, self._chain = Context(), 0
        self.steps = 0  # in the file

    def begin(self, optimizer: "ForwardOptimizer") -> None:
        """Called by the optimizer before the first step that is recorded."""
        if self._optimizer is not None:
            raise InputError(f"{self.path}: one log is of one run; give each optimizer a SeedLog of its own")
        if optimizer.memory.drifts:
            raise InputError(
                f"{self.path}: memory {optimizer.memory.name!r} leaves rounding errors in the weights that no log knows of; use "
                "'forward' or 'in-place-exact'"
            )
        self._order = {leaf.name: number for number, leaf in enumerate(optimizer.leaves)}
        if len(self._order) < len(optimizer.leaves):
            raise InputError(
                f"{self.path}: two leaves have one name, and the log goes by names; give parameters names of their own"
            )
        self._with_kept = any(
            isinstance(e.transform, Directed) and type(e.transform.law).learn is not Law.learn
            for e in optimizer._entries.values()
        )
        self._groups = len(optimizer.param_groups)
        if self.path.exists() and self.path.stat().st_size:
            self._continue(optimizer)
        else:
            self._start(optimizer)
        self._optimizer = optimizer

    def _start(self, optimizer: "ForwardOptimizer") -> None:
        stateful = [
            leaf.name for leaf, raw in _states(optimizer) if any(isinstance(value, Tensor) for value in raw.values())
        ]
        if optimizer.steps and (stateful or PAST in optimizer.param_groups[0]):
            raise InputError(
                f"{self.path}: a new log at step {optimizer.steps} would lack the state that is there by now; log from the first step "
                "on, or go on with the log of this run"
            )
        self._header = header_of(optimizer)
        head = header_bytes(self._header)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".part")
        fresh.write_bytes(head)
        fresh.replace(self.path)
        self._open(len(head))
        self._chain = struct.unpack("<I", head[-4:])[0]
        self.sync()

    def _open(self, end: int) -> None:
        """To go on behind byte `end`; what is there is cut off."""
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  # closed by `close`
        self._file.truncate(end)
        self._file.seek(end)

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        if self._file.write(data) != len(data):  # in one call, so that a killed run leaves at most one record in part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _continue(self, optimizer: "ForwardOptimizer") -> None:
        log = read(self.path)
        own = header_of(optimizer, hashes=False)
        for name in SAME:
            if own[name] != log.header[name]:
                raise InputError(f"{self.path}: the log is of another run, its {name} differ; give another path")
        theirs = [{**leaf, "hash": "", "count": 0} for leaf in log.header["leaves"]]
        if [{**leaf, "count": 0} for leaf in own["leaves"]] != theirs:
            raise InputError(f"{self.path}: the log is of another run, its leaves differ; give another path")
        done = optimizer.steps - log.start
        if not 0 <= done <= log.steps:
            raise InputError(
                f"{self.path}: the log holds steps {log.start} to {log.start + log.steps}, the optimizer is at {optimizer.steps}; resume "
                "from a checkpoint within them"
            )
        if done == 0 and log.steps:
            if not self.overwrite:
                raise InputError(f"{self.path}: holds {log.steps} steps already; give another path, or overwrite=True")
            self._start(optimizer)
            return
        self._header, self._context, self._chain = log.header, log.contexts[done], log.chains[done]
        self._open(log.ends[done])
        self.steps = done

    def __call__(self, record: Record) -> None:
        if self._file is None:
            raise InputError(f"{self.path}: the log is closed")
        if len(record.rates) != self._groups or not self._order.keys() >= set(record.leaves):
            raise InputError(
                f"{self.path}: parameters were added after the log was begun; begin another one with all of them"
            )
        payload = step_payload(record, self._context, self._order, self._with_kept)
        data, self._chain = framed(payload, self._chain)
        self._write(data)
        self._context = Context.after(record, self._order)
        self.steps += 1

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> None:
        """Make sure that what was written survives the machine; before a checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self, seal: bool = True) -> None:
        """Close the file. seal: write the digest of the weights as they are now, so that a replay can tell that it came to the same."""
        if self._file is None:
            return
        if seal and self._optimizer is not None:
            digest = combined(digests(self._optimizer))
            self._write(framed(seal_payload(digest), self._chain)[0])
        self.sync()
        self._file.close()
        self._file = None

    def __enter__(self) -> "SeedLog":
        return self

    def __exit__(self, *fault: Any) -> None:
        self.close(seal=fault[0] is None)


def header_of(optimizer: "ForwardOptimizer", hashes: bool = True) -> dict[str, Any]:
    """What a log says of its run. hashes: of the weights as they are now."""
    found = digests(optimizer) if hashes else {}
    leaves = []
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            entry = optimizer._entries[p]
            leaf = entry.leaf
            leaves.append(
                {
                    "name": leaf.name, "key": entry.key, "named": bool(group.get("param_names")), "role": leaf.role,
                    "dtype": str(leaf.dtype).removeprefix("torch."), "shape": list(leaf.shape), "group": number,
                    "trained": p.requires_grad, "count": int(optimizer.state[p]["step"]) if p in optimizer.state else 0,
                    "hash": found[leaf.name].hex() if hashes else "",
                }
            )  # fmt: skip
    card = getattr(type(optimizer), "CARD", None)
    return {
        "format": FORMAT, "tare": __version__, "torch": torch.__version__, "method": card.key if card else None,
        "options": {name: encode(value) for name, value in getattr(optimizer, "given", {}).items() if name != "on_step"},
        "storage": encode(asdict(optimizer.storage)), "seeds": [int(group["seed"]) for group in optimizer.param_groups],
        "maximize": [bool(group["maximize"]) for group in optimizer.param_groups], "module": optimizer.from_module,
        "start": optimizer.steps, "kept": dict(optimizer.param_groups[0][KEPT]), "leaves": leaves,
    }  # fmt: skip


def _states(optimizer: "ForwardOptimizer") -> Iterator[tuple[Any, dict[str, Any]]]:
    for p, entry in optimizer._entries.items():
        if p in optimizer.state:
            yield entry.leaf, optimizer.state[p]
