"""Tables made from the JSON of the benchmarks of training without backpropagation: fine-tuning, populations, coordinates,
streams, directions."""

import statistics
from typing import Any

MIB = 2**20

Result = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def finetune(result: Result) -> str:
    """Accuracy by method and number of examples, with what it took."""
    from tare.report.bench_tables import rendered

    shots = sorted({row["shots"] for row in result["rows"] if row["shots"]})
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    by = {(row["method"], row["shots"]): row for row in result["rows"]}
    floor = next((row["peak"] for row in result["rows"] if row["method"] == "zero-shot"), None)
    rows: list[tuple[str, ...]] = []
    for method in methods:
        found = [by.get((method, k)) or by.get((method, 0)) for k in shots]
        one = next(row for row in found if row is not None)
        peak = one.get("peak")
        rows.append(
            (
                method,
                *(f"{_spread(row['accuracy'])}" if row else "" for row in found),
                ", ".join(f"{row['lr']:g}" for row in found if row and "lr" in row),
                f"{one['forward_passes']:,}" if "forward_passes" in one else "",
                f"{peak / MIB:.1f}" if peak else "",
                f"{peak / floor:.2f}" if peak and floor else "",
            )
        )
    header = ("method", *(f"{k} of each class" for k in shots), "lr", "forward passes", "peak MiB", "x inference")
    setting, seeds = result["setting"], result["setting"]["seeds"]
    draws = f"mean and standard deviation over {seeds} draws" if seeds > 1 else "of one draw"
    commits = ", ".join(dict.fromkeys(_short(row) for row in (*result["rows"], result) if "commit" in row))
    notes = [
        f"{result['model']} on {result['data']}: accuracy in % on {result['tested_on']} sentences nobody trained on, {draws} "
        f"of the examples; {setting['steps']} steps of {setting['batch']} for every method, rates on a "
        "grid of a factor of 4 by other examples.",
        f"{_machine(result)}, torch {result['torch']}, commit {commits}, {result['date'][:10]}; `python bench/finetune.py`.",
    ]  # fmt: skip
    return _with(rendered((header, rows)), notes)


def population(result: Result) -> str:
    """Shares of plain inference, and speedups over naive evolution strategies."""
    from tare.report.bench_tables import rendered

    rows: list[tuple[str, ...]] = []
    for case in result["cases"]:
        for row in case["results"]:
            share = row["share"]
            over = ", ".join(f"{ratio['median']:.1f} x {name}" for name, ratio in row["speedup_over"].items())
            where = f"{case['width']}, {case['rows']}"
            rows.append((where, row["name"], f"{share['median']:.1f}", f"{share['q1']:.1f} to {share['q3']:.1f}", over))
    header = ("width, rows", "way", "of inference = 100", "25-75 %", "speedup")
    note = (
        f"{result['members']} members on {result['layers']} layers, {result['dtype']}, {_machine(result)}; `{result['command']}`, commit "
        f"{_short(result)}, {result['date']}."
    )
    return _with(rendered((header, rows)), [note])


def deepzero(result: Result) -> str:
    """Ways to evaluate coordinates, and what was learned."""
    from tare.report.bench_tables import rendered

    whole = result["ways"][0]["median"]
    rows: list[tuple[str, ...]] = [
        (way["name"], f"{way['median']:.3f}", f"{whole / way['median']:.2f}", f"{way['loss_difference']:.1e}")
        for way in result["ways"]
    ]
    settings, own, other = result["settings"], result["deepzero"], result["gradients"]
    notes = [
        f"{own['weights']:,} weights, {settings['steps']} steps of {settings['batch']} on {result['data']}: test accuracy "
        f"{own['curve'][-1]['accuracy']:.1%} by deepzero with {own['evaluations']:,} forward passes (sparsity {settings['sparsity']:g}), "
        f"{other['curve'][-1]['accuracy']:.1%} with gradients, the same net and schedule.",
        f"{_machine({**settings, **result})}; `python bench/deepzero.py`, commit {_short(result)}, {result['date']}.",
    ]  # fmt: skip
    return _with(rendered((("evaluation", "s a step", "x whole", "losses differ by"), rows)), notes)


def stream(result: Result) -> str:
    """Streamed blocks beside the whole model on the device."""
    from tare.report.bench_tables import rendered

    rows: list[tuple[str, ...]] = [
        (
            row["name"],
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['q1']:.2f} to {row['ratio']['q3']:.2f}",
            f"{row['device_peak'] / MIB:.1f}",
            f"{row['brought'] / MIB:.1f}",
            f"{row['loss_difference']:.1e}",
        )
        for row in result["results"]
    ]
    header = ("form", "x mezo", "25-75 %", "weights on the device, MiB", "brought a step, MiB", "losses differ by")
    note = (
        f"{result['model']}, {result['weights'] / MIB:.1f} MiB of weights, {result['tokens']} tokens, {_machine(result)}; "
        f"`{result['command']}`, commit {_short(result)}, {result['date']}."
    )
    return _with(rendered((header, rows)), [note])


def side_by_side(result: Result) -> str:
    """Our plans beside the published step, along the directions that it drew."""
    from tare.report.bench_tables import rendered

    rows: list[tuple[str, ...]] = [
        (
            row["name"],
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['q1']:.2f} to {row['ratio']['q3']:.2f}",
            f"{row['beyond'] / MIB:.2f}",
            f"{row['loss_difference']:.1e}",
            f"{row['weight_difference']:.1e}",
        )
        for row in result["results"]
    ]
    theirs = ("published", "1.00", "", f"{result['beyond']['theirs'] / MIB:.2f}", "", "")
    header = ("step", "x published", "25-75 %", "beyond the model, MiB", "losses differ by", "weights differ by")
    settings = result["settings"]
    notes = [
        f"{settings['family']}, {result['weights'] / MIB:.1f} MiB of weights, the largest {result['largest'] / MIB:.2f}, "
        f"{settings['dtype']}, {settings['batch']} x {settings['seq']} tokens; inference alone needs "
        f"{result['beyond']['inference'] / MIB:.2f} MiB beyond the model. Losses and weights: largest differences in {settings['steps']} "
        "steps along the same directions.",
        f"princeton-nlp/MeZO {result['theirs'] or 'at an unknown commit'}; {_machine(result)}; `{result['command']}`, commit "
        f"{_short(result)}, {result['date']}.",
    ]
    return _with(rendered((header, [theirs, *rows])), notes)


def directions(result: Result) -> str:
    """Directions drawn where they are written, beside drawing them with torch."""
    from tare.report.bench_tables import rendered

    rows: list[tuple[str, ...]] = [
        (
            row["row"],
            f"{row['ns_per_element']:.3f}",
            f"{row['ratio_to_adamw']['median']:.2f}",
            f"{row['ratio_to_randn']['median']:.3f}",
        )
        for row in result["rows"]
    ]
    note = (
        f"{result['elements']:,} elements, {_machine(result)}, median of {result['rounds']} interleaved rounds; `{result['command']}`, "
        f"commit {_short(result)}, {result['date'][:10]}."
    )
    return _with(rendered((("what", "ns an element", "x fused AdamW", "x randn and add"), rows)), [note])


def _spread(values: list[float]) -> str:
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _machine(result: Result) -> str:
    return f"{result['threads']} threads of {result['device']['processor']}"


def _short(result: Result) -> str:
    return (result["commit"] or "unknown")[:12]


def _with(table: str, notes: list[str]) -> str:
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes)
