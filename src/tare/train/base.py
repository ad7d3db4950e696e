"""The base of a fine-tune: frozen weights that were read from files. Checkpoints say which they are, and do not hold them.

An adapter of a few megabytes on a model of 14 GiB makes checkpoints of a few megabytes. They go on only on the same base.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from tare.core.errors import CheckpointError
from tare.core.weights import plain_parts, was_read
from tare.zeroth.digest import digest_of

KEY = "base"  # in a manifest


@dataclass(frozen=True)
class Base:
    """Weights that a checkpoint leaves out.

    model: where they were read. names: as in `checkpoint.weights_of`. digest: of names and bytes.
    """

    model: str
    names: frozenset[str]
    digest: str
    nbytes: int

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {KEY: {"model": self.model, "digest": self.digest, "weights": len(self.names), "bytes": self.nbytes}}


def base_of(model: nn.Module, name: str) -> Base | None:
    """What of a model, before it is cut among processes, checkpoints need not hold; None where that is nothing.

    Weights that the files lack were drawn, and may be drawn otherwise by another torch: they are kept. name: of the model, as in the
    configuration.
    """
    frozen = {leaf: p for leaf, p in model.named_parameters() if not p.requires_grad and was_read(p)}
    if not frozen:
        return None
    found = hashlib.blake2b(digest_size=16)
    for leaf in sorted(frozen):
        found.update(leaf.encode() + b"\0" + digest_of(frozen[leaf]))
    parts = {part: t for leaf, p in frozen.items() for part, t in plain_parts(leaf, p).items()}
    size = sum(t.numel() * t.element_size() for t in parts.values())
    return Base(name, frozenset(parts), found.hexdigest(), size)


def left_out(manifest: dict[str, Any], base: Base | None) -> frozenset[str]:
    """The weights of a model that a checkpoint does not hold because its base does.

    Raises:
        CheckpointError: it stands on another base than this one.
    """
    said = manifest.get(KEY)
    if said is None:
        return frozenset()
    said = said if isinstance(said, dict) else {}
    if base is None or said.get("digest") != base.digest:
        raise CheckpointError(
            f"holds only what was trained, on the weights of {said.get('model')!r}, and the model has other ones now; put those back"
        )
    return base.names
