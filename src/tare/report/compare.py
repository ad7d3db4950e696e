"""A comparison: one run per method with the same data, tokens and seed, each in its own folder below the output folder.

    compare.yaml   the common settings        compare.json   all rows        report.html   the page
    <method>/      the run, its report.html, and row.json once it is finished

A finished method is not run again on resume; an unfinished one goes on from its checkpoint.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.core.errors import CheckpointError, DoesNotFit, InputError
from tare.plan.budget import parse_bytes
from tare.report.html import page
from tare.report.rows import Row
from tare.train.cache import write_atomic
from tare.train.config import RunConfig
from tare.train.configfile import dump
from tare.train.progress import Event, Note, Started

if TYPE_CHECKING:
    from tare.train.loop import Result


@dataclass(frozen=True)
class MethodBegins(Event):
    """The comparison turns to another method."""

    method: str
    number: int  # from 1
    count: int


@dataclass(frozen=True)
class Comparison:
    """What came out. `interrupted`: stopped by a signal; what is finished is kept."""

    methods: list[str]
    rows: list[Row]
    config: RunConfig
    out: Path
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values: the settings and one object per method."""
        return {
            "methods": self.methods,
            "interrupted": self.interrupted,
            "out": str(self.out),
            "rows": [row.to_json() for row in self.rows],
            "config": asdict(self.config),
        }


def compare(config: RunConfig, methods: list[str], on_event: Callable[[Event], None] | None = None) -> Comparison:
    """Train with each method in turn and put the results side by side.

    Args:
        config: the common settings; `method.lr`, `method.rank` and `method.options` go to the methods that know them.
        methods: registered keys, each once.
        on_event: is told what happens: the events of `tare.train`, and `MethodBegins`.

    Returns:
        The comparison, also written to the output folder. A method that does not fit the budget is a row with the
        reason; the others run.

    Raises:
        InputError: wrong settings, or an output folder that holds something while `run.resume` is off; nothing is written.
        DoesNotFit: no method fits.
    """
    tell = on_event or (lambda event: None)
    configs = [for_method(config, key, methods) for key in methods]
    for each in configs:
        check_method(each)
    out = Path(config.run.out).expanduser()
    check_folder(out, config.run.resume)
    rows: list[Row] = []
    interrupted = False

    def listen(event: Event) -> None:
        if isinstance(event, Started) and not (out / "compare.json").exists():
            write_atomic(out / "compare.yaml", dump(config).encode())
            _write(Comparison(methods, [], config, out))
        tell(event)

    for number, each in enumerate(configs, 1):
        row = finished(each)
        if row is None:
            tell(MethodBegins(each.method.key, number, len(configs)))
            row, interrupted = _run(each, listen)
        else:
            tell(Note(f"{each.method.key}: finished before, not run again"))
        if interrupted:
            break
        rows.append(row)
        if row.status == "done":
            _write(Comparison(methods, rows, config, out))
    if rows and not interrupted and all(row.status == "refused" for row in rows):
        raise DoesNotFit(f"no method fits: {rows[0].method}: {rows[0].note}")
    comparison = Comparison(methods, rows, config, out, interrupted)
    if any(row.status == "done" for row in rows):
        _write(comparison)
    return comparison


def for_method(config: RunConfig, key: str, methods: list[str]) -> RunConfig:
    """The settings of one method's run: its own folder, and only the options that it knows.

    Raises `InputError` for an option that none of the methods knows.
    """
    from tare.methods import registry
    from tare.plan.resolve import applicable, check_known

    check_known(config.method.options, methods)
    if config.method.rank is not None and not any("rank" in registry.options(each) for each in methods):
        raise InputError(f"method.rank: none of {', '.join(methods)} has a rank; leave it out")
    method = replace(
        config.method,
        key=key,
        rank=applicable(key, {"rank": config.method.rank}, alone=len(methods) == 1).get("rank"),
        options=applicable(key, config.method.options),
    )
    folder = Path(config.run.out) / key
    resume = config.run.resume and folder.expanduser().is_dir()
    return replace(config, method=method, run=replace(config.run, out=str(folder), resume=resume))


def check_method(config: RunConfig) -> None:
    """Raises `InputError` now for what the method would refuse after the data has been read."""
    from torch import nn

    from tare.methods import registry
    from tare.plan.models import DTYPES
    from tare.train.session import build_optimizer, device_of, quantize, resolve, weights_dtype

    device_of(config.run.device)
    if config.method.key != "auto" and registry.card(config.method.key).kind == "forward":
        resolve(config)  # the rest depends on the model
    elif config.method.key != "auto":
        config, layer = resolve(config), nn.Linear(4, 4, dtype=DTYPES[weights_dtype(config)])
        quantize(layer, config)
        build_optimizer(config, layer)


def check_folder(out: Path, resume: bool) -> None:
    """Raises `InputError` if the output folder cannot take a comparison."""
    if out.exists() and not out.is_dir():
        raise InputError(f"run.out: {out} is a file; give a folder")
    content = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if content and not resume:
        raise InputError(
            f"run.out: {out} is not empty; resume the comparison in it (--resume), or choose another folder"
        )
    if resume and not any((out / name / "config.yaml").is_file() for name in content):
        raise CheckpointError(f"run.resume: there is no comparison in {out}; start it without resume, or check run.out")


def finished(config: RunConfig) -> Row | None:
    """The row of a run that is finished with the same settings, if there is one."""
    try:
        data = json.loads((Path(config.run.out).expanduser() / "row.json").read_text(encoding="utf-8"))
        return Row.from_json(data["row"]) if config.run.resume and data["asked"] == _asked(config) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _asked(config: RunConfig) -> str:
    """The settings that a finished run must share to count as this one."""
    neutral = {
        "out": "x",
        "resume": False,
        "checkpoint_every": 1,
        "checkpoint_async": "auto",
        "keep": 2,
        "tensorboard": False,
    }
    return dump(replace(config, run=replace(config.run, **neutral)))  # type: ignore[arg-type]


def _run(config: RunConfig, tell: Callable[[Event], None]) -> tuple[Row, bool]:
    from tare.train.loop import train

    folder = Path(config.run.out).expanduser()
    try:
        result = train(config, on_event=tell)
    except DoesNotFit as error:
        return Row(config.method.key, "refused", str(error)), False
    row = row_of(result)
    if not result.interrupted:
        write_report(row, result.config)
        write_atomic(folder / "row.json", json.dumps({"asked": _asked(config), "row": row.to_json()}).encode())
    return row, result.interrupted


def row_of(result: "Result") -> Row:
    """A run's result as a row."""
    from tare.methods import registry

    method = result.config.method
    settings = {"lr": method.lr, "rank": method.rank, "weight_decay": method.weight_decay, **method.options}
    settings |= {"storage": method.storage} if method.storage else {}
    return Row(
        method=result.method,
        title=registry.card(result.method).title,
        folder=str(result.out),
        loss=result.loss,
        perplexity=result.perplexity,
        eval_tokens=result.eval_tokens,
        steps=result.steps,
        tokens=result.tokens,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second or None,
        state_bytes=result.state_bytes,
        predicted_peak=result.predicted_peak,
        measured_peak=result.measured_peak,
        predicted={name: size for name, size in result.predicted.items() if name != "peak"},
        measured={name: size for name, size in result.measured.items() if name != "peak"},
        settings={name: value for name, value in settings.items() if value is not None},
        train_curve=_curve(result.history, "step"),
        eval_curve=_curve(result.history, "eval"),
    )


def _curve(history: list[dict[str, Any]], event: str) -> tuple[tuple[int, float], ...]:
    lines = (line for line in history if line.get("event") == event and line.get("loss") is not None)
    return tuple((int(line["step"]), float(line["loss"])) for line in lines)


def write_report(row: Row, config: RunConfig) -> Path:
    """Writes `report.html` of a single run into its folder."""
    place = Path(row.folder) / "report.html"
    write_atomic(place, page([row], asdict(config), _budget(config)).encode())
    return place


def started(out: Path) -> list[str] | None:
    """The methods of the comparison that was begun in a folder, or None."""
    try:
        methods = json.loads((out / "compare.json").read_text(encoding="utf-8"))["methods"]
        return [str(method) for method in methods]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(comparison: Comparison) -> None:
    config = comparison.config
    write_atomic(comparison.out / "compare.json", json.dumps(comparison.to_json(), indent=1).encode())
    if comparison.rows:
        text = page(comparison.rows, asdict(config), _budget(config))
        write_atomic(comparison.out / "report.html", text.encode())


def _budget(config: RunConfig) -> int | None:
    return parse_bytes(config.run.budget) if config.run.budget else None
