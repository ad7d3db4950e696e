"""Make the golden checkpoints of a release: `python tests/golden/make_checkpoints.py`, once, right before the version is tagged.

Writes `checkpoints/VERSION/CASE/`: a checkpoint of a tiny model after 3 steps, and what 3 more come to. It never changes what is there:
later versions must load and continue the folders of every version (`tests/train/test_golden_checkpoints.py`).
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tare
from tare.methods import registry
from tare.train import checkpoint, convert
from tare.train.config import MethodConfig, RunConfig
from tare.train.seeds import arithmetic, random_state
from tare.train.trainer import Counters
from tare.zeroth.log import SeedLog

PLACE = Path(__file__).parent / "checkpoints"
BEFORE, AFTER = 3, 3  # steps until the checkpoint, and from there to the end
SHAPES = (6, 10, 3)

# name -> method, options. Int8 state, a subspace (its basis is computed anew in step 5), forward passes only with a seed log.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw-int8": ("adamw", {"lr": 0.05, "storage": tare.Storage(moment="int8", block=32, min_quantized=1)}),
    "galore": ("galore", {"lr": 0.05, "rank": 2, "period": 4}),
    "mezo": ("mezo", {"lr": 0.02}),
}


def model() -> nn.Sequential:
    """Two layers, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(SHAPES[0], SHAPES[1]), nn.Tanh(), nn.Linear(SHAPES[1], SHAPES[2]))


def step(net: nn.Module, optimizer: Any, batch: Tensor) -> None:
    """One step on a batch [8, 6]."""
    if isinstance(optimizer, tare.zeroth.optimizer.ForwardOptimizer):
        optimizer.step(lambda: net(batch).square().mean())
        return
    net(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Copies of the weights, named."""
    return {f"{prefix}{name}": p.detach().clone() for name, p in net.named_parameters()}


def make(folder: Path, key: str, options: dict[str, Any]) -> None:
    """One case."""
    folder.mkdir(parents=True)
    batches = [torch.randn(8, SHAPES[0], generator=torch.Generator().manual_seed(n)) for n in range(BEFORE + AFTER)]
    net = model()
    kept = {f"batch.{n}": batch for n, batch in enumerate(batches)} | weights(net, "base.")
    optimizer = registry.build(key, net, **options)
    forward = registry.card(key).kind == "forward"
    if forward:
        optimizer.on_step = SeedLog(folder / "run.seeds")  # type: ignore[attr-defined]
    for batch in batches[:BEFORE]:
        step(net, optimizer, batch)
    config = RunConfig(method=MethodConfig(key, lr=options["lr"]))
    trainer = {
        "counters": asdict(Counters(step=BEFORE)),
        "config": asdict(config),
        "arithmetic": arithmetic(torch.device("cpu")),
        "scheduler": {"step": BEFORE},
        "workers": 1,
        "tokenizer": "x",
        "data": "x",
        **({"random": random_state()} if forward else {}),  # 30 kB
    }
    facts = {"tare": tare.__version__, "method": key, "eval_loss": None, "world_size": 1}
    checkpoint.save(
        folder / "single", BEFORE, weights=checkpoint.weights_of(net), optimizer=optimizer.state_dict(), trainer=trainer, facts=facts
    )  # fmt: skip
    if not forward:
        convert.convert(folder / "single", "sharded", folder / "sharded", ranks=2)
    else:
        optimizer.on_step.close()  # type: ignore[attr-defined]
    for batch in batches[BEFORE:]:
        optimizer.on_step = None if forward else getattr(optimizer, "on_step", None)  # type: ignore[attr-defined]
        step(net, optimizer, batch)
    save_file(kept | weights(net, "end."), folder / "continuation.safetensors")


def main() -> None:
    """All cases of this version."""
    place = PLACE / tare.__version__
    if place.exists():
        sys.exit(f"{place} is there already; what a version wrote is never changed (delete it only before its release)")
    torch.set_num_threads(1)
    try:
        for name, (key, options) in CASES.items():
            make(place / name, key, options)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    print(place)


if __name__ == "__main__":
    main()
