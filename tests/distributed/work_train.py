"""What the ranks do for `test_train_*`: steps of one run together, beside the same steps of one process."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from tare.core.shard.layout import local
from tare.methods import registry
from tare.parallel import group, wrap
from tare.train import loop, progress, session, spreading, step, workers
from tare.train.config import MethodConfig, RunConfig, TrainConfig
from tare.train.data import PackedDataset
from tare.train.schedule import Schedule
from tare.train.session import Session

DATA = PackedDataset.batch
VOCAB, WIDTH, SEQ = 31, 12, 9  # neither divides by two or three
BATCH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 21, bias=False), nn.Linear(21, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm(x))))


class Model(nn.Module):
    """A language model in fp64 that is called like those of transformers, whose own losses are fp32."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.poison = 0.0

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> Any:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(x)[:, :-1]
        return SimpleNamespace(loss=F.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1)) + self.poison)


class Sequences:
    """Sequence i is a function of i alone."""

    def batch(self, position: int, count: int) -> Tensor:
        made = [
            torch.randint(VOCAB, (SEQ,), generator=torch.Generator().manual_seed(i))
            for i in range(position, position + count)
        ]
        return torch.stack(made)


def build(config: RunConfig, crew: group.Crew, options: dict[str, Any], tied: bool = False) -> Session:
    """A session around the fp64 model, as `session.build` makes one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(tied).double()
    spread = spreading.before(config, model, crew, torch.device("cpu"))
    method = config.method
    optimizer = registry.build(method.key, model, lr=1e-2, release=method.release, seed=3, **options)
    if method.release:
        optimizer.clip_release(config.train.clip, "two-pass", strict="leaf")
    workers.attach(crew, config, optimizer)
    job = Session(
        config, torch.device("cpu"), model, None, Sequences(), optimizer, Schedule.of(config.train), [1e-2], {}, None, crew, spread
    )  # fmt: skip
    spreading.after(job)
    return job


def settings(method: str, parallel: str | None, **changes: Any) -> RunConfig:
    release = changes.pop("release", False)
    train = TrainConfig(steps=8, batch=BATCH, warmup=0, parallel=parallel, **changes)  # type: ignore[arg-type]
    return RunConfig(method=MethodConfig(method, release=release), train=train)


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if type(p).__name__ == "DTensor" else p  # type: ignore[attr-defined]


def beside(
    rank: int,
    size: int,
    parallel: str,
    method: str,
    options: dict[str, Any],
    steps: int = 4,
    tied: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """How far steps together are from steps alone, in weights, losses and norms. The batch divides by two, three and four."""
    alone = build(settings(method, None, **{**changes, "shards": None, "sync": None}), group.Crew(), options, tied)
    with group.join() as crew:
        job = build(settings(method, parallel, **changes), crew, options, tied)
        far = {"loss": 0.0, "norm": 0.0, "weight": 0.0}
        each = BATCH * changes.get("accumulate", 1)
        for number in range(steps):
            mine, theirs = (step.take_step(one, number * each) for one in (job, alone))
            assert not mine.problem, mine.problem
            assert mine.tokens == theirs.tokens == each * SEQ
            far["loss"] = max(far["loss"], abs(mine.loss - theirs.loss))
            if theirs.grad_norm is not None:
                assert mine.grad_norm is not None
                far["norm"] = max(far["norm"], abs(mine.grad_norm - theirs.grad_norm))
        start = build(settings(method, None), group.Crew(), options, tied).model
        with torch.no_grad():
            for p, other in zip(job.model.parameters(), alone.model.parameters(), strict=True):
                far["weight"] = max(far["weight"], float((whole(p) - other).abs().max()))
            moved = max(
                float((a - b).abs().max()) for a, b in zip(alone.model.parameters(), start.parameters(), strict=True)
            )
        return {
            **far,
            "moved": moved,
            "form": job.spread.form,
            "rows": int(local(job.model.embed_tokens.weight).shape[0]),
        }


def one_bad(
    rank: int, size: int, parallel: str, where: str, who: int, method: str = "adamw", options: dict[str, Any] | None = None,
    micro: int = 1, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A value that is not finite on one rank: in its loss, or in its gradient alone. Steps 0 and 2 are good, step 1 is not.

    micro: the micro-batch that is bad.
    """
    with group.join() as crew:
        job = build(settings(method, parallel, **changes), crew, options or {})
        alone = build(settings(method, None, **{**changes, "sync": None, "shards": None}), group.Crew(), options or {})
        found, each = [], BATCH * changes.get("accumulate", 1)
        for number in range(3):
            seen, handle = [0], None

            def spoil(module: nn.Module, args: Any, out: Any = None, seen: list[int] = seen) -> Any:
                seen[0] += 1
                if where == "loss":
                    job.model.poison = math.inf if seen[0] == micro else 0.0
                elif seen[0] == micro:
                    out.register_hook(lambda grad: grad * math.nan)

            if number == 1 and rank == who and where == "loss":
                handle = job.model.register_forward_pre_hook(spoil)
            elif number == 1 and rank == who:
                handle = job.model.layers[0].up_proj.register_forward_hook(spoil)
            found.append(step.take_step(job, each * number))
            job.model.poison = 0.0
            if handle is not None:
                handle.remove()
            if number != 1:
                step.take_step(alone, each * number)
        with torch.no_grad():
            both = zip(job.model.parameters(), alone.model.parameters(), strict=True)
            far = max(float((whole(p) - other).abs().max()) for p, other in both)
        return {"problems": [each.problem for each in found], "far": far}


def apart_in_pieces(rank: int, size: int) -> Any:
    """The same of HSDP, two copies of weights that are cut in two: what rank 3 has is compared with what rank 1 has."""
    with group.join() as crew:
        job = build(settings("adamw", "hsdp", shards=2), crew, {})
        before = wrap.differing(job.model, crew, 2)
        if rank == 3:
            with torch.no_grad():
                local(job.model.layers[1].down_proj.bias)[-1] += 1e-12
        return before, wrap.differing(job.model, crew, 2)


def apart(rank: int, size: int) -> Any:
    """Whether weights that differ on one rank are noticed, and where."""
    with group.join() as crew:
        model = Model().double()
        with torch.no_grad():
            for p in model.parameters():
                dist.broadcast(p, 0)
        before = wrap.differing(model, crew)
        if rank == 1:
            with torch.no_grad():
                model.layers[1].down_proj.bias[3] += 1e-12
        return before, wrap.differing(model, crew)


def dealt(rank: int, size: int, items: int, in_step: bool) -> list[tuple[int, bool]]:
    with group.join() as crew:
        return [(item, counts) for _, item, counts in crew.dealt(range(items), in_step)]


def other_data(spoilt: range, gone: range) -> Any:
    """Batches in which the sequences `spoilt` are one rare token over and over, and those of `gone` have been taken out."""

    def batch(self: PackedDataset, position: int, count: int) -> Tensor:
        found = DATA(self, position + (len(gone) if gone and position >= gone.start else 0), count)
        return torch.full_like(found, 7) if position in spoilt else found

    return batch


def trained(
    rank: int, size: int, job: RunConfig, out: str, stop_at: int | None = None, stops: int = 0, spoilt: range = range(0),
    gone: range = range(0),
) -> dict[str, Any]:  # fmt: skip
    """A whole run. stop_at: the step after which rank `stops` is asked to stop, as by SIGTERM. spoilt, gone: see `other_data`."""
    import os
    import signal

    PackedDataset.batch = other_data(spoilt, gone)  # type: ignore[method-assign]

    heard: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, progress.Note | progress.Warned):
            heard.append(event.text)

    if stop_at is not None and rank == stops:
        real, seen = step.take_step, [0]

        def counted(*given: Any) -> Any:
            seen[0] += 1
            if seen[0] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*given)

        from tare.train import trainer

        trainer.take_step = counted  # type: ignore[assignment]
    job = replace(job, run=replace(job.run, out=out))
    try:
        done = loop.train(job, on_event=listen)
    except Exception as fault:
        return {"kind": type(fault).__name__, "text": str(fault)}
    finally:
        from tare.train import trainer

        trainer.take_step = step.take_step
        PackedDataset.batch = DATA  # type: ignore[method-assign]
    found = {"loss": done.loss, "interrupted": done.interrupted, "steps": done.steps, "heard": heard}
    return {**found, "measured": done.measured, "predicted": done.predicted, "scores": done.scores}


def session_of(rank: int, size: int, job: RunConfig) -> str:
    """Which form a configuration comes to."""
    with group.join() as crew:
        made = session.build(job, {}, None, None, crew)
        return made.spread.form


def saved(folder: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model" / "model.safetensors")


class Masked(Sequences):
    """The first three rows are long, and all others short."""

    def batch(self, position: int, count: int) -> Any:
        ids = super().batch(position, count)
        counts = torch.tensor([float(7 if number < 3 else 2) for number in range(position, position + count)])
        return SimpleNamespace(
            ids=ids, counts=counts, only_gold=True, tokens=ids.numel(), to=lambda device: self.batch(position, count)
        )


class Task:
    """As `TaskData` for answers alone: the loss is a mean over all tokens that count."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for ids, count in zip(batch.ids, batch.counts, strict=True):
            kept = int(count) + 1
            total = total + model(input_ids=ids[None, :kept], labels=ids[None, :kept]).loss * float(count)
        return total / batch.counts.sum()


def uneven(rank: int, size: int) -> dict[str, float]:
    """Gradients of a token-weighted loss, beside those of one process; and what plain means would have given."""
    with group.join() as crew:
        found = []
        for one in (crew, group.Crew()):
            job = build(settings("adamw", "ddp" if one is crew else None), one, {"eps": 1.0})
            job.task, job.order = Task(), Masked()  # type: ignore[assignment]
            outcome = step.take_step(job, 0)
            found.append([*[whole(p).detach().clone() for p in job.model.parameters()], torch.tensor(outcome.loss)])
        with torch.no_grad():
            local_loss = float(
                Task().loss(build(settings("adamw", None), group.Crew(), {}).model, Masked().batch(3 * rank, 3))
            )
        plain = crew.sums(local_loss / size)[0]
        far = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
        return {"far": far, "unweighted": abs(plain - float(found[1][-1]))}


def traffic(rank: int, size: int, parallel: str, accumulate: int, **more: Any) -> dict[str, Any]:
    """Bytes handed to collectives in a step, and what `Spread.traffic` says."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            for what, at in (("c10d.allreduce_.", 0), ("_allgather_base_", 1), ("reduce_scatter_base_", 1)):
                if what in name:
                    given = args[at][0] if isinstance(args[at], list | tuple) else args[at]
                    if given.numel() * given.element_size() > 128:  # not the norms of leaves
                        key = {
                            "c10d.allreduce_.": "reduced",
                            "_allgather_base_": "gathered",
                            "reduce_scatter_base_": "scattered",
                        }[what]
                        self.found[key] = self.found.get(key, 0) + given.numel() * given.element_size()
            return func(*args, **(kwargs or {}))

    with group.join() as crew:
        job = build(settings("adamw", parallel, accumulate=accumulate, **more), crew, {})
        step.take_step(job, 0)
        with Counting() as counting:
            step.take_step(job, BATCH * accumulate)
        return {"counted": counting.found, "formula": job.spread.traffic(accumulate)}
