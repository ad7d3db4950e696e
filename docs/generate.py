"""Write docs/methods/*.md from the METHOD cards, and the tables of docs and README from bench/results. `--check` only compares.

Everything between `<!-- table: NAME -->` and `<!-- end -->` in README.md and docs/*.md is generated; `methods` is made from the
cards, every other name from bench/results.
"""

import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

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
    arguments = []
    for name, parameter in registry.options(card.key).items():
        shown = parameter.default if not inspect.isfunction(parameter.default) else "..."
        arguments.append(f"| `{name}` | `{shown!r}` | {card.defaults.get(name, '')} |")
    presets = [f"| {model} | {', '.join(f'{k}={v}' for k, v in p.items())} |" for model, p in card.presets.items()]
    parts = [
        NOTE,
        f"# {card.key}\n",
        f"**{card.title}**{source(card)}\n",
        card.idea + "\n",
        *usage(card),
        f"State of an m x n matrix: `{card.state}` bytes. Release in backward: {card.release}.\n",
        "## Choices\n\n" + rows(card.axes, "axis") + "\n",
        "## Arguments\n\n| argument | default | whose |\n|---|---|---|\n" + "\n".join(arguments) + "\n",
        "## Presets by model\n\n| model | arguments |\n|---|---|\n" + "\n".join(presets) + "\n",
        "## Limits\n\n" + bullets(card.limits) + "\n",
        "## Paper and published code\n\n" + bullets(card.differences) + "\n",
        "## What was checked\n\n" + checked(card) + "\n",
    ]
    return "\n".join(parts)


def usage(card: Card) -> list[str]:
    """In a loop of one's own, and as a command."""
    name, key = registry.method_class(card.key).__name__, card.key
    if card.kind == "gradient":
        return [
            f'```python\nimport tare\n\nopt = tare.{name}(model, lr=1e-2)\nopt = tare.create("{key}", model, lr=1e-2)\n```\n',
            f"```\ntare train --model llama-9m --data stdlib --method {key}\n```\n",
        ]
    lr = inspect.signature(registry.method_class(key).__init__).parameters["lr"].default
    return [
        f'```python\nimport tare\n\nopt = tare.{name}(model, lr={lr:g})  # or tare.create("{key}", model, lr={lr:g})\n'
        "loss = opt.step(lambda: loss_of(model, batch))  # no backward\n```\n",
        "How these methods run a model: [training without backpropagation](../zeroth.md); by command: [fine-tuning](../finetuning.md).\n",
    ]


def source(card: Card) -> str:
    """Authors, year and where the paper is; nothing for what has no authors."""
    if card.authors == "-":
        return ""
    arxiv = re.fullmatch(r"\d{4}\.\d{5}", card.arxiv)
    link = f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if arxiv else f"<https://{card.arxiv}>"
    return f" — {card.authors} ({card.year}), {link}"


# Whose recorded traces (tests/golden) a method is stepped against: beginnings of file names.
TRACES = {
    "adamw": ("control_torch_adamw",), "adamw-8bit": ("bnb_adamw8bit",), "adan": ("adan",), "apollo": ("apollo_channel",),
    "apollo-mini": ("apollo_mini",), "badam": ("badam",), "dct-adamw": ("dct_adamw",), "diffgrad": ("diffgrad",),
    "fira": ("fira",), "frugal": ("frugal",), "galore": ("galore_adamw", "galore_plain"),
    "galore-adafactor": ("galore_adafactor",), "gradnorm-lorp": ("gradnormlorp",), "lion": ("lion", "bnb_lion8bit"),
    "muon": ("muon", "control_torch_muon"), "online-subspace": ("osd",), "q-galore": ("qgalore",), "scion": ("scion",),
    "sinkgd": ("sinkgd",), "swan": ("swan",), "mezo": ("mezo_", "zollm_"), "sparse-mezo": ("sparse_mezo_",), "qzo": ("qzo_",),
    "zo2": ("zo2_",), "eggroll": ("eggroll_", "egg_int8_"), "consensus": ("cbo_", "hopping_"), "zo-rank": ("ranksgd_",),
    "deepzero": ("deepzero_",), "zo-sah": ("zosah_",), "zo-frank-wolfe": ("zofw_",), "fzoos": ("fzoos_",), "zo-ae-ds": ("zoaeds_",),
    "subspace-zo": ("zoodip_",),
}  # fmt: skip
GENERIC = {
    "gradient": "Besides, as of every method: exact state bytes, bit-exact resume, release in backward or its refusal, odd shapes, faulty "
    "gradients, learning.",
    "forward": "Besides, as of every method without backpropagation: exact state bytes, bit-exact resume, replay of a log of seeds, losses "
    "that are not finite, closures that raise, random numbers alike at every evaluation, 16-bit weights, learning",
}


@functools.cache
def tests(kind: str) -> str:
    """The text of all tests whose file name holds `kind`."""
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").rglob(f"test_*{kind}*.py")))


def traces(key: str) -> list[dict[str, str]]:
    """What each trace of a method says of itself."""
    found = []
    for path in sorted((ROOT / "tests" / "golden").rglob("*.safetensors")):
        if path.stem.startswith(TRACES.get(key, ("?",))):
            with safe_open(path, "pt") as file:
                found.append(json.loads(file.metadata()["case"]))
    return found


def checked(card: Card) -> str:
    """The evidence for one method, read from the tests; the card's own words come first."""
    said = [card.reproduced] if card.reproduced else []
    recorded = traces(card.key)
    code = [case for case in recorded if case["origin"] == "official code"]
    if code:
        entries = ", ".join(f"`{entry}`" for entry in dict.fromkeys(case["entry"] for case in code))
        said.append(
            f"Equal to {len(code)} trace{'s' * (len(code) > 1)} recorded from published code ({entries}), each within the tolerance that "
            "its file states (tests/golden)."
        )
    if len(recorded) > len(code):
        count = len(recorded) - len(code)
        none = "" if code else "; it has no published code"
        said.append(f"Equal to {count} trace{'s' * (count > 1)} computed in float64 from the paper's equations{none}.")
    if not recorded:
        said.append("No trace of published code.")
    words = (f'"{card.key}"', f"{registry.method_class(card.key).__name__}(", card.key.replace("-", "_") + "_")
    if any(word in tests(kind) for word in words for kind in ("twins", "adamw_4bit")):
        said.append("Stepped against a slow float64 twin written from the equations (tests/reference).")
    spared = [f"`{name}` ({reason})" for name, reason in card.trial.exempt.items()] if card.kind == "forward" else []
    generic = GENERIC[card.kind] + (
        f". Not checked: {'; '.join(spared)}." if spared else "." if card.kind == "forward" else ""
    )
    return " ".join((*said, generic))


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


def short() -> str:
    """The methods in a line each, for the README."""
    cards = [registry.card(key) for key in registry.keys()]  # noqa: SIM118 (no mapping)
    lines = [f"| [`{c.key}`](docs/methods/{c.key}.md) | {c.idea} | {c.state} |" for c in cards]
    return "| key | idea | state of an m x n matrix, bytes |\n|---|---|---|\n" + "\n".join(lines)


def fill(text: str) -> str:
    """Replace every marked table by what the cards and bench/results say now."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        made = short() if name == "methods" else tables.render(name, ROOT / "bench" / "results")
        return f"<!-- table: {name} -->\n{made}\n<!-- end -->"

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
