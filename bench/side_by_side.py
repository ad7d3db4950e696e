"""`mezo` beside the published procedure: the same model, batches and directions; losses, seconds of a step, and memory.

    git clone https://github.com/princeton-nlp/MeZO
    python bench/side_by_side.py MeZO [--family opt] [--steps 8] [--rounds 5] [--out bench/results/mezo-side-by-side.json]

The step functions are read out of the checkout's `large_models/trainer.py` and run as they stand, with a stand-in for the Trainer around
them: the file as a whole asks for a transformers of 2023. Their directions are recorded as they are drawn and given to ours, so that the
losses can be compared step by step: `legacy=True` is the published arithmetic, but that theirs rounds the projected gradient to the dtype
of the loss; the other plans differ by the drift of weights that theirs writes.
Then each side draws its own directions, and steps are timed in turn; memory is what one step needs beyond the model at its highest point.
"""

import argparse
import ast
import contextlib
import json
import os
import statistics
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import tare
from tare.plan.activations import causal_loss
from tare.plan.measure import StepMeter
from tare.report.bench_timing import Patience, clock, no_collector, spread
from tare.report.provenance import commit, device
from tare.testing.directions import RecordedDirections
from tare.zeroth.record import Record

FUNCTIONS = ("zo_perturb_parameters", "zo_forward", "zo_step", "zo_update")
FORMS: dict[str, dict[str, Any]] = {
    "legacy": {"legacy": True}, "in place, exact": {"memory": "in-place-exact"}, "in forward (default)": {},
}  # fmt: skip


class Recording:
    """torch, as their functions see it; `normal` is kept where it is asked for."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def normal(self, *args: Any, **named: Any) -> Tensor:
        z = torch.normal(*args, **named)
        if self.drawn is not None:
            self.drawn.append(z.clone())
        return z


def published(checkout: Path, seen: Recording) -> dict[str, Callable[..., Any]]:
    """Their functions, compiled from the user's own copy."""
    path = checkout / "large_models" / "trainer.py"
    if not path.is_file():
        raise SystemExit(f"{checkout}: holds no large_models/trainer.py; give a checkout of princeton-nlp/MeZO")
    found = {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    missing = [name for name in FUNCTIONS if name not in found]
    if missing:
        raise SystemExit(f"{path}: has no {', '.join(missing)}; another version than the one of 2023?")
    names: dict[str, Any] = {"torch": seen, "np": numpy}
    for name in FUNCTIONS:
        node = found[name]
        node.returns = None  # names of types that are not here
        for argument in node.args.args:
            argument.annotation = None
        exec(compile(ast.Module([node], []), str(path), "exec"), names)
    return {name: names[name] for name in FUNCTIONS}


class Theirs:
    """What their functions want of a Trainer."""

    def __init__(self, functions: dict[str, Callable[..., Any]], model: nn.Module, args: argparse.Namespace):
        self.model = model
        self.args = types.SimpleNamespace(
            zo_eps=args.eps, non_diff=False, n_gpu=1, gradient_accumulation_steps=1, weight_decay=args.weight_decay
        )
        self.lr, self.losses = args.lr, list[float]()
        self.lr_scheduler = types.SimpleNamespace(step=lambda: None)
        for name, function in functions.items():
            setattr(self, name, types.MethodType(function, self))

    def _prepare_inputs(self, inputs: Tensor) -> Tensor:
        return inputs

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def compute_loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        loss = causal_loss(model, tokens)
        self.losses.append(float(loss))
        return loss

    def _get_learning_rate(self) -> float:
        return self.lr

    def step(self, tokens: Tensor) -> list[float]:
        """One step; the losses at + and -."""
        self.losses = []
        self.zo_step(self.model, tokens)  # type: ignore[attr-defined]
        self.zo_update(self.model)  # type: ignore[attr-defined]
        return self.losses


def model_of(args: argparse.Namespace) -> nn.Module:
    """A small causal LM with random weights, the same every time."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": args.vocab,
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
    }
    if args.family == "opt":
        config: Any = transformers.OPTConfig(
            **sizes,
            ffn_dim=4 * args.width,
            word_embed_proj_dim=args.width,
            max_position_embeddings=args.seq + 2,
            dropout=0.0,
        )
        return transformers.OPTForCausalLM(config).eval().to(getattr(torch, args.dtype))
    config = transformers.LlamaConfig(**sizes, intermediate_size=8 * args.width // 3, max_position_embeddings=args.seq)
    return transformers.LlamaForCausalLM(config).eval().to(getattr(torch, args.dtype))


def batch(args: argparse.Namespace, number: int) -> Tensor:
    """Tokens in which each follows from the one before by a rule, most of the time."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(args.vocab, (args.batch, args.seq), generator=draw)
    for at in range(1, args.seq):
        follows = torch.rand(args.batch, generator=draw) < 0.9
        tokens[:, at] = torch.where(follows, (3 * tokens[:, at - 1] + 1) % args.vocab, tokens[:, at])
    return tokens


def compared(args: argparse.Namespace, functions: dict[str, Callable[..., Any]], seen: Recording) -> dict[str, Any]:
    """Their run, and ours along the directions that they drew: the largest differences of losses, and of weights at the end."""
    theirs = Theirs(functions, model_of(args), args)
    names = [name for name, p in theirs.model.named_parameters() if p.requires_grad]
    numpy.random.seed(0)
    losses, drawn = [], {}
    for number in range(args.steps):
        seen.drawn = []
        losses.append(theirs.step(batch(args, number)))
        drawn[number] = dict(zip(names, seen.drawn, strict=False))  # the first of four times that they are drawn
    seen.drawn = None
    ends, found = dict(theirs.model.named_parameters()), {}
    for form, own in FORMS.items():
        model, records = model_of(args), list[Record]()
        opt = tare.MeZO(
            model, args.lr, args.eps, weight_decay=args.weight_decay, directions=RecordedDirections(drawn), on_step=records.append,
            **({} if "legacy" in own else {"storage": {"weight": "plain"}}), **own,
        )  # fmt: skip
        for number in range(args.steps):
            tokens = batch(args, number)
            opt.step(lambda model=model, tokens=tokens: causal_loss(model, tokens))
        apart = [
            abs(a - b)
            for record, pair in zip(records, losses, strict=True)
            for a, b in zip(record.losses, pair, strict=True)
        ]
        moved = max(
            float((p.detach().double() - ends[name].detach().double()).abs().max())
            for name, p in model.named_parameters()
        )
        found[form] = {
            "loss_difference": max(apart),
            "first_loss_difference": max(apart[:2]),
            "weight_difference": moved,
        }
        print(
            f"{form:22} losses differ by at most {max(apart):.1e} in {args.steps} steps, weights at the end by {moved:.1e}"
        )
    return {"losses": losses, "ours": found}


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of princeton-nlp/MeZO")
    parser.add_argument("--family", choices=("opt", "llama"), default="opt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=8, help="steps whose losses are compared [8]")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each [7]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for repeating disturbed samples [30]")
    parser.add_argument("--out", default="")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    load, seen = os.getloadavg()[0], Recording()
    functions = published(args.checkout, seen)
    differences = compared(args, functions, seen)

    tokens = batch(args, 0)
    bar = Theirs(functions, model_of(args), args)
    rows = {}
    for form, own in FORMS.items():
        model = model_of(args)
        rows[form] = tare.MeZO(model, args.lr, args.eps, weight_decay=args.weight_decay, **own)
    steps: dict[str, Callable[[], Any]] = {
        form: lambda opt=opt: opt.step(lambda: causal_loss(opt.model, tokens)) for form, opt in rows.items()
    }
    weights = sum(p.numel() * p.element_size() for p in bar.model.parameters())
    largest = max(p.numel() * p.element_size() for p in bar.model.parameters())
    beyond: dict[str, int] = {}
    for form, model, step in (
        ("theirs", bar.model, lambda: bar.step(tokens)),
        *((f, rows[f].model, steps[f]) for f in FORMS),
    ):
        step()
        with StepMeter(model, extra=[tokens]) as meter:
            step()
        beyond[form] = meter.peak - meter.baseline
    with StepMeter(bar.model, extra=[tokens]) as meter, torch.no_grad():
        causal_loss(bar.model, tokens)
    beyond["inference"] = meter.peak - meter.baseline
    waiting = Patience(args.patience, clock(torch.device("cpu")))
    times: dict[str, list[float]] = {form: [] for form in rows}
    ratios: dict[str, list[float]] = {form: [] for form in rows}
    own_times = []
    with no_collector():
        for number in range(args.rounds):
            forms = list(rows)
            for form in forms[number % len(forms) :] + forms[: number % len(forms)]:
                before, own_time, after = waiting.sample(
                    lambda: bar.step(tokens), steps[form], lambda: bar.step(tokens)
                )
                times[form].append(own_time)
                own_times += [before, after]
                ratios[form].append(2 * own_time / (before + after))
    results = []
    for form in rows:
        ratio = spread(ratios[form])
        results.append(
            {
                "name": form,
                "ratio": ratio,
                "ms": spread(times[form]),
                "beyond": beyond[form],
                **differences["ours"][form],
            }
        )
        print(
            f"{form:22} {ratio['median']:.2f} x the published step; beyond the model {beyond[form] / 2**20:.2f} MiB "
            f"(theirs {beyond['theirs'] / 2**20:.2f}, inference {beyond['inference'] / 2**20:.2f})"
        )
    theirs_at = subprocess.run(
        ["git", "-C", str(args.checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    sha, dirty = commit()
    kept = {name: value for name, value in vars(args).items() if name not in ("out", "patience", "checkout")}
    command = " ".join(
        ["python bench/side_by_side.py MeZO", *(f"--{k.replace('_', '-')} {v}" for k, v in kept.items())]
    )
    result = {
        "kind": "bench-side-by-side", "format": 1, "command": command, "theirs": theirs_at, "commit": sha, "changed": dirty,
        "date": time.strftime("%Y-%m-%d"), "device": device(), "torch": torch.__version__, "threads": args.threads, "settings": kept,
        "weights": weights, "largest": largest, "theirs_ms": statistics.median(own_times), "beyond": beyond,
        "losses": differences["losses"], "load_before": load, "disturbed": waiting.to_json(), "results": results,
    }  # fmt: skip
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
