"""What one run came to, as plain numbers: the row of a comparison, its JSON form, and the table in a terminal."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

CATEGORIES = ["weights", "gradients", "state", "activations", "temporaries", "gathered"]
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One method's run. Sizes are bytes; what is unknown is None.

    `status`: "done", or "refused" (does not fit the budget), "failed", with the reason in `note`.
    """

    method: str
    status: Literal["done", "refused", "failed"] = "done"
    note: str = ""
    title: str = ""
    folder: str = ""
    loss: float | None = None
    perplexity: float | None = None
    eval_tokens: int | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    state_bytes: int | None = None
    predicted_peak: int | None = None
    measured_peak: int | None = None
    predicted: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # lr, rank, ... as resolved
    train_curve: tuple[tuple[int, float], ...] = ()
    eval_curve: tuple[tuple[int, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None."""
        return json.loads(json.dumps(_finite(asdict(self)), allow_nan=False))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Row":
        """The inverse of `to_json`."""
        curves = {key: tuple((int(x), float(y)) for x, y in data[key]) for key in ("train_curve", "eval_curve")}
        return cls(**{**data, **curves})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def mib(count: int | None) -> str:
    """Bytes in MiB, for a right-aligned column.

    >>> mib(1_234_567_890), mib(700), mib(0), mib(None)
    ('1,177.4', '0.001', '0.0', '-')
    """
    if count is None:
        return "-"
    size = count / MIB
    return f"{size:.3f}" if 0 < size < 0.05 else f"{size:,.1f}"


def number(value: float | None, digits: int) -> str:
    """A number with a fixed number of decimals, or a dash.

    >>> number(1234.5, 2), number(None, 2), number(1e9, 2)
    ('1,234.50', '-', '1.00e+09')
    """
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e8 else f"{value:.2e}"


COLUMNS = ("method", "eval loss", "perplexity", "state MiB", "predicted peak MiB", "measured peak MiB", "tokens/s")


def cells(row: Row) -> tuple[str, ...]:
    """The texts of one row, in the order of `COLUMNS`."""
    return (
        row.method,
        number(row.loss, 4),
        number(row.perplexity, 2),
        mib(row.state_bytes),
        mib(row.predicted_peak),
        mib(row.measured_peak),
        number(row.tokens_per_second, 0),
    )


def table(rows: list[Row]) -> "Table":
    """The comparison as a terminal table; the lowest loss is marked, and what went wrong stands below its row."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for title in COLUMNS:
        found.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    best = min((row.loss for row in rows if row.loss is not None), default=None)
    for row in rows:
        found.add_row(*cells(row), style="bold" if best is not None and row.loss == best and len(rows) > 1 else None)
    return found


def memory_table(row: Row) -> "Table":
    """Predicted and measured memory of one run, by category.

    Measuring sees weights, state and the peak; the rest it does not tell apart, so there the prediction is added up too.
    """
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    found.add_column("MiB at the peak")
    for title in ("predicted", "measured", "difference"):
        found.add_column(title, justify="right")
    alone = ("weights", "state")
    rest = [name for name in CATEGORIES if name in row.predicted and name not in row.measured and name not in alone]
    for name in alone:
        _add(found, name, row.predicted.get(name), row.measured.get(name))
    for name in (name for name in CATEGORIES if name not in rest and name not in alone):
        if name in row.predicted or name in row.measured:
            _add(found, name, row.predicted.get(name), row.measured.get(name))
    if rest or "rest" in row.measured:
        predicted = sum(row.predicted[name] for name in rest) if rest else None
        _add(found, "rest", predicted, row.measured.get("rest"))
    for name in rest:
        found.add_row(f"  {name}", mib(row.predicted[name]), "", "")
    found.add_section()
    _add(found, "peak", row.predicted_peak, row.measured_peak)
    return found


def _add(found: "Table", name: str, predicted: int | None, measured: int | None) -> None:
    share = ""
    if predicted is not None and measured:
        share = f"{100 * (predicted - measured) / measured:+.1f} %"
    found.add_row(name, mib(predicted), mib(measured), share)
