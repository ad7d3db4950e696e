"""`tare.plan(...)`: before anything is launched, what each method needs and which one fits."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tare.core.checks import check_choice, check_whole
from tare.core.errors import DoesNotFit, InputError
from tare.core.gathering import Gathering, Source
from tare.core.storage import Storage
from tare.kernels import native
from tare.methods import registry
from tare.plan.activations import Precision, Workload, check_step
from tare.plan.budget import format_bytes, parse_bytes
from tare.plan.links import parse_links
from tare.plan.models import plannable, positions
from tare.plan.ranks import Parallel, Ranks
from tare.plan.released import Bases
from tare.plan.resolve import check_known
from tare.plan.rows import PlanRow, Settings, plan_row
from tare.plan.search import Advice, advise
from tare.plan.shapes import ModelShape, named

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Plan:
    """A line for every method, in the order in which `--method auto` prefers them."""

    settings: Settings
    budget: int | None
    rows: tuple[PlanRow, ...]
    advice: Advice | None  # only if there is a budget and nothing fits it

    def row(self, method: str) -> PlanRow:
        """The line of one method."""
        for row in self.rows:
            if row.method == method:
                return row
        raise InputError(f"method {method!r} is not in this plan; it has {', '.join(row.method for row in self.rows)}")

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values; bytes are whole numbers."""
        from tare.plan.report import to_json

        return to_json(self)

    def table(self) -> "Table":
        """The plan as a `rich` table."""
        from tare.plan.report import table

        return table(self)


def plan(
    model: "str | Path | nn.Module | PretrainedConfig",
    budget: str | int | None = None,
    batch: int | None = None,
    seq: int | None = None,
    methods: Sequence[str] | None = None,
    checkpointing: bool = False,
    release: bool = False,
    accumulate: int = 1,
    clip_mode: Literal["exact", "previous", "two-pass"] = "exact",
    dtype: Literal["fp32", "bf16"] | None = None,
    precision: Precision | None = None,
    storage: dict[str, Any] | Storage | None = None,
    hyper: dict[str, Any] | None = None,
    clip_parts: int = 1,
    refresh_from: Source = "sum",
    refresh_parts: int = 1,
    progress: Callable[[str], None] | None = None,
    work: Workload | None = None,
    gpus: int | None = None,
    parallel: Parallel | None = None,
    shards: int | None = None,
    link: str | None = None,
    gpus_per_node: int = 8,
    sync: Literal["step", "batch"] | None = None,
) -> Plan:
    """Predict the peak memory of training `model` with every method.

    State bytes are exact; activations and temporaries come from a step that is tracked on fake tensors, so nothing of the
    model's size is allocated. All figures are bytes of tensors: a CUDA context and fragmentation come on top.

    Args:
        model: a named model (`"llama-7b"`), a `transformers` folder or config, or a model that has a config.
        budget: e.g. `"24GiB"`, or bytes.
        batch: sequences per micro-batch, of all ranks together; default: one for each rank.
        seq: tokens per sequence; default: all positions of the model.
        methods: registry keys; default all that step with gradients.
        checkpointing: recompute activations in backward. release: step each leaf inside backward.
        accumulate: micro-batches per step. clip_mode: how release clips, see `train.clip_mode`.
        dtype: of the weights, by default as `precision` says. precision: fp32, bf16-autocast or bf16 (weights too).
        storage: fields of `tare.Storage` that go on top of each method's own.
        hyper: constructor arguments (`rank`, ...) that go on top of each method's preset; methods without one ignore it.
        clip_parts: measuring passes of two-pass clipping. refresh_from, refresh_parts: with release and micro-batches, what
            bases are computed from; see `Optimizer.refresh_release`.
        progress: called with a few words whenever something else is looked at.
        work: what the model is fed, on one rank; None: packed text, `batch` sequences of `seq` tokens.
        gpus: ranks, one process to each GPU; then lines are those of the rank that needs most.
        parallel: `ddp` (default), `fsdp` or `hsdp`. shards: among how many weights are cut, which alone means hsdp.
        sync: whether gradients are sent once a step or after every micro-batch; default as in a run.
        link: speed of the links between GPUs, e.g. `"50GB/s"`, `"nvlink4"`, or two of these with a comma: within and between
            machines; then communication is timed, on paper. gpus_per_node: GPUs of one machine.

    Raises:
        InputError: anything of this that makes no sense, in one line.

    >>> result = plan("llama-tiny", budget="1GiB", batch=2, seq=32, methods=["adamw"])
    >>> result.row("adamw").state, result.row("adamw").fits
    (8430592, True)
    """
    if isinstance(model, nn.Module):
        dtype = dtype or _dtype_of(model)
    precision = precision or dtype or "fp32"
    dtype = dtype or ("bf16" if precision == "bf16" else "fp32")
    config, name = _config(model, work is not None)
    if seq is None:
        seq = int(positions(config) or 0) or 1024
    ranks, links = _ranks(gpus, parallel, shards, gpus_per_node, sync), None if link is None else parse_links(link)
    batch = (1 if ranks is None else ranks.gpus) if batch is None else batch
    check_step(config, batch, seq, dtype, precision)
    if links is not None and ranks is None:
        raise InputError(f"link {link!r} joins GPUs, and one is planned: give --gpus too")
    batch = batch if ranks is None else ranks.share(batch)
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise InputError(f"accumulate {accumulate!r} must be a whole number of at least 1")
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    if limit is not None and limit <= 0:
        raise InputError(f"budget {budget!r} must be greater than zero")
    keys = list(dict.fromkeys(methods)) if methods is not None else registry.keys("gradient")
    keys.sort(key=lambda key: registry.card(key).auto_rank)
    check_known(hyper or {}, keys)
    check_choice("clip_mode", clip_mode, ("exact", "previous", "two-pass"))
    check_whole("clip_parts", clip_parts)
    Gathering(refresh_from, refresh_parts)  # checks the two
    settings = Settings(
        config, name, batch, seq, dtype, precision, checkpointing, release, accumulate, clip_mode, storage,
        dict(hyper or {}), clip_parts, Bases(refresh_from, refresh_parts), alone=len(keys) == 1, work=work, ranks=ranks, links=links,
    )  # fmt: skip
    tell = progress or (lambda news: None)
    rows = []
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(native.available)  # on a machine that has no kernels yet they are compiled meanwhile
        if sum(registry.card(key).kind == "gradient" for key in keys) > 1:
            tell("forward and backward")
            settings.profile()  # kept, and nearly all methods will ask for it
    for number, key in enumerate(keys, 1):
        tell(f"{key} ({number} of {len(keys)})")
        rows.append(plan_row(settings, key, limit))
    nothing = limit is not None and rows and not any(row.fits for row in rows)
    advice = advise(settings, keys, limit, tell) if nothing and limit is not None else None
    return Plan(settings, limit, tuple(rows), advice)


def _ranks(
    gpus: int | None, parallel: Parallel | None, shards: int | None, node: int, sync: Literal["step", "batch"] | None
) -> Ranks | None:
    if gpus is None:
        for name, value in (("parallel", parallel), ("shards", shards)):
            if value is not None:
                raise InputError(f"{name} {value!r} is for several GPUs: give --gpus too")
        return None
    return Ranks(
        gpus, parallel or ("ddp" if shards is None else "hsdp"), shards, node, None if sync is None else sync == "batch"
    )


def choose(plan: Plan) -> str:
    """The method for `--method auto`: the first by its card's order among those that fit.

    Raises:
        DoesNotFit: none does; the message names the smallest change that would.
    """
    for row in plan.rows:
        if row.fits is not False:
            return row.method
    assert plan.budget is not None
    least = min(plan.rows, key=lambda row: row.peak)
    advice = f"; {plan.advice.text}" if plan.advice else ""
    raise DoesNotFit(
        f"budget {format_bytes(plan.budget)} is too small: {least.method} needs {format_bytes(least.peak)} "
        f"({least.event}){advice}"
    )


def require_fit(plan: Plan, method: str) -> PlanRow:
    """The line of `method`, if it fits.

    Raises:
        DoesNotFit: it does not; the message names the smallest change with which it would, or another method that fits.
    """
    row = plan.row(method)
    if row.fits is not False:
        return row
    assert plan.budget is not None
    why = row.note or f"needs {format_bytes(row.peak)} ({row.event})"
    others = [other.method for other in plan.rows if other.fits]
    instead = f"; {', '.join(others)} would fit" if others else ""
    advice = plan.advice if plan.advice and plan.advice.method == method else None
    advice = advice or advise(plan.settings, [method], plan.budget)
    raise DoesNotFit(f"budget {format_bytes(plan.budget)}: method {method} {why}; {advice.text}{instead}")


def _config(
    model: "str | Path | nn.Module | PretrainedConfig", heads: bool = False
) -> tuple["PretrainedConfig | ModelShape", str]:
    if isinstance(model, (str, Path)):
        return plannable(model, heads=heads), named(str(model)) or str(model)
    config: Any = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    if not hasattr(config, "to_dict") or not hasattr(config, "model_type"):
        raise InputError(
            f"model: a {type(model).__name__} has no transformers config; give a name, a folder or such a model"
        )
    return config, str(getattr(config, "name_or_path", "") or config.model_type)


def _dtype_of(model: nn.Module) -> Literal["fp32", "bf16"]:
    first = next(model.parameters(), None)
    return "bf16" if first is not None and first.dtype == torch.bfloat16 else "fp32"
