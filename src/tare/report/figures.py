"""Figures as inline SVG text: line charts and stacked bars.

Colours are CSS variables of the page (`--series-1` ... for lines, `--part-1` ... for parts of bars, `--grid`, `--quiet`),
so a figure follows the light or dark scheme of the reader. Touches nothing but its arguments.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from tare.plan.budget import format_bytes

SERIES, PARTS = 8, 6  # how many colours the page defines


@dataclass(frozen=True)
class Line:
    """One curve: `(x, y)` points, a colour number, and how it is drawn."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int
    faint: bool = False  # thin and pale, without label: what stands behind the main curve
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One horizontal bar made of `(category, bytes)` parts, and its total (which may exceed the parts)."""

    group: str
    label: str
    parts: tuple[tuple[str, int], ...]
    total: int
    hatched: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover the range.

    >>> ticks(3.2, 8.4)
    [4.0, 6.0, 8.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis.

    >>> short(2_000_000), short(1500), short(4.0), short(0.25)
    ('2M', '1.5k', '4', '0.25')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def smooth(points: Iterable[tuple[float, float]], window: float) -> tuple[tuple[float, float], ...]:
    """The points with y averaged exponentially over about `window` points (bias-corrected); non-finite ones dropped."""
    keep, mean, weight, out = 1 - 1 / max(window, 1), 0.0, 0.0, []
    for x, y in points:
        if math.isfinite(y):
            mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
            out.append((x, mean / weight))
    return tuple(out)


def thin(points: tuple[tuple[float, float], ...], limit: int = 400) -> tuple[tuple[float, float], ...]:
    """At most about `limit` of the points, the last one among them."""
    stride = max(1, math.ceil(len(points) / limit))
    return (*points[:-1:stride], points[-1]) if points else ()


def line_chart(lines: list[Line], x_label: str, y_label: str, width: int = 860, height: int = 360) -> str:
    """Curves over a common x axis, labelled at their ends."""
    lines = [Line(n.label, tuple(p for p in n.points if math.isfinite(p[1])), n.colour, n.faint, n.dots) for n in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    left, right, top, bottom = 56, 150, 14, 44
    x0, x1 = 0.0, max(x for x, _ in points) or 1.0
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    y0, y1 = y0 - 0.04 * (y1 - y0 or 1), y1 + 0.04 * (y1 - y0 or 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    marks = []
    for value in ticks(y0, y1):
        _, y = at(x0, value)
        marks.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x0, x1, 6):
        x, _ = at(value, y0)
        marks.append(
            f'<text class="tick" x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{short(value)}</text>'
        )
    middle = (left + width - right) / 2
    marks.append(f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    marks.append(
        f'<text class="axis" transform="translate(14 {(top + height - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    ends = []
    for line in sorted(lines, key=lambda each: not each.faint):
        if not line.points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in thin(line.points)))
        kind = "line faint" if line.faint else "line"
        colour = f"var(--series-{line.colour % SERIES + 1})"
        marks.append(f'<polyline class="{kind}" stroke="{colour}" points="{path}"/>')
        for x, y in line.points if line.dots else ():
            cx, cy = at(x, y)
            title = f"{line.label}: {y:.4g} at {short(x)}"
            marks.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{colour}"><title>{escape(title)}</title></circle>'
            )
        if not line.faint:
            ends.append((at(*line.points[-1])[1], line, colour))
    floor = -math.inf
    for y, line, colour in sorted(ends, key=lambda end: end[0]):
        floor = max(y, floor + 16)  # labels of close curves are pushed apart
        x = width - right + 10
        text = f"{line.label} {line.points[-1][1]:.3f}"
        marks.append(f'<text class="end" x="{x}" y="{floor + 4:.1f}" fill="{colour}">{escape(text)}</text>')
    return _svg(width, height, f"{y_label} over {x_label}", marks)


def bar_chart(bars: list[Bar], categories: list[str], limit: int | None = None, width: int = 860) -> str:
    """Horizontal stacked bars in groups, each with its total; `limit` draws a line (the budget)."""
    if not bars:
        return ""
    left, right, row, gap, top = 190, 110, 18, 14, 8
    largest = max([bar.total for bar in bars] + ([limit] if limit else []))
    scale = (width - left - right) / max(largest, 1)
    marks: list[str] = []
    y, group = float(top), bars[0].group
    heading = ""
    for bar in bars:
        y += gap if bar.group != group else 0
        group = bar.group
        if bar.group != heading:
            heading = bar.group
            marks.append(f'<text class="group" x="0" y="{y + 13:.1f}">{escape(bar.group)}</text>')
        marks.append(f'<text class="tick" x="{left - 8}" y="{y + 13:.1f}" text-anchor="end">{escape(bar.label)}</text>')
        x = float(left)
        for category, size in bar.parts or (("", bar.total),):
            colour = part_colour(category, categories)
            title = f"{bar.group}, {bar.label}: {category or 'peak'} {format_bytes(size)}"
            marks.append(
                f'<rect class="{"part pale" if bar.hatched else "part"}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{max(size * scale, 0):.1f}" height="{row - 3}" fill="{colour}"><title>{escape(title)}</title></rect>'
            )
            x += size * scale
        marks.append(f'<text class="tick" x="{x + 6:.1f}" y="{y + 13:.1f}">{format_bytes(bar.total)}</text>')
        y += row
    if limit:
        x = left + limit * scale
        marks.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y:.1f}"/>')
        marks.append(
            f'<text class="tick" x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle">budget {format_bytes(limit)}</text>'
        )
        y += 16
    return _svg(width, round(y + 4), "peak memory, predicted and measured", marks)


def part_colour(category: str, categories: list[str]) -> str:
    """The colour of a part of a bar; quiet for what is no category.

    >>> part_colour("b", ["a", "b"]), part_colour("rest", ["a", "b"])
    ('var(--part-2)', 'var(--quiet)')
    """
    return f"var(--part-{categories.index(category) % PARTS + 1})" if category in categories else "var(--quiet)"


def legend(shown: list[str], categories: list[str], rest: bool = False) -> str:
    """What the colours of the parts mean; `rest`: whether there are parts that measuring did not tell apart."""
    keys = [(part_colour(category, categories), category) for category in shown]
    keys += [("var(--quiet)", "rest, measured as one")] if rest else []
    items = [f'<span class="key"><i style="background:{colour}"></i>{escape(text)}</span>' for colour, text in keys]
    return f'<p class="legend">{"".join(items)}</p>'


def _svg(width: int, height: int, label: str, marks: list[str]) -> str:
    body = "\n".join(marks)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'
