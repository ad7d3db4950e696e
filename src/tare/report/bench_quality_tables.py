"""Tables of `tare bench quality`, for the terminal and for the docs."""

import math
from collections.abc import Callable

from tare.report.bench_tables import MIB, Result, Table, aligned, rendered


def losses(result: Result, setting: str) -> Table:
    """A row a method: learning rate, loss with its spread over seeds, and what the run weighs."""
    header = (
        "method", "lr", "eval loss", "sd", "minus AdamW", "sd", "perplexity", "state MiB", "peak MiB, predicted", "measured",
        "tokens/s",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    found = [row for row in result["rows"] if row["setting"] == setting and row["status"] == "done"]
    for row in sorted(found, key=lambda row: math.inf if row["loss"] is None else row["loss"]):
        over = row.get("over_adamw") or {"mean": None, "spread": None}
        rows.append(
            (
                f"`{row['method']}`",
                f"{row['lr']:g}",
                number(row["loss"], "{:.3f}")
                if row["loss"] is not None
                else f"{row['diverged']} of {len(row['losses'])} diverged",
                number(row["spread"], "{:.3f}"),
                number(over["mean"], "{:+.3f}"),
                number(over["spread"], "{:.3f}"),
                number(row["loss"] and math.exp(row["loss"]), "{:.1f}"),
                f"{row['state_bytes'] / MIB:.2f}",
                number(row["predicted_peak"] and row["predicted_peak"] / MIB, "{:.1f}"),
                f"{row['measured_peak'] / MIB:.1f}",
                number(row["tokens_per_second"], "{:,.0f}"),
            )
        )
    return header, rows


def rates(result: Result, setting: str) -> Table:
    """What the short and the longer runs over learning rates found."""
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        if row["setting"] != setting or row["status"] != "done" or not row["sweep"]:
            continue
        by_steps: dict[int, list[str]] = {}
        for tried in sorted(row["sweep"], key=lambda tried: (tried["steps"], tried["lr"])):
            by_steps.setdefault(tried["steps"], []).append(f"{tried['lr']:g}: {number(tried['loss'], '{:.3f}')}")
        shown = "; ".join(f"{steps} steps {', '.join(losses)}" for steps, losses in by_steps.items())
        rows.append((f"`{row['method']}`", shown, f"{row['lr']:g}"))
    return ("method", "learning rate: loss", "taken"), rows


def number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def notes(result: Result) -> list[str]:
    """What has to be said beside a comparison."""
    train, data, corpus, device = result["train"], result["data"], result["corpus"], result["device"]
    where = device["gpu"] if "gpu" in device else f"{result['threads']} threads of {device['processor']}"
    sweep, count = result["sweep"], train["batch"] * train["accumulate"]
    lines = [
        f"{result['model']['name']} on {corpus['name']}: {train['steps']} steps of {count} x {data['seq']}, "
        f"{corpus.get('tokens', 0):,} tokens each ({corpus.get('epochs', 0):.2f} epochs), loss over "
        f"{corpus.get('eval_tokens', 0):,} held-out tokens, {len(result['seeds'])} seeds; {where}, torch {result['torch']}.",
        f"Learning rates: {sweep['grid']} around the preset, a factor of {sweep['factor']:g} apart, {sweep['short']:g} of the steps "
        f"each, on the first seed; the best three again with {sweep['middle']:g} of them.",
        f"`{result['command']}`, commit {', '.join(commit[:12] for commit in result.get('commits', []))}, {result['date'][:10]}.",
    ]
    refused = [
        f"`{row['method']}` ({row['setting']}: {row['reason']})" for row in result["rows"] if row["status"] == "refused"
    ]
    return lines + ([f"Not run: {', '.join(refused)}."] if refused else [])


SETTINGS = {
    "clean": "fp32 weights, each method's own storage, loss by tokens",
    "legacy": "as the published scripts: bf16 weights and moments, loss divided by one batch too many",
}


_VIEWS: dict[str, Callable[[Result, str], Table]] = {"quality": losses, "lr": rates}


def markdown(result: Result, what: str, said: bool) -> str:
    """A table for every setting: `quality` for losses, `lr` for the sweep; said: with the notes."""
    parts = []
    for setting in result["settings"]:
        table = _VIEWS[what](result, setting)
        if table[1]:
            parts += [f"{setting.capitalize()} ({SETTINGS[setting]}):", rendered(table)]
    lines = "\n".join(f"- {line}" for line in notes(result))
    return "\n\n".join([*parts, lines] if said else parts)


def text(result: Result) -> str:
    """The whole comparison for a terminal."""
    parts = []
    for setting in result["settings"]:
        for table in (losses(result, setting), rates(result, setting)):
            if table[1]:
                parts.append(f"{setting}: {SETTINGS[setting]}\n{aligned(table)}")
    return "\n\n".join([*parts, "\n".join(notes(result))])
