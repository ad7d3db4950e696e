"""`tare bench step`: the optimizer step alone on a model's exact shapes, as ratios to torch's fused AdamW in the same process.

The result is one JSON document with every round in it; tables in the docs are made from it by `bench_tables`, never by hand.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.core.errors import InputError, nearest
from tare.report import provenance

if TYPE_CHECKING:
    from torch import nn

    from tare.report.bench_rows import Ranks, Spec
    from tare.report.bench_timing import Patience

FORMAT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tare bench step`, but for `--json`, which every command has."""
    parser.add_argument(
        "--shapes", metavar="NAME", default="llama-60m", help="named model whose shapes are stepped [llama-60m]"
    )
    parser.add_argument("--methods", metavar="A,B", help="rows to run, e.g. galore,adamw-8bit; all if left out")
    parser.add_argument("--rounds", metavar="N", type=int, default=9, help="interleaved rounds [9]")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="CPU threads [2]")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of weights and gradients [0]")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run other packages that are installed",
    )
    parser.add_argument(
        "--refresh",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time refreshes and a staggered period",
    )
    parser.add_argument(
        "--patience",
        metavar="S",
        type=float,
        default=60.0,
        help="seconds for repeating samples that other processes disturb [60]",
    )
    parser.add_argument("--out", metavar="FILE", help="write the result here, as JSON")


def run(argv: list[str]) -> int:
    """`tare bench step ARGV`."""
    parser = argparse.ArgumentParser("tare bench step", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    return run_parsed(parser.parse_args(argv))


def run_parsed(args: argparse.Namespace) -> int:
    """The same, from parsed arguments."""
    from tare.report import bench_tables

    names = [name.strip() for name in args.methods.split(",") if name.strip()] if args.methods else None
    result = bench_step(
        args.shapes, names, rounds=args.rounds, threads=args.threads, seed=args.seed, peers=args.peers,
        refresh=args.refresh, patience=args.patience, note=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    if args.out:
        result["command"] += f" --out {shlex.quote(_shown(args.out))}"
        target = Path(args.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1) if args.json else bench_tables.text(result))
    return 0


def bench_step(
    shapes: str = "llama-60m",
    methods: list[str] | None = None,
    *,
    rounds: int = 9,
    threads: int = 2,
    seed: int = 0,
    peers: bool = True,
    refresh: bool = True,
    patience: float = 60.0,
    period: int = 200,
    refresh_rounds: int = 5,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        shapes: a named model; embedding, head and norms included, fp32 weights and gradients.
        methods: keys of rows; None for all. The bar always runs.
        rounds: interleaved rounds. threads: of torch, for the time of this call. seed: of weights and gradients.
        peers: whether other packages are run where installed; absent ones are listed as such.
        refresh: whether refreshes and a staggered period are timed. period: updates between refreshes.
        patience: seconds for repeating samples during which other processes took the cores.
        note: told what happens next.

    Returns:
        The result as plain values: see `bench/README.md`.

    Raises:
        InputError: unknown shapes or rows, or a count below its least.
    """
    import torch

    from tare.report import bench_rows, bench_timing

    for name, value, least in (("--rounds", rounds, 2), ("--threads", threads, 1), ("--seed", seed, 0)):
        if value < least:
            raise InputError(f"{name}: expected a whole number >= {least}, got {value}")
    wanted, absent = _choose(methods, peers)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        load = os.getloadavg()[0]
        model, about, ranks = _model(shapes, seed)
        bar = _ready(bench_rows.ROWS[0], model, ranks)
        bench_timing.warm_up(bar)
        others = []
        for spec in wanted:
            note(f"warming up {_label(spec, ranks)}")
            try:
                contender = _ready(spec, model, ranks)
                bench_timing.warm_up(contender)
                others.append(contender)
            except Exception as fault:
                if spec.kind != "peer":
                    raise
                absent.append({"key": spec.key, "package": spec.package, "reason": _line(fault)})
        waiting = bench_timing.Patience(patience)
        timed = bench_timing.rounds(bar, others, rounds, waiting, note)
        rows = []
        for contender, times in zip([bar, *others], timed, strict=True):
            spec = contender.spec
            kept = bench_rows.state_bytes(contender.optimizer)
            extra = bench_timing.temporaries(model, contender)
            rows.append(
                {
                    "key": spec.key, "label": _label(spec, ranks), "kind": spec.kind, "state_bytes": kept,
                    "temporary_bytes": extra, "first_ms": contender.first_ms, **times,
                }
            )  # fmt: skip
        result = {**_about(shapes, methods, rounds, threads, seed, peers, refresh, load), "shapes": about, "rows": rows}
        result["bandwidth"] = _bandwidth(rows[0]["ms_median"], about["parameters"])
        result["absent"] = absent
        others.clear()
        result["refreshes"], result["staggered"] = [], []
        if refresh:
            keys = {spec.key for spec in wanted}
            _refreshes(result, keys, bar, model, ranks, period, refresh_rounds, waiting, note)
        result["disturbed"] = waiting.to_json()
        result["load_after"] = os.getloadavg()[0]
        return result
    finally:
        torch.set_num_threads(before)


def _refreshes(
    result: dict[str, Any], keys: set[str], bar: Any, model: "nn.Module", ranks: "Ranks", period: int, count: int,
    patience: "Patience", note: Callable[[str], None],
) -> None:  # fmt: skip
    from tare.report import bench_rows, bench_timing

    for spec in (spec for spec in bench_rows.REFRESHES if spec.key in keys):
        note(f"refresh: {_label(spec, ranks)}")
        contender = _ready(spec, model, ranks)
        bench_timing.warm_up(contender)
        found = bench_timing.refresh(bar, contender, period, count, patience)
        result["refreshes"].append({"key": spec.key, "label": _label(spec, ranks), "period": period, **found})
    for spec in (spec for spec in bench_rows.STAGGERED if spec.key in keys):
        note(f"{period} steps: {_label(spec, ranks)}")
        contender = _ready(spec, model, ranks)
        bench_timing.warm_up(contender)
        found = bench_timing.staggered(bar, contender, period)
        result["staggered"].append({"key": spec.key, "label": _label(spec, ranks), "period": period, **found})


def _choose(methods: list[str] | None, peers: bool) -> tuple[list["Spec"], list[dict[str, str]]]:
    """The rows to run, the bar apart, and the peers that are not there."""
    from tare.report.bench_rows import BAR, ROWS, installed

    keys = [spec.key for spec in ROWS]
    for name in methods or []:
        if name not in keys:
            raise InputError(f"--methods: unknown row {name!r}{nearest(name, keys)}; rows: {', '.join(keys)}")
    wanted, absent = [], []
    for spec in ROWS:
        if spec.key == BAR or (methods is not None and spec.key not in methods):
            continue
        if spec.kind == "peer":
            if not peers:
                continue
            if installed(spec.package) is None:
                absent.append({"key": spec.key, "package": spec.package, "reason": "not installed"})
                continue
        wanted.append(spec)
    return wanted, absent


def _model(shapes: str, seed: int) -> tuple["nn.Module", dict[str, Any], "Ranks"]:
    """The model with fixed gradients; its sizes; the ranks that go with it."""
    import torch

    from tare.plan.models import MODELS, build_model, named
    from tare.report.bench_rows import Ranks

    key = named(shapes)
    if key is None:
        raise InputError(
            f"--shapes: unknown model {shapes!r}{nearest(shapes, list(MODELS))}; models: {', '.join(MODELS)}"
        )
    model = build_model(key, dtype="fp32", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3)
    hidden = MODELS[key].hidden
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    inner = [size for name, size in sizes.items() if "embed" not in name and "lm_head" not in name]
    about = {
        "name": key,
        "parameters": sum(p.numel() for p in model.parameters()),
        "projected_matrices": len(inner),
        "largest_linear_bytes": 4 * max(inner),
        "largest_matrix_bytes": 4 * max(sizes.values()),
        "dtype": "fp32",
    }
    return model, about, Ranks(hidden // 4, hidden // 2)


def _ready(spec: "Spec", model: "nn.Module", ranks: "Ranks") -> Any:
    from tare.report.bench_rows import Contender

    with warnings.catch_warnings():
        if spec.kind == "peer":
            warnings.simplefilter("ignore")
        return Contender(spec, spec.build(model, ranks))


def _label(spec: "Spec", ranks: "Ranks") -> str:
    return spec.label.format(quarter=ranks.quarter, half=ranks.half)


def _bandwidth(bar_ms: float, parameters: int) -> dict[str, float]:
    from tare.report.bench_tables import ADAMW_BYTES
    from tare.report.bench_timing import bandwidth

    found = bandwidth()
    moved = ADAMW_BYTES * parameters / bar_ms / 1e6
    return {
        "copy_gb_s": found["copy"],
        "in_place_gb_s": found["in_place"],
        "bar_gb_s": moved,
        "bar_share_of_copy": moved / found["copy"],
        "bar_share_of_in_place": moved / found["in_place"],
    }


# -- what a result says about itself ---------------------------------------------------------------------------------


def _about(
    shapes: str,
    methods: list[str] | None,
    rounds: int,
    threads: int,
    seed: int,
    peers: bool,
    refresh: bool,
    load: float,
) -> dict[str, Any]:
    from tare.kernels import gemm, native
    from tare.report.bench_rows import ROWS

    command = f"tare bench step --shapes {shlex.quote(shapes)}"
    command += f" --methods {','.join(methods)}" if methods else ""
    command += f" --rounds {rounds} --threads {threads} --seed {seed}"
    command += ("" if peers else " --no-peers") + ("" if refresh else " --no-refresh")
    sha, changed = provenance.commit()
    packages = ["tare", "torch", *sorted({spec.package for spec in ROWS if spec.package})]
    return {
        "kind": "bench-step", "format": FORMAT, "command": command, "seed": seed, "commit": sha,
        "uncommitted_changes": changed, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": provenance.device(), "threads": threads, "rounds": rounds, "load_before": load,
        "versions": {name: _version(name) for name in packages}, "python": platform.python_version(),
        "matrix_library": gemm.describe(), "native": native.reason(),
    }  # fmt: skip


def _version(package: str) -> str | None:
    if package == "torch":
        import torch

        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(path: str) -> str:
    """A path as it may stand in a result: relative to the current folder, or its last part."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return Path(path).name


def _line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:200]
