"""Fine-tuning of an adapter alone, or of leaves that a pattern names: settings, checks, and what the planner is told.

The adapters themselves are PEFT's (LoRA: arXiv 2106.09685, IA3: 2205.05638, prefix tuning: 2101.00190). Light to import; no torch.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tare.core.errors import InputError
from tare.train.settings import Section, setting

if TYPE_CHECKING:
    from torch import nn

    from tare.plan.activations import Workload
    from tare.plan.kinds import Kind
    from tare.train.config import RunConfig

Form = Literal["lora", "ia3", "prefix"]
FIELDS = {"lora": ("rank", "alpha", "targets", "dropout", "merge"), "ia3": ("targets", "merge"), "prefix": ("tokens",)}


@dataclass(frozen=True)
class AdapterConfig(Section):
    """What is trained beside frozen weights. `kind`: none, or an adapter of PEFT."""

    title = "adapter"
    kind: Form | None = setting(None, "train an adapter alone: lora, ia3 or prefix; the model itself stays as it is")  # noqa: RUF009
    rank: int | None = setting(None, "lora: rank of the two factors; none = 8", low=1)
    alpha: float | None = setting(None, "lora: what is added is multiplied by alpha / rank; none = 16", above=0)
    targets: str | None = setting(
        None,
        'lora, ia3: layers by the ends of their names, "q_proj,v_proj", or all-linear; none = PEFT\'s for the model',
    )
    dropout: float = setting(0.0, "lora: dropout before the factors", low=0, below=1)
    tokens: int | None = setting(None, "prefix: positions before the text, in every layer; none = 5", low=1)
    merge: bool = setting(False, "lora, ia3: save the whole model with the adapter merged into its weights")

    def check_together(self) -> None:
        given = [name for name in ("rank", "alpha", "targets", "tokens") if getattr(self, name) is not None]
        given += [name for name in ("dropout", "merge") if getattr(self, name)]
        for name in given:
            if self.kind is None:
                raise InputError(
                    f"adapter.{name}: there is no adapter; set adapter.kind (--adapter lora), or leave it out"
                )
            if name not in FIELDS[self.kind]:
                able = " and ".join(kind for kind, names in FIELDS.items() if name in names)
                raise InputError(f"adapter.{name}: is for {able}; {self.kind} has none: leave it out")
        if self.targets is not None and not self.names:
            raise InputError(f"adapter.targets: expected names of layers, separated by commas, got {self.targets!r}")

    @property
    def names(self) -> list[str]:
        """The targets, one by one."""
        return [name.strip() for name in (self.targets or "").split(",") if name.strip()]

    def filled(self) -> "AdapterConfig":
        """With the defaults of its kind written out: rank 8, alpha 16 and 5 tokens, as in MeZO (arXiv 2305.17333)."""
        if self.kind == "lora":
            return replace(self, rank=self.rank or 8, alpha=self.alpha or 16.0)
        return replace(self, tokens=self.tokens or 5) if self.kind == "prefix" else self


def check(config: "RunConfig") -> None:
    """Raise `InputError` for an adapter or a choice of leaves that does not go with the rest of the settings."""
    from tare.train.matching import patterns

    adapter, match = config.adapter, config.train.match
    if match is not None and not patterns(match):
        raise InputError(f"train.match: expected patterns of names, separated by commas, got {match!r}")
    for name, given in (("adapter.kind", adapter.kind), ("train.match", match)):
        if given is not None and config.model.quantize is not None:
            raise InputError(
                f"{name}: is not for models in few bits, of which qzo trains the scales; leave out model.quantize"
            )
    if adapter.kind is None:
        return
    peft()
    if match is not None:
        raise InputError(
            "train.match: an adapter is trained whole, and nothing else; leave out train.match or adapter.kind"
        )
    if adapter.kind == "prefix" and config.model.checkpointing:
        raise InputError(
            "model.checkpointing: recomputed layers get no keys and values from outside, so a prefix would be ignored; leave it "
            "out, or use adapter.kind lora"
        )


def check_storage(config: "RunConfig", weight: str) -> None:
    """Raise `InputError` where a method holds weights in a form that frozen ones cannot have. weight: of its `Storage`."""
    for name, given in (("adapter.kind", config.adapter.kind), ("train.match", config.train.match)):
        if given is not None and weight == "int8":
            raise InputError(
                f"{name}: {config.method.key} steps int8 weights, and here the weights of layers stay as they are; use another method"
            )


def peft() -> Any:
    """The package. Raises `InputError`, naming the extra, where it is not installed."""
    try:
        import peft as package
    except ImportError:
        raise InputError(
            'adapter.kind: PEFT is not installed; pip install "tare[peft]", or leave the setting out'
        ) from None
    return package


def apply(model: "nn.Module", config: "RunConfig", kind: "Kind") -> "nn.Module":
    """The model as a configuration wants it trained: with an adapter, or with leaves frozen, or as it is."""
    from tare.train.adapter_layers import attach
    from tare.train.matching import keep_matching

    if config.train.match is not None:
        keep_matching(model, config.train.match)
    if config.adapter.kind is None:
        return model
    return attach(model, config.adapter, kind, config.run.seed, base=config.model.name)


def planned(work: "Workload | None", config: "RunConfig") -> "Workload | None":
    """A workload on the model as a configuration wants it trained; as it is where all of it is."""
    adapter, match = config.adapter.filled(), config.train.match
    if adapter.kind is None and match is None:
        return work
    from tare.train.adapter_layers import attach
    from tare.train.altered import Altered
    from tare.train.matching import keep_matching

    kind: Kind = "causal" if work is None else work.kind

    def change(model: "nn.Module") -> "nn.Module | None":
        if match is not None:
            keep_matching(model, match)
        return (
            attach(model, adapter, kind, 0, base=config.model.name, sketch=True) if adapter.kind is not None else None
        )

    said = {"match": match, "adapter": {**asdict(adapter), "merge": False}, "version": _version(adapter)}
    return Altered(work, config.train.batch, config.data.seq, change, said)


def _version(adapter: AdapterConfig) -> str | None:
    return str(peft().__version__) if adapter.kind is not None else None


def notes(config: "RunConfig", model: "nn.Module", optimizer: Any) -> list[str]:
    """What a user should know of a run that trains a part of the model, a line each; nothing for others."""
    adapter, match = config.adapter, config.train.match
    if adapter.kind is None and match is None:
        return []
    trained = [p for p in optimizer._entries if p.requires_grad or p in optimizer.state]
    of, among = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    what = f"adapter {adapter.kind}" if adapter.kind is not None else f"leaves that match {match}"
    found = [f"{what}: {of:,} of {among:,} weights in {len(trained)} leaves are trained, the others are frozen"]
    dense = [optimizer._entries[p] for p in trained if optimizer._entries[p].why.startswith("rank ")]
    if dense:
        found.append(
            f"{len(dense)} of these are stepped without a subspace, the first because {dense[0].why.removesuffix(': dense')}; a smaller "
            "method.rank would give them one"
        )
    return found
