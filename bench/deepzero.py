"""DeepZero from scratch on images: accuracy over evaluations, and what reused features and coordinates side by side save.

    python bench/deepzero.py --data FOLDER [--steps 200] [--width 4] [--sparsity 0.9] [--out bench/results/deepzero.json]

FOLDER holds train and test as .npz or .npz.xz with arrays of images and labels; images may be files of any kind that Pillow reads, one
after another, with `offsets` of their beginnings and the end. A small convolutional net (two strided convolutions and a
linear layer, tanh) is trained on batches drawn from a seed; beside it, from the same start, with momentum SGD on gradients. Timed are steps
of each way to evaluate the same coordinates: the whole model one coordinate at a time, from the perturbed layer on, and side by side.
"""

import argparse
import io
import itertools
import json
import lzma
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tare.methods.deepzero import DeepZero
from tare.report.provenance import commit, device
from tare.zeroth.members import Members

WAYS: dict[str, dict[str, Any]] = {
    "whole, one at a time": {"reuse": False}, "from the layer on, one at a time": {}, "from the layer on, side by side": {"together": 64},
}  # fmt: skip


def load(folder: Path, part: str, rows: int = 0) -> tuple[Tensor, Tensor]:
    """Images [n, channels, height, width] in -1 .. 1, and labels [n]; the first `rows` of them, 0: all."""
    packed, plain = folder / f"{part}.npz.xz", folder / f"{part}.npz"
    if not packed.exists() and not plain.exists():
        raise SystemExit(f"--data: {folder} holds neither {plain.name} nor {packed.name}")
    data = lzma.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    arrays = dict(numpy.load(io.BytesIO(data)).items())
    if "offsets" in arrays:
        arrays = {"images": pictures(arrays, rows), "labels": arrays["labels"]}
    arrays = {name: array[:rows] if rows else array for name, array in arrays.items()}
    images = next((a for a in arrays.values() if a.ndim in (3, 4)), None)
    labels = next((a for a in arrays.values() if a.ndim == 1 and images is not None and len(a) == len(images)), None)
    if images is None or labels is None:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise SystemExit(
            f"--data: expected images [n, height, width(, channels)] and labels [n] in {part}, got {shapes}"
        )
    x = torch.from_numpy(images).float() / 127.5 - 1.0
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2) if x.shape[-1] in (1, 3) else x
    return x.contiguous(), torch.from_numpy(labels.astype("int64"))


def pictures(arrays: dict[str, Any], rows: int) -> Any:
    """Packed image files as one array [n, height, width, channels]."""
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("--data: the images are packed files; install pillow to read them") from None
    (packed,) = (a for name, a in arrays.items() if a.dtype == numpy.uint8 and a.ndim == 1 and name != "labels")
    bounds = arrays["offsets"][: rows + 1] if rows else arrays["offsets"]
    files = (packed[a:b].tobytes() for a, b in itertools.pairwise(bounds.tolist()))
    return numpy.stack([numpy.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def net_of(x: Tensor, classes: int, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    channels, side = x.shape[1], x.shape[-1]
    body = [
        nn.Conv2d(channels, width, 5, stride=3), nn.Tanh(), nn.Conv2d(width, 2 * width, 3, stride=2), nn.Tanh(), nn.Flatten(),
    ]  # fmt: skip
    features = nn.Sequential(*body)(torch.zeros(1, channels, side, side)).shape[1]
    return nn.Sequential(*body, nn.Linear(features, classes))


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True)) / len(
            y
        )


class Batches:
    """Batch number t: rows drawn from a seed."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int):
        self.x, self.y, self.size, self.seed = x, y, size, seed

    def __call__(self, t: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(
            len(self.y), (self.size,), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + t)
        )
        return self.x[rows], self.y[rows]


def closure_for(net: nn.Module, x: Tensor, y: Tensor, told: bool) -> Callable[..., Tensor]:
    """The loss in float64, so that small differences of it are seen; told: of several members at once."""

    def of_members(members: Members) -> Tensor:
        rows = nn.functional.cross_entropy(net(members.repeat(x)).double(), members.repeat(y), reduction="none")
        return members.mean(rows)

    return of_members if told else lambda: nn.functional.cross_entropy(net(x).double(), y)


def rate(step: int, steps: int, lr: float) -> float:
    """Linear warm-up over 6 % of the steps, then cosine."""
    warm = max(1, round(0.06 * steps))
    rest = torch.tensor(torch.pi * (step - warm) / max(1, steps - warm)).cos().item()
    return lr * (step + 1) / warm if step < warm else lr * 0.5 * (1.0 + rest)


def train(args: argparse.Namespace, data: dict[str, Any], gradient: bool) -> dict[str, Any]:
    net = net_of(data["x"], data["classes"], args.width, args.seed).to(args.device)
    batches = Batches(data["x"], data["y"], args.batch, args.seed)
    opt: torch.optim.Optimizer
    if gradient:
        opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    else:
        opt = DeepZero(net, args.lr, sparsity=args.sparsity, q=args.q, mask_every=args.mask_every, seed=args.seed)
        opt.score(closure_for(net, *(t.to(args.device) for t in batches(-1)), told=False))
    begun, curve = time.perf_counter(), []
    for step in range(args.steps):
        x, y = (t.to(args.device) for t in batches(step))
        opt.param_groups[0]["lr"] = rate(step, args.steps, args.lr)
        if gradient:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            value = loss.item()
        else:
            value = opt.step(closure_for(net, x, y, told=True))
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            found = accuracy(net, data["test_x"], data["test_y"])
            curve.append({"step": step + 1, "loss": value, "accuracy": found})
            print(
                f"  {'gradients' if gradient else 'deepzero '} step {step + 1:5}  loss {value:.4f}  test accuracy {found:.2%}"
            )
    result = {
        "curve": curve,
        "seconds": time.perf_counter() - begun,
        "weights": sum(p.numel() for p in net.parameters()),
    }
    if isinstance(opt, DeepZero):
        result |= {"evaluations": opt.evaluated, "evaluations_a_step": opt.probe.evaluations, "ratios": opt.ratios()}
    return result


def timed(args: argparse.Namespace, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of a step, interleaved; and that all ways see the same losses."""
    x, y = (t.to(args.device) for t in Batches(data["x"], data["y"], args.batch, args.seed)(0))
    made = []
    for name, own in WAYS.items():
        net, records = net_of(data["x"], data["classes"], args.width, args.seed).to(args.device), []
        opt = DeepZero(
            net, 0.0, sparsity=args.sparsity, ratios="uniform", weight_decay=0.0, on_step=records.append, **own
        )
        made.append((name, opt, closure_for(net, x, y, "together" in own), records, []))
    for number in range(args.rounds + 1):  # the first one warms up
        for _, opt, closure, _, seconds in made:
            begun = time.perf_counter()
            opt.step(closure)
            if number:
                seconds.append(time.perf_counter() - begun)
    first = torch.tensor(made[0][3][-1].losses, dtype=torch.float64)
    found = []
    for name, opt, _, records, seconds in made:
        apart = (torch.tensor(records[-1].losses, dtype=torch.float64) - first).abs().max() / first.abs().max()
        middle = sorted(seconds)[len(seconds) // 2]
        found.append(
            {
                "name": name,
                "seconds": seconds,
                "median": middle,
                "loss_difference": float(apart),
                "together": opt.together,
            }
        )
        print(f"  {name:36} {middle:8.4f} s a step; losses agree to {float(apart):.1e}")
    return found


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test as .npz or .npz.xz")
    parser.add_argument("--rows", type=int, default=0, help="images of train, and a fifth as many of test [0: all]")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=4, help="channels of the first convolution [4]")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--mask-every", type=int, default=50)
    parser.add_argument("--q", type=int, default=192)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between tests [50]")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way [5]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    (x, y), (test_x, test_y) = load(args.data, "train", args.rows), load(args.data, "test", args.rows // 5)
    data = {
        "x": x, "y": y, "test_x": test_x.to(args.device), "test_y": test_y.to(args.device), "classes": int(y.max()) + 1,
    }  # fmt: skip
    load_before = os.getloadavg()[0]
    ways = timed(args, data)
    forward, gradients = train(args, data, False), train(args, data, True)
    sha, dirty = commit()
    kept = {name: value for name, value in vars(args).items() if name not in ("out", "data")}
    result = {
        "kind": "bench-deepzero", "format": 1, "settings": kept, "data": args.data.name, "commit": sha, "changed": dirty,
        "date": time.strftime("%Y-%m-%d"), "device": device(), "torch": torch.__version__, "load_before": load_before, "ways": ways,
        "deepzero": forward, "gradients": gradients,
    }  # fmt: skip
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
