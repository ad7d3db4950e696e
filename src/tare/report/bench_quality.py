"""`tare bench quality`: methods on equal tokens, each at its own swept learning rate, on several seeds.

For every method: short runs over a grid of learning rates on the first seed, longer ones of the best and its neighbours, then whole runs of
the winner on every seed. Each run's outcome is a file in a folder, so that a bench that was killed goes on where it stopped.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.core.errors import InputError
from tare.report.bench_specs import MethodSpec, everything, parse
from tare.train.cache import key_of, write_atomic
from tare.train.config import RunConfig

if TYPE_CHECKING:
    from tare.report.bench_run import Outcome

FORMAT = 1
SETTINGS = ("clean", "legacy")
EXTENSIONS = 3  # how often the grid grows when its best is at an end
# Beside the registered methods: AdamW with the learning rates apart, as low-rank methods have them by their scale; and compositions that
# nobody has published: APOLLO in 8 bits, the DCT's columns with FRUGAL's signs outside, SinkGD on Fira's residual, orthonormal APOLLO.
BESIDE = (
    "adamw:dense_lr=4",
    "apollo:storage.moment=int8",
    "compose:basis=dct,residual=sign,scale=1,lr=~1e-3",
    "compose:residual=sinkhorn,residual_scale=0.1",
    "apollo:basis=orthonormal",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tare bench quality`, but for `--json` and the settings of a run, which it shares with other commands."""
    parser.add_argument(
        "--methods", metavar="A,B", help="methods, e.g. adamw,apollo:rank=64,storage.moment=int8; all if left out"
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="whole runs of each method [3]")
    parser.add_argument("--setting", metavar="NAME", default="clean", help="clean, legacy or both [clean]")
    parser.add_argument(
        "--grid", metavar="N", type=int, default=5, help="learning rates around the preset, odd; 1 = no sweep [5]"
    )
    parser.add_argument("--factor", metavar="X", type=float, default=2.0, help="between neighbours in the grid [2]")
    parser.add_argument(
        "--short", metavar="X", type=float, default=0.25, help="share of the steps in the first runs [0.25]"
    )
    parser.add_argument("--middle", metavar="X", type=float, default=0.5, help="and of the best three; 0 = none [0.5]")
    parser.add_argument(
        "--runs", metavar="FOLDER", default="runs/quality", help="outcomes of finished runs [runs/quality]"
    )
    parser.add_argument("--name", metavar="NAME", help="of the corpus, in the result [the last part of --data]")
    parser.add_argument("--out", metavar="FILE", help="write the result here, as JSON, after every method")


def run_parsed(args: argparse.Namespace) -> int:
    """The command, from parsed arguments."""
    from tare.report import bench_quality_tables
    from tare.train.configfile import build

    config = build(args.settings)
    settings = SETTINGS if args.setting == "both" else (args.setting,)
    wanted = Wanted(
        config, parse(args.methods) if args.methods else default_methods(), seeds=args.seeds, settings=settings,
        grid=args.grid, factor=args.factor, short=args.short, middle=args.middle, runs=Path(args.runs).expanduser(),
        name=args.name or "", command=_command(args),
    )  # fmt: skip
    out = Path(args.out) if args.out else None

    def keep(result: dict[str, Any]) -> None:
        if out:
            write_atomic(out, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())

    result = bench_quality(wanted, keep, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=1) if args.json else bench_quality_tables.text(result))
    return 0


def default_methods() -> list[MethodSpec]:
    """Every registered method, and what belongs beside them."""
    found = everything()
    for text in BESIDE:
        try:
            found += parse(text)
        except InputError:
            continue  # a method or an option that this version has not
    return found


@dataclass(frozen=True)
class Wanted:
    """What is compared.

    Args:
        config: model, data, steps and batch, which all runs share; its method and folder are not used.
        methods: what is compared. One with `lr` among its options is not swept.
        seeds: whole runs of each, on seeds `config.run.seed`, + 1, ...
        settings: `clean` trains fp32 weights with the method's own storage and evaluates by tokens; `legacy` does as the published
            scripts: weights and moments in bf16, arithmetic on moments too, and the loss divided by one batch too many.
        grid: learning rates around the preset. factor: between neighbours. short, middle: shares of the steps, see above.
        runs: where finished runs are kept. name: of the corpus. command: as it was typed.
    """

    config: RunConfig
    methods: list[MethodSpec]
    seeds: int = 3
    settings: tuple[str, ...] = ("clean",)
    grid: int = 5
    factor: float = 2.0
    short: float = 0.25
    middle: float = 0.5
    runs: Path = Path("runs/quality")
    name: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        for name in self.settings:
            if name not in SETTINGS:
                raise InputError(f"--setting: expected clean, legacy or both, got {name!r}")
        for name, low, high in (
            ("seeds", 1, 1000),
            ("grid", 1, 99),
            ("factor", 1.01, 100),
            ("short", 0.01, 1),
            ("middle", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"--{name}: expected a number from {low:g} to {high:g}, got {getattr(self, name):g}")
        if self.grid % 2 == 0:
            raise InputError(f"--grid: expected an odd number, so that the preset is in the middle, got {self.grid}")

    @property
    def cost(self) -> float:
        """What a method costs, in whole runs, when its grid is not extended."""
        sweep = self.grid * self.short + (2 * self.middle if self.middle else 0.0) + self.middle
        return (sweep if self.grid > 1 else 0.0) + self.seeds


def bench_quality(
    wanted: Wanted,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs the comparison.

    Args:
        wanted: what is compared. keep: is given the result so far after every method. note: told what happens, with the time left.

    Returns:
        The result as plain values: see `bench/README.md`. Methods that refuse the setting are rows with the reason.

    Raises:
        InputError: a model or data that cannot be used.
    """
    bench = _Bench(wanted, note)
    result = {**_about(wanted), "rows": []}
    for setting in wanted.settings:
        for spec in wanted.methods:
            result["rows"].append(
                {"setting": setting, "method": spec.text, "key": spec.key, **bench.method(spec, setting)}
            )
            result["commits"] = sorted(bench.commits)
            result["corpus"] = {"name": _corpus(wanted), **bench.corpus}
            _differences(result["rows"])
            keep(result)
    return result


@dataclass
class _Bench:
    """The runs of one bench: finished ones from the folder, the others made now."""

    wanted: Wanted
    note: Callable[[str], None]
    done: float = 0.0  # whole runs' worth, those from the folder included
    worked: float = 0.0  # made now
    seconds: float = 0.0  # spent on these
    commits: set[str] = field(default_factory=set)
    corpus: dict[str, Any] = field(default_factory=dict)

    def method(self, spec: MethodSpec, setting: str) -> dict[str, Any]:
        """A method's row."""
        before, steps = self.done, self.wanted.config.train.steps
        try:
            lr, sweep = self.sweep(spec, setting)
            first = self.wanted.config.run.seed
            runs = [self.run(spec, setting, lr, first + n, steps, predict=n == 0) for n in range(self.wanted.seeds)]
        except InputError as refusal:
            self.note(f"{spec.text}: refused: {refusal}")
            self.done = before + self.wanted.cost
            return {"status": "refused", "reason": str(refusal)}
        self.done = before + self.wanted.cost  # whatever the extensions were
        return {
            "status": "done",
            "lr": lr,
            "dense_lr": spec.dense_lr,
            "sweep": sweep,
            "runs": runs,
            **summary(runs, setting),
        }

    def sweep(self, spec: MethodSpec, setting: str) -> tuple[float, list[dict[str, Any]]]:
        """The learning rate of the whole runs, and what was tried: `[{lr, steps, loss}]`."""
        wanted = self.wanted
        centre = self.config(spec, setting, None, 0, 1)[0].method.lr
        assert centre is not None
        if wanted.grid == 1 or "lr" in spec.options:
            return centre, []
        tried: list[dict[str, Any]] = []

        def attempt(power: int, share: float) -> float:
            lr = significant(centre * wanted.factor**power)
            steps = max(1, round(share * wanted.config.train.steps))
            found = self.run(spec, setting, lr, wanted.config.run.seed, steps)
            tried.append({"lr": lr, "steps": steps, "loss": found["loss"]})
            return math.inf if found["loss"] is None else float(found["loss"])

        half = wanted.grid // 2
        losses = {power: attempt(power, wanted.short) for power in range(-half, half + 1)}
        best = min(losses, key=losses.__getitem__)
        for _ in range(EXTENSIONS):
            if not math.isfinite(losses[best]) or min(losses) < best < max(losses):
                break
            power = best - 1 if best == min(losses) else best + 1
            losses[power] = attempt(power, wanted.short)
            best = min(losses, key=losses.__getitem__)
        if wanted.middle:
            longer = {power: attempt(power, wanted.middle) for power in (best - 1, best, best + 1)}
            best = min(longer, key=longer.__getitem__)
        return significant(centre * wanted.factor**best), tried

    def config(self, spec: MethodSpec, setting: str, lr: float | None, seed: int, steps: int) -> tuple[RunConfig, str]:
        """A run's whole configuration, presets filled in, and the name of its file."""
        from tare.train import session

        base = self.wanted.config
        options = {name: value for name, value in spec.options.items() if name not in ("lr", "rank", "weight_decay")}
        storage, precision = dict(spec.storage), base.train.precision
        if setting == "legacy":
            storage, precision = {**_legacy_storage(spec.key), **storage}, "bf16"
        method = replace(
            base.method, key=spec.key, lr=lr or spec.options.get("lr") or spec.centre, rank=spec.options.get("rank"),
            weight_decay=spec.options.get("weight_decay"), options=options, storage=storage,
        )  # fmt: skip
        config = session.resolve(
            replace(
                base, method=method, train=replace(base.train, steps=steps, precision=precision),
                run=replace(base.run, seed=seed, threads=base.run.threads, out="-"),
            )
        )  # fmt: skip
        parts = {name: part for name, part in asdict(config).items() if name != "run"}
        device = str(session.device_of(config.run.device))
        key = key_of(parts, spec.dense_lr, seed, config.run.threads, device)
        return config, f"{spec.key}-{setting}-{steps}-{seed}-{key[:12]}.json"

    def run(
        self, spec: MethodSpec, setting: str, lr: float, seed: int, steps: int, predict: bool = False
    ) -> dict[str, Any]:
        """The outcome of one run, from the folder or made now."""
        config, name = self.config(spec, setting, lr, seed, steps)
        place = self.wanted.runs / name
        share = steps / self.wanted.config.train.steps
        try:
            kept = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = None
        if kept is None:
            text = json.dumps(self.make(spec, setting, config, predict), allow_nan=False)
            write_atomic(place, text.encode())
            kept = json.loads(text)
        self.done += share
        self.commits.add(kept["commit"] or "unknown")
        self.corpus = {name: kept[name] for name in ("eval_tokens", "epochs", "tokens")} if share == 1 else self.corpus
        return kept

    def make(self, spec: MethodSpec, setting: str, config: RunConfig, predict: bool) -> dict[str, Any]:
        from tare.report import provenance
        from tare.report.bench_run import train_once

        steps, began, spoken = config.train.steps, time.monotonic(), time.monotonic()
        share = steps / self.wanted.config.train.steps
        what = f"{spec.text} ({setting}), lr {config.method.lr:g}, seed {config.run.seed}"
        self.note(f"{what}: {steps} steps; {self.left()}")

        def tell(step: int, steps: int, loss: float, left: float) -> None:
            nonlocal spoken
            if time.monotonic() - spoken > 30:
                spoken = time.monotonic()
                self.note(f"{what}: step {step} of {steps}, loss {loss:.3f}, {_clock(left)} left of it; {self.left()}")

        found: Outcome = train_once(config, spec.dense_lr, predict, setting == "legacy", tell)
        self.worked += share
        self.seconds += time.monotonic() - began
        shown = f"loss {found.loss:.4f}" if found.loss is not None else f"diverged ({found.reason})"
        self.note(f"{what}: {shown} in {_clock(time.monotonic() - began)}")
        sha, changed = provenance.commit()
        return {
            "seed": config.run.seed, "lr": config.method.lr, "steps": steps, **asdict(found), "commit": sha,
            "uncommitted_changes": changed, "options": _plain(config.method.options), "rank": config.method.rank,
            "weight_decay": config.method.weight_decay, "storage": config.method.storage,
        }  # fmt: skip

    def left(self) -> str:
        """How far the whole bench is, and how long it will take, by the runs made until now."""
        total = self.wanted.cost * len(self.wanted.methods) * len(self.wanted.settings)
        part = f"{self.done:.1f} of about {total:.0f} whole runs done"
        if not self.worked:
            return part
        return f"{part}, about {_clock(self.seconds / self.worked * max(0.0, total - self.done))} left in all"


def summary(runs: list[dict[str, Any]], setting: str) -> dict[str, Any]:
    """A row's numbers from its whole runs. `loss`: by the setting's evaluation; `spread`: standard deviation over seeds."""
    name = "legacy_loss" if setting == "legacy" else "loss"
    losses = [run[name] for run in runs if run[name] is not None]
    rates = [run["tokens_per_second"] for run in runs if run["status"] == "done"]
    return {
        "losses": [run[name] for run in runs],
        "loss": statistics.fmean(losses) if len(losses) == len(runs) else None,
        "spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "diverged": len(runs) - len(losses),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "state_bytes": runs[0]["state_bytes"],
        "measured_peak": max(run["measured_peak"] for run in runs),
        "predicted_peak": runs[0]["predicted_peak"],
    }


def _differences(rows: list[dict[str, Any]]) -> None:
    """Beside each row its loss minus AdamW's on the same seeds, which share weights and data: mean and standard deviation."""
    for row in rows:
        base = next((r for r in rows if r["setting"] == row["setting"] and r["method"] == "adamw"), None)
        if base is None or row.get("loss") is None or base.get("loss") is None:
            row["over_adamw"] = None
            continue
        pairs = [own - other for own, other in zip(row["losses"], base["losses"], strict=True)]
        spread = statistics.stdev(pairs) if len(pairs) > 1 else None
        row["over_adamw"] = {"mean": statistics.fmean(pairs), "spread": spread}


def significant(x: float) -> float:
    """Three digits: a learning rate that can be typed."""
    return float(f"{x:.3g}")


def _legacy_storage(key: str) -> dict[str, Any]:
    """The published scripts' state: bf16 where it is fp32 by default; 8-bit states stay. Weights are rounded to nearest."""
    from torch import nn

    from tare.methods import registry

    own = registry.build(key, nn.Linear(2, 2), 1e-3).storage
    return {"weight": "plain", **({"moment": "bf16_legacy"} if own.moment == "fp32" else {})}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, bool | int | float | str | list | None) else str(value)
        for name, value in options.items()
    }


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# -- what a result says about itself ---------------------------------------------------------------------------------


def _about(wanted: Wanted) -> dict[str, Any]:
    import torch

    from tare.kernels import gemm
    from tare.report import provenance
    from tare.train.session import device_of

    sha, changed = provenance.commit()
    config = asdict(wanted.config)
    data = {**config["data"], "source": _corpus(wanted)}
    if data["eval_source"]:
        data["eval_source"] = _short(data["eval_source"])
    model = {**config["model"], "name": _short(config["model"]["name"])}
    if model["tokenizer"]:
        model["tokenizer"] = _short(model["tokenizer"])
    device = provenance.device()
    if device_of(wanted.config.run.device).type == "cuda":
        device["gpu"] = torch.cuda.get_device_name()
    return {
        "kind": "bench-quality", "format": FORMAT, "command": wanted.command, "commit": sha, "uncommitted_changes": changed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": device,
        "threads": wanted.config.run.threads or torch.get_num_threads(), "torch": torch.__version__.split("+")[0],
        "matrix_library": gemm.describe(), "model": model, "data": data, "train": config["train"],
        "seeds": [wanted.config.run.seed + n for n in range(wanted.seeds)], "settings": list(wanted.settings),
        "sweep": {name: getattr(wanted, name) for name in ("grid", "factor", "short", "middle")},
    }  # fmt: skip


def _corpus(wanted: Wanted) -> str:
    return wanted.name or _short(wanted.config.data.source)


def _short(path: str) -> str:
    """A source without the place on this machine: names stay, of a path the last two parts."""
    return "/".join(Path(path).parts[-2:]) if path.startswith(("/", "~", ".")) else path


def _command(args: argparse.Namespace) -> str:
    """What was typed, paths shortened."""
    words = ["tare", "bench", "quality"]
    for given in args.settings:
        words += [given.where, _short(str(given.value))]
    defaults = {
        "methods": None,
        "seeds": 3,
        "setting": "clean",
        "grid": 5,
        "factor": 2.0,
        "short": 0.25,
        "middle": 0.5,
        "name": None,
    }
    for name, default in defaults.items():
        if getattr(args, name) != default:
            words += [f"--{name}", str(getattr(args, name))]
    if args.out:
        words += ["--out", _short(args.out)]
    return shlex.join(words)
