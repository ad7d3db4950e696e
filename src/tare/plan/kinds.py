"""Kinds of models: what their heads put out; from the architecture that a config names, and back to a class of `transformers`."""

from typing import TYPE_CHECKING, Any, Literal

from tare.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["causal", "masked", "classifier"]
ENDINGS: dict[str, Kind] = {
    "ForCausalLM": "causal", "LMHeadModel": "causal", "ForMaskedLM": "masked", "ForSequenceClassification": "classifier",
}  # fmt: skip
AUTO = {
    "causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "classifier": "AutoModelForSequenceClassification",
}  # fmt: skip


def kind_of(config: "PretrainedConfig", wanted: str = "auto") -> Kind:
    """The kind of a model: as wanted, or by the architecture that the config names; a bare encoder becomes a classifier.

    Raises:
        InputError: `transformers` has no such head for the architecture.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    mappings: dict[str, Any] = {
        "causal": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "masked": transformers.MODEL_FOR_MASKED_LM_MAPPING,
        "classifier": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    if wanted == "auto":
        for ending, kind in ENDINGS.items():
            if names and names[0].endswith(ending):
                return kind
        masked = type(config) in mappings["masked"] and type(config) in mappings["classifier"]
        wanted = "classifier" if names and masked else "masked" if masked else "causal"
    if type(config) not in mappings[wanted]:
        able = ", ".join(kind for kind, mapping in mappings.items() if type(config) in mapping) or "nothing of these"
        raise InputError(
            f"model.kind: transformers has no {wanted} model of type {config.model_type!r}; it can be {able}"
        )
    found: Any = wanted
    return found


def auto_class(kind: Kind) -> Any:
    """The class of `transformers` that makes models of a kind."""
    import transformers

    return getattr(transformers, AUTO[kind])
