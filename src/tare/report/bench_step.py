"""`tare bench step`: the optimizer step alone on a model's exact shapes, as ratios to torch's fused AdamW in the same process.

The result is one JSON document with every round in it; tables in the docs are made from it by `bench_tables`, never by hand.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.core.errors import InputError, nearest
from tare.report import provenance

if TYPE_CHECKING:
    from tare.report.bench_rows import Contender, Spec
    from tare.report.bench_shapes import Bench
    from tare.report.bench_timing import Patience

FORMAT = 2
PEER_PERIOD = 200  # as `bench_peers.groups` sets it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tare bench step`, but for `--json`, which every command has."""
    both = argparse.BooleanOptionalAction
    parser.add_argument(
        "--shapes", metavar="A,B", default="llama-60m",
        help="named models whose shapes are stepped, e.g. llama-60m,llama-7b-layer (one decoder layer) [llama-60m]",
    )  # fmt: skip
    parser.add_argument(
        "--methods", metavar="A,B", help="our rows, e.g. galore:rank=64,adamw-8bit, or none; all if left out"
    )
    parser.add_argument(
        "--peers",
        metavar="A,B",
        default="all",
        help="other packages' rows, all or none [all that do not compile for minutes]",
    )
    parser.add_argument("--no-peers", dest="peers", action="store_const", const="none", help="the same as --peers none")
    parser.add_argument("--rounds", metavar="N", type=int, default=9, help="interleaved rounds [9]")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="CPU threads [2]")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu or cuda [auto]")
    parser.add_argument("--dtype", metavar="NAME", default="fp32", help="of weights and gradients: fp32 or bf16 [fp32]")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of weights and gradients [0]")
    parser.add_argument("--refresh", action=both, default=True, help="also time refreshes and a staggered period")
    parser.add_argument(
        "--refresh-seconds", metavar="S", type=float, default=20.0, help="for each refresh row, the first apart [20]"
    )
    parser.add_argument(
        "--slowest", metavar="S", type=float, default=20.0, help="leave rows out whose step takes longer [20]"
    )
    parser.add_argument(
        "--patience", metavar="S", type=float, default=60.0,
        help="seconds for repeating samples that other processes disturb [60]",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="SIZE", help="most bytes that contenders hold at a time [a third of what is free]"
    )
    parser.add_argument("--out", metavar="FILE", help="write the result here, as JSON; with several shapes a folder")


def run(argv: list[str]) -> int:
    """`tare bench step ARGV`."""
    parser = argparse.ArgumentParser("tare bench step", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    return run_parsed(parser.parse_args(argv))


def run_parsed(args: argparse.Namespace) -> int:
    """The same, from parsed arguments."""
    from tare.plan.budget import parse_bytes
    from tare.report import bench_tables

    shapes = [name.strip() for name in args.shapes.split(",") if name.strip()]
    wanted = Wanted(
        args.methods, args.peers, rounds=args.rounds, threads=args.threads, seed=args.seed, device=args.device,
        dtype=args.dtype, refresh=args.refresh, refresh_seconds=args.refresh_seconds, slowest=args.slowest, patience=args.patience,
        memory=parse_bytes(args.memory) if args.memory else None,
    )  # fmt: skip
    results = []
    for name in shapes:
        result = bench_step(name, wanted, note=lambda text: print(text, file=sys.stderr, flush=True))
        if args.out:
            place = Path(args.out) / f"step-{result['name']}.json" if len(shapes) > 1 else Path(args.out)
            result["command"] += f" --out {shlex.quote(_shown(place))}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        results.append(result)
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=1))
    else:
        print("\n\n\n".join(bench_tables.text(result) for result in results))
    return 0


@dataclass(frozen=True)
class Wanted:
    """What is run, and how long.

    Args:
        methods: our rows as `bench_specs` reads them; None for all, "none" for none. The bar always runs.
        peers: keys of `bench_peers`, "all" that do not compile for minutes, or "none"; absent ones are listed as such.
        rounds: interleaved rounds. threads: of torch, for the time of the call. seed: of weights and gradients.
        device: auto, cpu or cuda. dtype: of weights and gradients.
        refresh: whether refreshes and a staggered period are timed. refresh_rounds: how often.
        refresh_seconds: for each such row; those of long steps get fewer rounds, and less than a period of staggered steps.
        slowest: seconds; a row whose step takes longer is listed with its time and not run.
        patience: seconds for repeating samples during which other processes took the cores.
        memory: bytes that contenders may hold together; then the next ones run, in rounds of their own.
        copied: MiB of the copy that tells the bandwidth; None for 256, on a GPU 1024. Less than the caches says nothing.
    """

    methods: str | None = None
    peers: str = "all"
    rounds: int = 9
    threads: int = 2
    seed: int = 0
    device: str = "auto"
    dtype: str = "fp32"
    refresh: bool = True
    refresh_seconds: float = 20.0
    slowest: float = 20.0
    patience: float = 60.0
    memory: int | None = None
    refresh_rounds: int = 5
    copied: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("rounds", 2), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}: expected a whole number >= {least}, got {getattr(self, name)}")

    def command(self, shapes: str) -> str:
        """What was typed, but for what is the default, and the output."""
        words = [f"tare bench step --shapes {shlex.quote(shapes)}"]
        for name in ("methods", "peers", "rounds", "threads", "seed", "device", "dtype"):
            value = getattr(self, name)
            if value != getattr(Wanted, name) or name in ("rounds", "threads", "seed"):
                words.append(f"--{name} {shlex.quote(str(value))}")
        return " ".join([*words, *([] if self.refresh else ["--no-refresh"])])


def bench_step(shapes: str, wanted: Wanted, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Runs the benchmark on one model's shapes.

    Args:
        shapes: a named model (embedding, head and norms included), or `NAME-layer`, one of its decoder layers.
        wanted: what is run. note: told what happens next.

    Returns:
        The result as plain values: see `bench/README.md`.

    Raises:
        InputError: unknown shapes or rows, or a device that is not there.
    """
    import torch

    from tare.report import bench_rows, bench_shapes, bench_timing

    before = torch.get_num_threads()
    torch.set_num_threads(wanted.threads)
    try:
        load = os.getloadavg()[0]
        bench = bench_shapes.build(shapes, wanted.seed, wanted.dtype, wanted.device)
        specs, absent = choose(wanted, bench)
        timed = bench_timing.clock(bench.device)
        bar = _ready(bench_rows.BAR_SPEC, bench)
        bench_timing.warm_up(bar, timed)
        waiting = bench_timing.Patience(wanted.patience, timed)
        rows = _timed(bar, specs, bench, wanted, waiting, absent, note)
        name = bench_shapes.described(bench)
        about = _about(shapes, wanted, load, bench)
        result = {"kind": "bench-step", "format": FORMAT, "name": name, **about, "shapes": bench.about(), "rows": rows}
        result["bandwidth"] = _bandwidth(rows[0], bench, wanted.copied)
        for row in rows:
            _bounds(row, result["bandwidth"])
        result["absent"] = absent
        result["refreshes"], result["staggered"] = [], []
        if wanted.refresh:
            _refreshes(result, specs, bar, bench, wanted, waiting, note)
        result["disturbed"] = waiting.to_json()
        result["load_after"] = os.getloadavg()[0]
        return result
    finally:
        torch.set_num_threads(before)


def choose(wanted: Wanted, bench: "Bench") -> tuple[list["Spec"], list[dict[str, str]]]:
    """The rows to run, the bar apart, and those of other packages that cannot run here."""
    from tare.report import bench_peers, bench_rows, bench_specs

    specs: list[Spec] = []
    if wanted.methods != "none":
        specs = bench_rows.ours(bench, bench_specs.parse(wanted.methods) if wanted.methods else None)
    absent: list[dict[str, str]] = []
    known = [spec.key for spec in bench_peers.PEERS]
    named = (
        [] if wanted.peers in ("all", "none") else [name.strip() for name in wanted.peers.split(",") if name.strip()]
    )
    for name in named:
        if name not in known:
            raise InputError(
                f"--peers: unknown row {name!r}{nearest(name, known)}; rows: all, none, {', '.join(known)}"
            )
    for spec in bench_peers.PEERS:
        if wanted.peers == "none" or (named and spec.key not in named):
            continue
        reason = ""
        if spec.cuda and bench.device.type != "cuda":
            reason = "needs a GPU"
        elif bench_peers.installed(spec.package) is None:
            reason = "not installed"
        elif spec.slow and spec.key not in named:
            reason = "compiles for minutes; name it in --peers"
        if reason:
            absent.append({"key": spec.key, "package": spec.package, "reason": reason})
        else:
            specs.append(spec)
    return specs, absent


def _timed(
    bar: "Contender", specs: list["Spec"], bench: "Bench", wanted: Wanted, waiting: "Patience",
    absent: list[dict[str, str]], note: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Every row's times and counts: as many contenders at a time as memory holds, each group in interleaved rounds of its own."""
    from tare.report import bench_rows, bench_shapes, bench_timing

    limit = wanted.memory or _free(bench) // 3
    untouched = bench_shapes.sums(bench)
    rows: list[dict[str, Any]] = []
    bars: list[float] = []
    left, groups = list(specs), 0
    while left or not groups:
        group: list[Contender] = []
        held = 0
        while left and (not group or held < limit):
            spec = left.pop(0)
            note(f"warming up {_label(spec, bench)}")
            contender = _warm(spec, bench, absent, waiting, wanted.slowest)
            if contender is not None:
                group.append(contender)
                held += bench_rows.state_bytes(contender.optimizer)
                _keep_gradients(contender, bench, untouched, wanted.seed)
        groups += 1
        times = bench_timing.rounds(bar, group, wanted.rounds, waiting, note)
        bars += times[0]["ms"]
        for contender, found in zip(group, times[1:], strict=True):
            rows.append(_row(contender, bench) | {"group": groups, **found})
        group.clear()
        _tidy(bench)
    first = {"ms": bars, "bar_ms": bars, "recompilations": 0}
    bench_timing.finish(first)
    return [_row(bar, bench) | {"group": 0, **first}, *rows]


def _row(contender: "Contender", bench: "Bench") -> dict[str, Any]:
    from tare.report import bench_probe, bench_rows, bench_timing

    spec = contender.spec
    return {
        "key": spec.key, "label": _label(spec, bench), "kind": spec.kind, "package": spec.package, "against": spec.against,
        "rank": spec.rank(bench), "state_bytes": bench_rows.state_bytes(contender.optimizer),
        "temporary_bytes": bench_timing.temporaries(bench.model, contender),
        "moved_bytes": bench_rows.moved_bytes(contender, bench), **bench_probe.probe(contender, bench.device),
        "first_ms": contender.first_ms, "compiled_graphs": contender.graphs, "notes": contender.notes,
    }  # fmt: skip


def _warm(
    spec: "Spec", bench: "Bench", absent: list[dict[str, str]], waiting: "Patience", slowest: float
) -> "Contender | None":
    """The contender after its first steps, or None, with the reason noted: one row that fails does not cost the others."""
    from tare.report import bench_timing

    try:
        contender = _ready(spec, bench)
        bench_timing.warm_up(contender, waiting.timed, slowest)
        return contender
    except bench_timing.TooSlow as fault:
        reason = _line(fault)
    except Exception as fault:
        reason = f"{type(fault).__name__}: {_line(fault)}"
    absent.append({"key": spec.key, "package": spec.package, "reason": reason})
    return None


def _keep_gradients(contender: "Contender", bench: "Bench", untouched: list[float], seed: int) -> None:
    """Say so where an optimizer changes the gradients, and give the others theirs back."""
    from tare.report import bench_shapes

    if bench_shapes.sums(bench) == untouched:
        return
    contender.notes.append("changes the gradients")
    contender.restore = lambda: bench_shapes.fill(bench, seed)
    contender.restore()


def _refreshes(
    result: dict[str, Any], specs: list["Spec"], bar: "Contender", bench: "Bench", wanted: Wanted, waiting: "Patience",
    note: Callable[[str], None],
) -> None:  # fmt: skip
    from tare.report import bench_peers, bench_rows, bench_specs, bench_timing

    methods = bench_specs.parse(wanted.methods) if wanted.methods and wanted.methods != "none" else None
    whole, staggered = ([], []) if wanted.methods == "none" else bench_rows.refreshing(bench, methods)
    whole += [spec for spec in specs if spec.key in bench_peers.REFRESHES]
    bar_ms = result["rows"][0]["ms_median"]
    for number, spec in enumerate([*whole, *staggered]):
        together = number < len(whole)
        note(f"{'refresh' if together else 'staggered steps'}: {_label(spec, bench)}")
        refused: list[dict[str, str]] = []
        contender = _warm(spec, bench, refused, waiting, wanted.slowest)
        if contender is None:
            result["absent"] += [{**row, "key": f"{row['key']} (refresh)"} for row in refused]
            continue
        period = spec.period or PEER_PERIOD
        about = {"key": spec.key, "label": _label(spec, bench), "period": period}
        ordinary = bench_timing.median_of(contender, 3, waiting.timed)
        if together:
            count = _affordable(
                wanted.refresh_seconds, contender.first_ms + bar_ms + ordinary, 1, wanted.refresh_rounds
            )
            found = bench_timing.refresh(bar, contender, period, count, waiting)
            if found["refreshed"]:
                result["refreshes"].append({**about, **found})
        else:
            count = _affordable(wanted.refresh_seconds, ordinary + bar_ms, min(20, period), period)
            found = bench_timing.staggered(bar, contender, count, waiting.timed)
            result["staggered"].append({**about, **found})
        del contender
        _tidy(bench)


def _affordable(seconds: float, milliseconds: float, least: int, most: int) -> int:
    return max(least, min(most, int(1e3 * seconds / max(milliseconds, 1e-3))))


def _ready(spec: "Spec", bench: "Bench") -> Any:
    from tare.report.bench_rows import Contender

    with warnings.catch_warnings():
        if spec.kind == "peer":
            warnings.simplefilter("ignore")
        return Contender(spec, spec.build(bench))


def _label(spec: "Spec", bench: "Bench") -> str:
    return spec.label.format(rank=spec.rank(bench))


def _free(bench: "Bench") -> int:
    """Bytes that are free where the contenders' state will be."""
    import torch

    if bench.device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 8 << 30


def _tidy(bench: "Bench") -> None:
    import torch

    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


# -- bounds ------------------------------------------------------------------------------------------------------------


def _bandwidth(bar: dict[str, Any], bench: "Bench", copied: int | None) -> dict[str, float]:
    """What the machine reaches: a copy, an update in place, a projection; and what the bar makes of it."""
    from tare.report import bench_shapes, bench_timing

    found = bench_timing.bandwidth(bench.device, copied)
    moved = bar["moved_bytes"] / bar["ms_median"] / 1e6
    m, n = max(
        (tuple(p.shape) for p in bench.model.parameters() if p.ndim == 2), key=lambda shape: (min(shape), -max(shape))
    )
    dtype = next(bench.model.parameters()).dtype
    rank = bench_shapes.shares(bench)[0]
    return {
        "copy_gb_s": found["copy"],
        "in_place_gb_s": found["in_place"],
        "bar_gb_s": moved,
        "bar_bytes": bar["moved_bytes"] / sum(p.numel() for p in bench.model.parameters()),
        "bar_share_of_copy": moved / found["copy"],
        "bar_share_of_in_place": moved / found["in_place"],
        "gemm_gflop_s": bench_timing.products(max(m, n), min(m, n), rank, dtype, bench.device),
    }


def _bounds(row: dict[str, Any], machine: dict[str, float]) -> None:
    """The least times that bytes and products allow here, and how far the row is from them."""
    row["bytes_ms"] = row["moved_bytes"] / machine["copy_gb_s"] / 1e6
    row["gemm_ms"] = row["flops"] / machine["gemm_gflop_s"] / 1e6 if row["flops"] is not None else None
    row["share_of_copy"] = row["bytes_ms"] / row["ms_median"]
    row["over_bound"] = row["ms_median"] / max(row["bytes_ms"], row["gemm_ms"] or 0.0)


# -- what a result says about itself ---------------------------------------------------------------------------------


def _about(shapes: str, wanted: Wanted, load: float, bench: "Bench") -> dict[str, Any]:
    from tare.kernels import gemm, native
    from tare.report.bench_peers import PEERS

    sha, changed = provenance.commit()
    packages = ["tare", "torch", *sorted({spec.package for spec in PEERS if spec.package})]
    device = provenance.device()
    if bench.device.type == "cuda":
        import torch

        device["gpu"] = torch.cuda.get_device_name()
        packages.append("triton")
    return {
        "command": wanted.command(shapes), "seed": wanted.seed, "commit": sha,
        "uncommitted_changes": changed, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device, "threads": wanted.threads, "rounds": wanted.rounds, "load_before": load,
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


def _shown(path: Path) -> str:
    """A path as it may stand in a result: relative to the current folder, or its last part."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return path.name


def _line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:200]
