"""Write docs/methods/*.md from the METHOD cards, and the tables of docs and README from bench/results. `--check` only compares.

Everything between `<!-- table: NAME -->` and `<!-- end -->` in README.md and docs/*.md is generated.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tare.methods import registry
from tare.methods.registry import Card
from tare.report import tables

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- generated from the METHOD card by `make docs`; edit the card -->\n"


def bullets(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items) or "- none known"


def rows(mapping: dict[str, str], head: str) -> str:
    return f"| {head} | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in mapping.items())


def page(card: Card) -> str:
    cls = registry.method_class(card.key)
    arguments = []
    for name, parameter in registry.options(card.key).items():
        shown = parameter.default if not inspect.isfunction(parameter.default) else "..."
        arguments.append(f"| `{name}` | `{shown!r}` | {card.defaults.get(name, '')} |")
    presets = [f"| {model} | {', '.join(f'{k}={v}' for k, v in p.items())} |" for model, p in card.presets.items()]
    parts = [
        NOTE,
        f"# {card.key}\n",
        f"**{card.title}** — {card.authors} ({card.year}), [arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})\n",
        card.idea + "\n",
        f"```python\nimport tare\n\nopt = tare.{cls.__name__}(model, lr=1e-2)\n"
        f'opt = tare.create("{card.key}", model, lr=1e-2)\n```\n',
        f"```\ntare train --model llama-9m --data stdlib --method {card.key}\n```\n",
        f"State of an m x n matrix: `{card.state}` bytes. Release in backward: {card.release}.\n",
        "## Choices\n\n" + rows(card.axes, "axis") + "\n",
        "## Arguments\n\n| argument | default | whose |\n|---|---|---|\n" + "\n".join(arguments) + "\n",
        "## Presets by model\n\n| model | arguments |\n|---|---|\n" + "\n".join(presets) + "\n",
        "## Limits\n\n" + bullets(card.limits) + "\n",
        "## Paper and published code\n\n" + bullets(card.differences) + "\n",
        "## What was checked\n\n" + (card.reproduced or CHECKED) + "\n",
    ]
    return "\n".join(parts)


CHECKED = (
    "Weights after every step equal traces recorded from the authors' code (tests/methods/test_golden.py), a slow float64 twin "
    "written from the equations (tests/reference/), exact state bytes, bit-exact resume, release in backward."
)


def index(cards: list[Card]) -> str:
    lines = [f"| [{c.key}]({c.key}.md) | {c.title} | {c.year} | `{c.state}` |" for c in cards]
    return (
        NOTE
        + "\n# Methods\n\n| key | paper | year | state of m x n, bytes |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


def outputs() -> Iterator[tuple[Path, str]]:
    cards = [registry.card(key) for key in registry.keys()]  # noqa: SIM118 (no mapping)
    yield ROOT / "docs/methods/index.md", index(cards)
    for card in cards:
        yield ROOT / f"docs/methods/{card.key}.md", page(card)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if path.exists():
            yield path, fill(path.read_text(encoding="utf-8"))


def fill(text: str) -> str:
    """Replace every marked table by what bench/results says now."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{tables.render(name, ROOT / 'bench' / 'results')}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w./-]+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main() -> int:
    stale = []
    for path, text in outputs():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
