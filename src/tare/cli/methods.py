"""list the methods, or show everything about one: idea, paper, defaults, presets, limits, state bytes for a model

Reads the registry's cards and the constructors' own signatures; state bytes are the optimizer's exact account on fake tensors.
"""

import argparse
import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tare.cli import flags
from tare.cli.output import console, emit, known_method, only_json
from tare.cli.waiting import waiting
from tare.core.errors import InputError
from tare.plan.shapes import check_name, named

if TYPE_CHECKING:
    from rich.table import Table

    from tare.methods.registry import Card

MODEL = "llama-60m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("key", metavar="KEY", nargs="?", help="a method, e.g. apollo-mini; all methods if left out")
    parser.add_argument("--model", metavar="NAME", default=MODEL, help=f"the model whose state is counted [{MODEL}]")
    flags.add_switches(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    check_name(args.model)
    model = named(args.model) or args.model
    with only_json(args.json), waiting("counting state", "it is counted for every method"):
        from tare.methods import registry

        if args.key is not None:
            known_method(args.key, "KEY")
        keys = [args.key] if args.key else sorted(registry.keys(), key=lambda key: (registry.card(key).year, key))
        weights, state = state_bytes(keys, model)
    if args.json:
        documents = [document(registry.card(key), model, weights, state[key]) for key in keys]
        emit(documents[0] if args.key else {"model": model, "methods": documents})
    elif args.key:
        show(registry.card(args.key), model, weights, state[args.key])
    else:
        out = console()
        out.print(overview([registry.card(key) for key in keys], model, weights, state))
        out.print("One method in full: tare methods KEY [--model NAME]. Train with it: tare train --method KEY.")
    return 0


def state_bytes(keys: list[str], model: str) -> tuple[int, dict[str, int | str]]:
    """Bytes of the fp32 weights, and of each method's state with its preset for the model, or why it does not take the model as
    it is. Nothing is allocated."""
    from tare.plan import steps
    from tare.plan.models import plannable
    from tare.plan.resolve import resolve

    config = plannable(model)
    found: dict[str, int | str] = {}
    for key in keys:
        try:
            found[key] = steps.state_bytes(resolve(key, model), config, "fp32")
        except InputError as error:
            found[key] = str(error)
    return steps.weight_bytes(config, "fp32"), found


def parameters(key: str) -> list[tuple[str, str, str]]:
    """`(name, type, default)` of every argument of a method's constructor."""
    from tare.methods import registry

    signature = inspect.signature(registry.method_class(key).__init__)
    found = []
    for name, spec in signature.parameters.items():
        if name in ("self", "params"):
            continue
        kind = inspect.formatannotation(spec.annotation)
        kind = re.sub(r"(?:\w+\.)+(\w+)", r"\1", kind)  # torch.Tensor -> Tensor
        kind = "roles, patterns or a function" if "Callable" in kind else kind
        default = "required" if spec.default is inspect.Parameter.empty else _plain(spec.default)
        found.append((name, kind, default))
    return found


def _plain(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if " object at " not in text and "function" not in text else getattr(value, "__name__", "built in")


def paper(card: "Card") -> str:
    """The paper in a few letters."""
    return f"arXiv {card.arxiv}" if card.arxiv else "-"


def overview(cards: "list[Card]", model: str, weights: int, state: dict[str, int | str]) -> "Table":
    """The table of all methods."""
    from rich import box
    from rich.table import Table

    from tare.report.rows import mib

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("year", justify="right")
    table.add_column("paper", no_wrap=True)
    table.add_column("state MiB", justify="right", no_wrap=True)
    table.add_column("idea")
    for card in cards:
        size = state[card.key]
        table.add_row(card.key, str(card.year), paper(card), mib(size if isinstance(size, int) else None), card.idea)
    table.caption = f"state of {model} (weights {mib(weights)} MiB in fp32) with each method's preset"
    return table


def document(card: "Card", model: str, weights: int, state: int | str) -> dict[str, Any]:
    """A card as plain values."""
    return {
        "key": card.key,
        "title": card.title,
        "authors": card.authors,
        "year": card.year,
        "arxiv": card.arxiv,
        "idea": card.idea,
        "axes": dict(card.axes),
        "defaults": {name: {"type": kind, "default": default} for name, kind, default in parameters(card.key)},
        "notes": dict(card.defaults),
        "presets": {name: dict(values) for name, values in card.presets.items()},
        "limits": list(card.limits),
        "differences": list(card.differences),
        "release": card.release,
        "state": {"model": model, "bytes": state if isinstance(state, int) else None, "weights_bytes": weights},
    }


def show(card: "Card", model: str, weights: int, state: int | str) -> None:
    """Prints a card in full."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from tare.plan.budget import format_bytes

    out = console()

    def section(title: str, *lines: str) -> None:
        if lines:
            out.print(Text(title, style="bold"))
            for line in lines:
                out.print(Padding(Text(line), (0, 0, 0, 2), expand=False))

    def grid(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
        table = Table(
            box=box.SIMPLE_HEAD if header else None, show_header=bool(header), pad_edge=False, show_edge=False
        )
        for number in range(len(rows[0]) if rows else 0):
            table.add_column(header[number] if header else "", no_wrap=number == 0)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if rows:
            out.print(Text(title, style="bold"))
            out.print(Padding(table, (0, 0, 0, 2), expand=False))

    out.print(Text.assemble((card.key, "bold"), f"  {card.title}"))
    out.print(Padding(Text(f"{card.authors}, {card.year}, {paper(card)}"), (0, 0, 1, 2), expand=False))
    section("idea", card.idea)
    amount = state if isinstance(state, str) else f"{state:,} bytes ({format_bytes(state)}"
    if isinstance(state, int):
        amount += f", {100 * state / weights:.1f} % of the fp32 weights)" if weights else ")"
    section("state", f"{model}: {amount}", *([f"bytes of an m x n matrix: {card.state}"] if card.state else []))
    grid("how it is made", list(card.axes.items()))
    notes = dict(card.defaults)
    rows = [(name, kind, default, notes.pop(name, "")) for name, kind, default in parameters(card.key)]
    grid("arguments", rows, ("argument", "type", "default", "where it comes from"))
    grid("further constants", list(notes.items()))
    presets = [
        (
            "any other model" if name == "*" else name,
            ", ".join(f"{key} {_plain(value)}" for key, value in values.items()),
        )
        for name, values in card.presets.items()
    ]
    grid("presets", presets)
    section("limits", *(f"- {line}" for line in card.limits))
    section("paper and published code", *(f"- {line}" for line in card.differences))
    section("steps inside backward (--release)", _RELEASE[card.release])
    if card.reproduced:
        section("reproduced", card.reproduced)


_RELEASE = {
    "yes": "yes, with one micro-batch per step",
    "accumulates": "yes, also with --accumulate: it keeps small projected gradients between micro-batches",
    "no": "no",
}
