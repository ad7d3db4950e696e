"""What the tests of runs share: a small corpus, small configurations, and real processes that run them and can be killed."""

import functools
import hashlib
import json
import os
import resource
import signal
import sysconfig
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from processes import CONTEXT
from safetensors.torch import load_file

from tare.train import checkpoint, loop, progress
from tare.train.cache import write_atomic
from tare.train.config import DataConfig, MethodConfig, ModelConfig, RunConfig, RunSection, TrainConfig


@functools.cache
def corpus() -> str:
    """A file of real text (four modules of the standard library), in the cache folder of the tests."""
    path = Path(os.environ["TARE_CACHE"]) / "text" / "corpus.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        base = Path(sysconfig.get_path("stdlib"))
        texts = [(base / name).read_text("utf-8") for name in ("argparse.py", "typing.py", "inspect.py", "tarfile.py")]
        pieces = [text[at : at + 1500] for text in texts for at in range(0, len(text), 1500)]
        write_atomic(path, "".join(json.dumps({"text": piece}) + "\n" for piece in pieces).encode())
    return str(path)


@functools.cache
def model() -> str:
    """A folder with the config of a LLaMA of 130 thousand parameters: large enough for every rule, quick to save."""
    from transformers import LlamaConfig

    path = Path(os.environ["TARE_CACHE"]) / "tiny-model"
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(**shape, vocab_size=300, max_position_embeddings=64).to_json_string()
    write_atomic(path / "config.json", text.encode())  # whole, for another test process that shares the cache
    return str(path)


def config(out: Path, method: str = "adamw", **changes: Any) -> RunConfig:
    """A run of a second: a tiny LLaMA, short sequences. `changes`: `steps=3`, `keep=2`, ... whatever section they are in."""
    base = RunConfig(
        ModelConfig(model()),
        DataConfig(corpus(), seq=32, eval_tokens=512, eval_fraction=0.1),
        MethodConfig(method),
        TrainConfig(steps=10, batch=2),
        RunSection(str(out), device="cpu", threads=1, checkpoint_every=3, eval_every=4),
    )
    for name, value in changes.items():
        owner = next(part for part in ("data", "train", "run", "method", "model") if hasattr(getattr(base, part), name))
        base = replace(base, **{owner: replace(getattr(base, owner), **{name: value})})
    return base


def child(job: RunConfig, env: dict[str, str], limit: int | None, slow: float, begun: Any) -> None:
    """Runs in a process of its own. limit: largest file it may write; slow: seconds added to every step; begun: set before the first."""
    os.environ.update(env)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def heard(event: progress.Event) -> None:
        if isinstance(event, progress.Started):
            begun.set()
        time.sleep(slow)

    result = loop.train(job, on_event=heard)
    raise SystemExit(75 if result.interrupted else 0)


def start(job: RunConfig, fail_at: str = "", limit: int | None = None, slow: float = 0.0) -> Any:
    """Start a run in a process of its own."""
    begun = CONTEXT.Event()
    process = CONTEXT.Process(target=child, args=(job, {"TARE_FAIL_AT": fail_at}, limit, slow, begun))
    process.start()
    process.begun = begun  # type: ignore[attr-defined]
    return process


def finish(job: RunConfig, **how: Any) -> int:
    """Run to the end in a process of its own; its exit code, negative if killed."""
    process = start(job, **how)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return int(process.exitcode)


def kill_after(process: Any, seconds: float, begun: bool = False) -> bool:
    """SIGKILL after a while, counted from its first step if `begun`; whether it was still running."""
    until = time.monotonic() + 120
    while begun and process.exitcode is None and not process.begun.wait(0.05):
        assert time.monotonic() < until, "the run never steps"
    process.join(seconds)
    alive = process.exitcode is None
    process.kill()
    process.join(60)
    return alive


def fingerprint(out: Path) -> str:
    """A hash of the final weights, bit for bit, and of the last checkpoint's optimizer state."""
    digest = hashlib.sha256()
    _, last = checkpoint.found(out / "checkpoints")[0]
    for file in (out / "model" / "model.safetensors", last / "weights.safetensors", last / "optimizer.safetensors"):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Until something is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.01)


def send(process: Any, number: int, after: float = 0.0) -> None:
    """A signal to a child, now or in a while."""
    timer = threading.Timer(after, lambda: os.kill(process.pid, number))
    timer.start()
    timer.join()
