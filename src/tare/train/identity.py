"""What a checkpoint must agree on with the run that goes on from it, besides the configuration: model, tokenizer, data."""

import json
from typing import TYPE_CHECKING, Any

from tare.core.errors import CheckpointError

if TYPE_CHECKING:
    from tare.train.checkpoint import Snapshot
    from tare.train.session import Session

# Of a model's config what changes nothing that it computes, or is set anew when it is saved.
_BESIDE = (
    "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip


def identity(session: "Session") -> dict[str, Any]:
    """Plain values, by name.

    `data`: of the sources. `tokens`: of what was made of them, where that is kept as files. `model`: its config.
    """
    corpus, config = session.corpus, getattr(session.model, "config", None)
    facts: dict[str, Any] = config.to_dict() if config is not None else {}
    facts = {name: value for name, value in facts.items() if name not in _BESIDE and not name.startswith("_")}
    model = json.loads(json.dumps(facts, sort_keys=True, default=str))
    return {
        "tokenizer": corpus.tokenizer_hash,
        "data": corpus.fingerprint,
        "tokens": corpus.tokens_hash,
        "model": model,
    }


def check(session: "Session", snapshot: "Snapshot") -> None:
    """Raise `CheckpointError` where a checkpoint is of another model, tokenizer or data. What an older tare did not note is not asked."""
    saved, own = snapshot.trainer, identity(session)
    what = None
    if saved.get("tokenizer") != own["tokenizer"]:
        what = "the tokenizer has"
    elif (saved.get("tokens") or own["tokens"]) != own["tokens"]:
        what = "the training data has"
    elif saved.get("data") != own["data"] and not (own["tokens"] and saved.get("tokens")):
        what = "the training data has"  # large files count by their time of change: with the same tokens they were copied or touched
    elif key := _first_other(saved.get("model", {}), own["model"]):
        what = f"{key} in the config.json of the model has"
    if what is not None:
        raise CheckpointError(
            f"{snapshot.folder}: {what} changed since it was saved, so the run cannot go on as it was; restore it, or start a new run "
            "in another run.out"
        )


def _first_other(saved: dict[str, Any], own: dict[str, Any], within: str = "") -> str | None:
    """The first setting that both have and that differs; another transformers may know others."""
    for name in sorted(saved.keys() & own.keys()):
        a, b, key = saved[name], own[name], f"{within}{name}"
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := _first_other(a, b, f"{key}."):
                return inner
        elif a != b:
            return key
    return None
