"""`report.html`: one self-contained page about one run or a comparison. No scripts, nothing loaded from elsewhere."""

from html import escape
from typing import Any

from tare.plan.budget import format_bytes
from tare.report.figures import Bar, Line, bar_chart, legend, line_chart, smooth
from tare.report.rows import CATEGORIES, COLUMNS, Row, cells

# Colours: Okabe and Ito's palette for readers who tell few colours apart, lightened for the dark scheme.
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1b1f24; --quiet: #6a737d; --grid: #e4e7eb; --pale: .45;
  --series-1: #0072b2; --series-2: #d55e00; --series-3: #009e73; --series-4: #b5518f; --series-5: #8a6d00;
  --series-6: #3b8fc4; --series-7: #5b5bd6; --series-8: #555555;
  --part-1: #0072b2; --part-2: #e69f00; --part-3: #009e73; --part-4: #cc79a7; --part-5: #8c8c8c; --part-6: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --text: #e6e8ea; --quiet: #9aa4ae; --grid: #2b3137;
  --series-1: #56b4e9; --series-2: #ff8c42; --series-3: #2fcf9f; --series-4: #e39ac4; --series-5: #f0e442;
  --series-6: #9ecdf0; --series-7: #a3a3ff; --series-8: #bbbbbb;
  --part-1: #4c9fd6; --part-2: #e6a73a; --part-3: #2bb68b; --part-4: #d391b8; --part-5: #8f979e; --part-6: #8fd0f5; } }
body { background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 900px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p { margin: .4rem 0; } .lead, .note, footer { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--quiet); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
.best td { font-weight: 600; } .settings td, .settings th { text-align: left; }
svg { display: block; width: 100%; height: auto; margin-top: .5rem; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } svg .tick, svg .axis { fill: var(--quiet); } svg .group, svg .end { font-weight: 600; }
svg .end { fill: revert-layer; } svg .grid { stroke: var(--grid); } svg .limit { stroke: var(--text); stroke-dasharray: 4 3; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .faint { stroke-width: 1; opacity: var(--pale); }
svg .part { stroke: var(--ground); stroke-width: 1; } svg .pale { opacity: .6; }
.legend .key { margin-right: 1.2rem; } .legend i { display: inline-block; width: .8rem; height: .8rem;
  margin-right: .4rem; border-radius: 2px; vertical-align: -1px; }
"""


def page(rows: list[Row], settings: dict[str, dict[str, Any]], budget: int | None = None) -> str:
    """The page as text.

    Args:
        rows: one per method; a single run is a comparison of one.
        settings: the configuration as sections of plain values, listed at the end.
        budget: bytes; drawn as a line through the memory bars.
    """
    done = [row for row in rows if row.status == "done"]
    model, data = settings["model"]["name"], settings["data"]["source"]
    title = f"{model} on {data}: " + (rows[0].method if len(rows) == 1 else f"{len(rows)} methods compared")
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(_lead(done, settings))}</p>', _table(rows)]
    if chart := line_chart(_curves(done), "optimizer step", "loss, nats per token"):
        parts.append("<h2>Loss</h2>" + chart)
        parts.append(
            '<p class="note">Lines with dots: evaluation on held-out text. Pale lines: training, smoothed.</p>'
        )
    bars = _bars(rows)
    if bars:
        shown = [name for name in CATEGORIES if any(name == part for bar in bars for part, _ in bar.parts)]
        rest = any(part == "rest" for bar in bars for part, _ in bar.parts)
        parts.append("<h2>Memory at the peak of a step</h2>" + (legend(shown, CATEGORIES, rest) if shown else ""))
        parts.append(bar_chart(bars, CATEGORIES, budget))
        parts.append('<p class="note">Paler bars: predicted before the run. Full bars: measured in it.</p>')
    parts.append("<h2>Settings</h2>" + _settings(rows, settings))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n<footer><p>Made by tare. Sizes: 1 MiB = 2<sup>20</sup> bytes.</p></footer>\n</body>\n</html>\n"
    )


def _lead(done: list[Row], settings: dict[str, dict[str, Any]]) -> str:
    """One sentence: how much was trained, and what came out best."""
    train, data = settings["train"], settings["data"]
    tokens = max((row.tokens for row in done), default=0)
    words = f"{train['steps']} steps of {train['batch'] * train['accumulate']} sequences of {data['seq']} tokens"
    words += f" ({tokens:,} tokens)." if tokens else "."
    ranked = sorted((row for row in done if row.loss is not None), key=lambda row: row.loss or 0.0)
    if len(ranked) > 1:
        light = min(ranked, key=lambda row: row.measured_peak or row.predicted_peak or 0)
        words += f" Lowest loss: {ranked[0].method}. Least memory: {light.method}"
        peak = light.measured_peak or light.predicted_peak
        words += f" ({format_bytes(peak)})." if peak else "."
    return words


def _table(rows: list[Row]) -> str:
    best = min((row.loss for row in rows if row.loss is not None), default=None)
    lines = ["<tr>" + "".join(f"<th>{escape(title)}</th>" for title in COLUMNS) + "</tr>"]
    for row in rows:
        mark = ' class="best"' if len(rows) > 1 and best is not None and row.loss == best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(text)}</td>" for text in cells(row)) + "</tr>")
    notes = [f'<p class="note">{escape(row.method)}: {escape(row.note)}</p>' for row in rows if row.note]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>{"".join(notes)}'


def _curves(done: list[Row]) -> list[Line]:
    lines = []
    for index, row in enumerate(done):
        curve = smooth(row.train_curve, max(len(row.train_curve) / 25, 1))
        if row.eval_curve:
            lines.append(Line(row.method, curve, index, faint=True))
            lines.append(Line(row.method, tuple(row.eval_curve), index, dots=True))
        else:
            lines.append(Line(row.method, curve, index))
    return lines


def _bars(rows: list[Row]) -> list[Bar]:
    bars = []
    for row in rows:
        for label, peak, sizes in (
            ("predicted", row.predicted_peak, row.predicted),
            ("measured", row.measured_peak, row.measured),
        ):
            if peak:
                parts = tuple((name, sizes[name]) for name in (*CATEGORIES, "rest") if sizes.get(name))
                bars.append(Bar(row.method, label, parts, peak, hatched=label == "predicted"))
    return bars


def _settings(rows: list[Row], settings: dict[str, dict[str, Any]]) -> str:
    """Every setting that the runs share, and below them what each method resolved to."""
    shared = [
        (f"{section}.{name}", value)
        for section, values in settings.items()
        for name, value in values.items()
        if value not in (None, {}, False) and not (section == "method" and len(rows) > 1)
    ]
    own = [
        (row.method, ", ".join(f"{name} {_text(value)}" for name, value in row.settings.items()))
        for row in rows
        if row.settings
    ]
    lines = "".join(f"<tr><td>{escape(key)}</td><td>{escape(_text(value))}</td></tr>" for key, value in shared + own)
    return f'<div class="scroll"><table class="settings">{lines}</table></div>'


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
