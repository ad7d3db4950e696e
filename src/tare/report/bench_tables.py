"""Tables made from the JSON of a benchmark, for the terminal and for README and docs (`docs/generate.py` calls `VIEWS`)."""

import statistics
from collections.abc import Callable
from typing import Any

from tare.report import scale_tables

ADAMW_BYTES = 28  # an fp32 AdamW step reads W, G, M, V and writes W, M, V: 7 x 4 bytes for each parameter
MIB = 2**20

Result = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def steps(result: Result) -> Table:
    """Every row: ratio to the bar with its quartiles, state, temporaries."""
    count = result["shapes"]["parameters"]
    header = ("optimizer step", "x fused AdamW", "25-75 %", "ms", "state MB", "B/param", "temporaries MiB")
    return header, [
        (
            row["label"],
            f"{row['ratio']['median']:.2f}",
            _range(row["ratio"], "{:.2f}"),
            f"{row['ms_median']:.1f}",
            f"{row['state_bytes'] / 1e6:.1f}",
            f"{row['state_bytes'] / count:.2f}",
            f"{row['temporary_bytes'] / MIB:.1f}",
        )
        for row in result["rows"]
    ]


def full(result: Result) -> Table:
    """Every row beside what bytes and products allow, with what it launches and compiles."""
    if result["format"] < 2:  # an older file, which has less
        return steps(result)
    count = result["shapes"]["parameters"]
    header = (
        "optimizer step", "x fused AdamW", "25-75 %", "ms", "bytes/param, least", "share of copy", "x bound", "bound by",
        "launches", "temporaries MiB", "state B/param", "graphs compiled", "again",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        products = (row["gemm_ms"] or 0.0) > row["bytes_ms"]
        rows.append(
            (
                row["label"],
                f"{row['ratio']['median']:.2f}",
                _range(row["ratio"], "{:.2f}"),
                f"{row['ms_median']:.2f}",
                f"{row['moved_bytes'] / count:.1f}",
                f"{row['share_of_copy']:.0%}",
                f"{row['over_bound']:.2f}",
                "products" if products else "bytes",
                "?" if row["launches"] is None else f"{row['launches']:,}",
                f"{row['temporary_bytes'] / MIB:.1f}",
                f"{row['state_bytes'] / count:.2f}",
                f"{row['compiled_graphs']}",
                f"{row['recompilations']}",
            )
        )
    return header, rows


def duels(result: Result) -> Table:
    """Each of our methods against the fastest of the others that do the same, at the same rank, in the same run."""
    header = ("method", "x fused AdamW", "fastest other", "x fused AdamW", "gain", "others")
    rows: list[tuple[str, ...]] = []
    for own in (row for row in result["rows"] if row["kind"] == "tare" and result["format"] >= 2):
        others = [
            row
            for row in result["rows"]
            if row["kind"] != "tare"
            and row["against"]
            and row["against"] == own["against"]
            and row["rank"] == own["rank"]
        ]
        if not others:
            continue
        best = min(others, key=lambda row: row["ratio"]["median"])
        gain = best["ratio"]["median"] / own["ratio"]["median"]
        mine, theirs = f"{own['ratio']['median']:.2f}", f"{best['ratio']['median']:.2f}"
        rows.append((own["label"], mine, best["label"], theirs, f"{gain:.1f}", f"{len(others)}"))
    return header, rows


def refreshes(result: Result) -> Table:
    """All matrices refreshed in one step, and what that comes to for each step of a period."""
    header = ("refresh of all matrices", "refresh step ms", "ordinary ms", "x ordinary", "amortised x fused", "25-75 %")
    return header, [
        (
            row["label"],
            f"{statistics.median(row['refresh_ms']):.0f}",
            f"{statistics.median(row['plain_ms']):.0f}",
            f"{row['spike']['median']:.1f}",
            f"{row['amortised_ratio']['median']:+.3f}",
            _range(row["amortised_ratio"], "{:+.3f}"),
        )
        for row in result["refreshes"]
    ]


def staggered(result: Result) -> Table:
    """Every step of one period in which the leaves take turns; the bar, run between, shows the machine's own spikes."""
    header = (
        "one whole period",
        "median ms",
        "mean ms",
        "worst ms",
        "worst / median",
        "steps > 2 x median",
        "the bar: worst / median",
        "steps > 2 x median",
    )
    return header, [
        (
            row["label"],
            f"{row['median_ms']:.1f}",
            f"{row['mean_ms']:.1f}",
            f"{row['worst_ms']:.1f}",
            f"{row['worst_over_median']:.2f}",
            f"{row['steps_over_twice_median']} of {len(row['steps_ms'])}",
            f"{row['bar']['worst_over_median']:.2f}",
            f"{row['bar']['steps_over_twice_median']}",
        )
        for row in result["staggered"]
    ]


def _range(spread: dict[str, float], form: str) -> str:
    return f"{form.format(spread['q1'])} to {form.format(spread['q3'])}"


def notes(result: Result) -> list[str]:
    """What has to be said beside the numbers."""
    band, shapes, device = result["bandwidth"], result["shapes"], result["device"]
    changed = " with uncommitted changes" if result["uncommitted_changes"] else ""
    lines = [
        f"{shapes['name']}: {shapes['parameters']:,} parameters, {shapes['projected_matrices']} projected matrices, "
        f"{shapes['dtype']}; largest linear {shapes['largest_linear_bytes'] / MIB:.2f} MiB, "
        f"largest matrix {shapes['largest_matrix_bytes'] / MIB:.2f} MiB.",
        f"{device['gpu'] + ', ' if 'gpu' in device else ''}{result['threads']} threads of {device['processor']} "
        f"({', '.join(device['instructions'])}), "
        f"torch {result['versions']['torch']}, median of {result['rounds']} interleaved rounds; "
        f"load average {result['load_before']:.1f} before, {result['load_after']:.1f} after; samples repeated because other "
        f"processes took more than {result['disturbed']['limit']:.0%} of the threads' time: {result['disturbed']['repeated']}, "
        f"kept although they did: {result['disturbed']['kept']}.",
        f"{result['matrix_library']}; {result['native']}.",
        f"Fused AdamW moves {band['bar_gb_s']:.0f} GB/s ({band.get('bar_bytes', ADAMW_BYTES):.0f} bytes a parameter); here a copy of "
        f"256 MiB reaches {band['copy_gb_s']:.0f} and an update in place {band['in_place_gb_s']:.0f} GB/s"
        + (f", the projection's product {band['gemm_gflop_s']:.0f} GFLOP/s." if "gemm_gflop_s" in band else "."),
        f"`{result['command']}`, seed {result['seed']}, commit {(result['commit'] or 'unknown')[:12]}{changed}, "
        f"{result['date'][:10]}.",
    ]
    peers = [f"{name} {found}" for name, found in result["versions"].items() if found and name not in ("tare", "torch")]
    if peers and any(row["kind"] == "peer" for row in result["rows"]):
        lines.append("Peers: " + ", ".join(peers) + ".")
    lines += [f"{row['label']}: {', '.join(row['notes'])}." for row in result["rows"] if row.get("notes")]
    if result["absent"]:
        lines.append("Not run: " + ", ".join(f"{row['key']} ({row['reason']})" for row in result["absent"]) + ".")
    return lines


def _tables(result: Result) -> list[Table]:
    found = [full(result), duels(result), refreshes(result), staggered(result)]
    return [table for table in found if table[1]]


def text(result: Result) -> str:
    """The whole result for a terminal."""
    return "\n\n".join([*(aligned(table) for table in _tables(result)), "\n".join(notes(result))])


def aligned(table: Table) -> str:
    """A table for a terminal."""
    header, rows = table
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def rendered(table: Table) -> str:
    """A table as Markdown."""
    from tare.report.tables import markdown as render

    header, rows = table
    return render(list(header), [list(row) for row in rows])


def markdown(result: Result) -> str:
    """The whole result as Markdown: what `docs/benchmarks.md` shows of each file."""
    return "\n\n".join([*(rendered(table) for table in _tables(result)), _said(result)])


def _said(result: Result) -> str:
    return "\n".join(f"- {line}" for line in notes(result))


def compared(result: Result) -> str:
    """A row a method, as `tare compare` found them, and what has to be said beside."""
    header: tuple[str, ...] = (
        "method",
        "lr",
        "eval loss",
        "perplexity",
        "state MiB",
        "peak MiB, predicted",
        "measured",
        "tokens/s",
    )
    rows: list[tuple[str, ...]] = [
        (
            f"`{row['method']}`",
            f"{row['settings'].get('lr', 0):g}",
            f"{row['loss']:.3f}",
            f"{row['perplexity']:.1f}",
            f"{row['state_bytes'] / MIB:.2f}",
            f"{row['predicted_peak'] / MIB:.1f}",
            f"{row['measured_peak'] / MIB:.1f}",
            f"{row['tokens_per_second']:,.0f}",
        )
        for row in result["rows"]
        if row["status"] == "done"
    ]
    config, device = result["config"], result["device"]
    note = (
        f"{config['model']['name']}, {rows and result['rows'][0]['tokens']:,} tokens each, batch {config['train']['batch']} x "
        f"{config['data']['seq']}, seed {result['seed']}, {result['threads']} threads of {device['processor']}, torch "
        f"{result['torch']}; `{result['command']}`, commit {(result['commit'] or 'unknown')[:12]}, {result['date']}."
    )
    return f"{rendered((header, rows))}\n\n- {note}"


def swept(result: Result) -> str:
    """Evaluation loss by method and learning rate."""
    methods: dict[str, list[Result]] = {}
    for row in result["rows"]:
        methods.setdefault(row["method"], []).append(row)
    rows: list[tuple[str, ...]] = []
    for method, found in methods.items():
        best = min(found, key=lambda row: row["loss"])
        tried = ", ".join(f"{row['lr']:g}: {row['loss']:.3f}" for row in found)
        rows.append((f"`{method}`", tried, f"{best['lr']:g}"))
    note = f"`{result['command']}`, commit {result['commit'][:12]}, {result['date']}, seed {result['seed']}."
    return f"{rendered((('method', 'learning rate: loss', 'best'), rows))}\n\n- {note}"


def scaling(result: Result) -> str:
    """Tokens a second of two processes beside those of one."""
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        one = row["one"]["tokens_per_second"]
        ways = [f"{row[way]['efficiency']:.0%}" for way in ("ddp", "fsdp", "beside")]
        rows.append((f"`{row['method']}`", f"{one:,.0f}", *ways))
    header = ("method", "tokens/s of one process", "two, ddp", "two, fsdp", "two runs that know nothing of each other")
    note = (
        f"{result['model']}, {result['batch']} x {result['seq']} tokens a process, one thread each, {result['device']['processor']}; "
        f"`{result['command'].strip()}`, commit {(result['commit'] or 'unknown')[:12]}, {result['date']}."
    )
    return f"{rendered((header, rows))}\n\n- {note}"


def _comparison(result: Result, what: str, notes: bool) -> str:
    from tare.report import bench_quality_tables

    return bench_quality_tables.markdown(result, what, notes)


def _forward(what: str, result: Result) -> str:
    from tare.report import forward_tables

    made: str = getattr(forward_tables, what)(result)
    return made


# What stands behind `<!-- table: FILE -->` or `<!-- table: FILE/VIEW -->`: the file's own name is its default view.
VIEWS: dict[str, Callable[[Result], str]] = {
    "step-llama-60m": lambda result: f"{rendered(steps(result))}\n\n{_said(result)}",
    "compare-llama-3m": compared,
    "sweep-llama-3m": swept,
    "all": markdown,
    "full": lambda result: rendered(full(result)),
    "duels": lambda result: rendered(duels(result)),
    "steps": lambda result: rendered(steps(result)),
    "refreshes": lambda result: rendered(refreshes(result)),
    "quality": lambda result: _comparison(result, "quality", notes=True),
    "lr": lambda result: _comparison(result, "lr", notes=False),
    "finetune": lambda result: _forward("finetune", result),
    "population": lambda result: _forward("population", result),
    "deepzero": lambda result: _forward("deepzero", result),
    "directions": lambda result: _forward("directions", result),
    "stream": lambda result: _forward("stream", result),
    "mezo-side-by-side": lambda result: _forward("side_by_side", result),
    "weak-scaling": scaling,
    "staggered": lambda result: rendered(staggered(result)),
    "notes": _said,
    **scale_tables.VIEWS,
}
