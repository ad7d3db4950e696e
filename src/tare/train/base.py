"""The base of a fine-tune: frozen weights that were read from files. Checkpoints say which they are, and do not hold them.

An adapter of a few megabytes on a model of 14 GiB makes checkpoints of a few megabytes. They go on only on the same base.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from tare.core.errors import CheckpointError
from tare.core.weights import plain_parts, was_read
from tare.zeroth.digest import combined, digest_of

KEY = "base"  # in a manifest


@dataclass(frozen=True)
class Base:
    """Weights that a checkpoint leaves out: none, or those of a model.

    model: where they were read. names: as in `checkpoint.weights_of`. digest: of their bytes, in the order of names.
    """

    model: str = ""
    names: frozenset[str] = frozenset()
    digest: str = ""
    nbytes: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: nothing where nothing is left out."""
        if not self.names:
            return {}
        return {KEY: {"model": self.model, "digest": self.digest, "weights": len(self.names), "bytes": self.nbytes}}


NONE = Base()


def base_of(model: nn.Module, name: str) -> Base:
    """What of a model, before it is cut among processes, checkpoints need not hold.

    Weights that the files lack were drawn, and may be drawn otherwise by another torch: they are kept. name: of the model, as in the
    configuration.
    """
    frozen = {leaf: p for leaf, p in model.named_parameters() if not p.requires_grad and was_read(p)}
    parts = {part: t for leaf, p in frozen.items() for part, t in plain_parts(leaf, p).items()}
    size = sum(t.numel() * t.element_size() for t in parts.values())
    digest = combined({leaf: digest_of(frozen[leaf]) for leaf in sorted(frozen)}).hex()
    return Base(name, frozenset(parts), digest, size)


def left_out(manifest: dict[str, Any], base: Base) -> frozenset[str]:
    """The weights of a model that a checkpoint does not hold because its base does.

    Raises:
        CheckpointError: it stands on another base than this one.
    """
    said = manifest.get(KEY)
    if said is None:
        return NONE.names
    said = said if isinstance(said, dict) else {}
    if said.get("digest") != base.digest:
        raise CheckpointError(
            f"holds only what was trained, on the weights of {said.get('model')!r}, and the model has other ones now; put those back"
        )
    return base.names
