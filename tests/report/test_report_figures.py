"""Figures and pages are well-formed, self-contained, and say what they are given."""

import re
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from tare.report.figures import Bar, Line, bar_chart, legend, line_chart, smooth, thin, ticks
from tare.report.html import page
from tare.report.rows import CATEGORIES, Row

SETTINGS = {
    "model": {"name": "llama-9m <x>", "checkpointing": False},
    "data": {"source": "stdlib & more", "seq": 256},
    "method": {"key": "auto"},
    "train": {"steps": 200, "batch": 8, "accumulate": 2, "final_lr_ratio": 0.1},
    "run": {"out": 'runs/"a"', "budget": "2GiB", "seed": 0},
}


def row(method: str, loss: float | None = 3.0, **changes: object) -> Row:
    values: dict[str, object] = {
        "loss": loss,
        "perplexity": 20.1,
        "tokens": 1_000_000,
        "state_bytes": 2**20,
        "predicted_peak": 30 * 2**20,
        "measured_peak": 31 * 2**20,
        "predicted": {"weights": 10 * 2**20, "state": 2**20, "gradients": 9 * 2**20, "activations": 10 * 2**20},
        "measured": {"weights": 10 * 2**20, "state": 2**20, "rest": 20 * 2**20},
        "settings": {"lr": 0.01},
        "train_curve": tuple((step, 8 - step / 40) for step in range(1, 201)),
        "eval_curve": ((100, 4.0), (200, 3.0)),
    }
    return Row(method, **{**values, **changes})  # type: ignore[arg-type]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-6 * (abs(low) + width) <= tick <= low + width * (1 + 1e-6) + 1e-6 * abs(low) for tick in found)


def test_smoothing_keeps_constants_and_drops_what_is_not_finite() -> None:
    points = [(1, 2.0), (2, float("nan")), (3, 2.0)]
    assert smooth(points, 10) == ((1, 2.0), (3, 2.0))


def test_thinning_keeps_the_ends() -> None:
    points = tuple((float(i), 0.0) for i in range(1001))
    kept = thin(points, 100)
    assert len(kept) <= 102
    assert (kept[0], kept[-1]) == (points[0], points[-1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(allow_nan=True)), max_size=30), st.text(max_size=8))
def test_a_line_chart_is_well_formed_for_any_points(points: list[tuple[int, float]], label: str) -> None:
    label = "".join(letter for letter in label if letter.isprintable())
    chart = line_chart([Line(label, tuple(p for p in points if abs(p[1]) < 1e9), 0, dots=True)], "x", "y")
    if chart:
        ElementTree.fromstring(chart)
        assert "nan" not in re.sub(r"<title>.*?</title>|<text.*?</text>", "", chart)


def test_bars_are_as_long_as_they_say() -> None:
    bars = [Bar("a", "predicted", (("weights", 100), ("state", 50)), 150), Bar("a", "measured", (), 300)]
    svg = ElementTree.fromstring(bar_chart(bars, CATEGORIES, limit=600))
    widths = [float(rect.attrib["width"]) for rect in svg.iter("rect")]
    assert abs(widths[0] - 2 * widths[1]) < 0.2  # coordinates are written to a tenth
    assert abs(widths[2] - 2 * (widths[0] + widths[1])) < 0.5


def test_the_legend_names_the_colours_of_the_bars() -> None:
    chart = bar_chart([Bar("a", "measured", (("weights", 3), ("state", 2), ("rest", 1)), 6)], CATEGORIES)
    keys = dict(
        re.findall(r'background:(var\([^)]*\))"></i>(\w+)', legend(["weights", "state"], CATEGORIES, rest=True))
    )
    bars = re.findall(r'fill="(var\([^)]*\))"><title>a, measured: (\w+)', chart)
    assert bars == list(keys.items())


def test_the_page_is_self_contained_and_escaped() -> None:
    text = page([row("adamw"), row("galore", 2.5)], SETTINGS, 2**31)
    body = text.partition("<body>")[2].partition("</body>")[0]
    ElementTree.fromstring(f"<body>{body}</body>")
    assert not re.search(r"(src|href)\s*=|@import|url\(|<script|https?://", text)
    assert "llama-9m &lt;x&gt;" in text
    assert "llama-9m <x>" not in text
    assert "stdlib &amp; more" in text
    assert "budget 2.00 GiB" in text
    assert "Lowest loss: galore." in text
    assert "rest, measured as one" in text
    assert re.search(r'class="best"><td>galore<', text)


def test_a_page_of_one_run_and_of_runs_that_did_not_happen() -> None:
    assert "Lowest loss" not in page([row("adamw")], SETTINGS)
    refused = Row("lion", "refused", "does not fit <2GiB>")
    text = page([row("adamw"), refused], SETTINGS)
    assert "lion: does not fit &lt;2GiB&gt;" in text
    bare = Row("x", loss=None)
    assert "<svg" not in page([bare], SETTINGS)


def test_rows_survive_json() -> None:
    import json

    original = row("adamw")
    assert Row.from_json(json.loads(json.dumps(original.to_json()))) == original
    assert row("adamw", float("nan")).to_json()["loss"] is None
