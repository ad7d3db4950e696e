"""What the ranks do for the tests of sampled communication hooks: gradients that are given, not computed, through a real DDP."""

import contextlib
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from tare.core.errors import CheckpointError, InputError
from tare.core.random import make_key, normal
from tare.parallel import hooks
from tare.testing.subject import Net, loss_of

SHAPES = {"big": (37, 11), "odd": (101,), "cube": (3, 5, 7), "one": (1,), "small": (4,)}


class Given(nn.Module):
    """Parameters whose gradients are exactly the tensors that forward is given."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return torch.stack([(getattr(self, name) * g).sum() for name, g in wanted.items()]).sum()


def gradients(
    rank: int, step: int, dtype: torch.dtype = torch.float64, whole_numbers: bool = False
) -> dict[str, Tensor]:
    found = {name: normal(make_key(5, name, 100 * rank + step), shape).to(dtype) for name, shape in SHAPES.items()}
    return {name: (g * 16).round() for name, g in found.items()} if whole_numbers else found


def make(kind: str, **options: Any) -> hooks.Hook:
    return {"randk": hooks.RandK, "topk": hooks.TopK, "whole": hooks.Whole, "powersgd": hooks.PowerSGD}[kind](**options)


def wrap(
    kind: str, dtype: torch.dtype = torch.float64, bucket: float = 0.0005, **options: Any
) -> tuple[Any, hooks.Hook]:
    ddp = DistributedDataParallel(Given(dtype), bucket_cap_mb=bucket)
    return ddp, make(kind, **options).attach(ddp)


def backward(ddp: Any, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    ddp.zero_grad()
    ddp(wanted).backward()
    return {name: p.grad.clone() for name, p in ddp.module.named_parameters()}


def plain(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: t.detach().double().numpy() for name, t in tensors.items()}


def errors(hook: Any) -> dict[str, Tensor]:
    return {} if hook.feedback is None else {name: e.clone() for name, e in hook.feedback.errors.items()}


def run(
    rank: int, size: int, kind: str, steps: int, whole_numbers: bool = False, dtype: str = "float64", **options: Any
) -> Any:
    """Gradients after each step, errors at the end, and bytes of the last step."""
    kinds = getattr(torch, dtype)
    ddp, hook = wrap(kind, kinds, **options)
    seen = [plain(backward(ddp, gradients(rank, step, kinds, whole_numbers))) for step in range(steps)]
    return seen, plain(errors(hook)), (hook.last.sent, hook.last.whole, hook.last.calls, hook.bytes_sent, hook.steps)


def against_no_hook(rank: int, size: int, kind: str, **options: Any) -> bool:
    """Whether a real net in fp32 has the same gradients, bit for bit, as without a hook, in small buckets."""
    found = []
    for hook in (None, make(kind, **options)):
        ddp = DistributedDataParallel(Net(), bucket_cap_mb=0.0005)
        if hook is not None:
            hook.attach(ddp)
        grads = []
        for step in range(3):
            ddp.zero_grad()
            loss_of(ddp, 2 * step + rank).backward()
            grads += [p.grad.clone() for p in ddp.parameters()]
        found.append(grads)
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def resumed(rank: int, size: int, kind: str, how: str, **options: Any) -> dict[str, Any]:
    """Six steps at a stretch, and three and three with a state between them that went through a file."""
    ddp, hook = wrap(kind, torch.float32, **options)
    first = [backward(ddp, gradients(rank, step, torch.float32)) for step in range(6)][-1]
    ddp, half = wrap(kind, torch.float32, **options)
    for step in range(3):
        backward(ddp, gradients(rank, step, torch.float32))
    state = half.state_dict() if how == "own" else half.gather_state()
    if how == "gathered":
        box = [state]
        dist.broadcast_object_list(box, 0)
        state = box[0]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    ddp, again = wrap(kind, torch.float32, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    second = [backward(ddp, gradients(rank, step, torch.float32)) for step in range(3, 6)][-1]
    same = all(torch.equal(a, second[name]) for name, a in first.items())
    kept = all(torch.equal(e, errors(again)[name]) for name, e in errors(hook).items())
    return {"gradients": same, "errors": kept, "steps": again.steps, "sent": again.bytes_sent == hook.bytes_sent,
            "some": len(errors(again))}  # fmt: skip


def other_size(rank: int, size: int, kind: str) -> bool:
    """A state of three ranks on two: each takes the mean of what was kept."""
    ddp, hook = wrap(kind, fraction=0.1, min_compressed=0)
    backward(ddp, gradients(rank, 0))
    state = hook.gather_state()
    box = [state]
    dist.broadcast_object_list(box, 0)
    state = box[0]
    rows = {name: torch.cat([value, 2 * value[:1]]) for name, value in state.items() if name.startswith("error.")}
    hook.load_state_dict({**state, **rows})
    return all(torch.equal(errors(hook)[name.removeprefix("error.")], value.mean(0)) for name, value in rows.items())


def spoilt(rank: int, size: int, kind: str, dtype: str, value: float, **options: Any) -> dict[str, Any]:
    """One number of one leaf on rank 1 is not finite at step 2."""
    kinds = getattr(torch, dtype)
    ddp, hook = wrap(kind, kinds, **options)
    for step in range(2):
        backward(ddp, gradients(rank, step, kinds))
    before = errors(hook)
    wanted = gradients(rank, 2, kinds)
    if rank == 1:
        wanted["big"].view(-1)[hidden(hook)] = value
    bad = backward(ddp, wanted)
    after = errors(hook)
    good = backward(ddp, gradients(rank, 3, kinds))
    return {
        "seen": not bool(bad["big"].isfinite().all()),
        "others": all(bool(g.isfinite().all()) for name, g in bad.items() if name != "big"),
        "kept": all(torch.equal(before[name], after[name]) for name in before if name == "big"),
        "moved": all(not torch.equal(before[name], after[name]) for name in before if name == "odd"),
        "recovered": all(bool(g.isfinite().all()) for g in good.values()),
    }


def hidden(hook: Any) -> int:
    """An element of `big` that Rand-k does not look at in this step."""
    if hook.kind != "randk":
        return 0
    numel = torch.Size(SHAPES["big"]).numel()
    looked = hooks.randk.places(make_key(hook.seed, "big/randk", hook.steps), numel, hook.count(numel))[0].tolist()
    return next(i for i in range(numel) if i not in looked)


def counted(rank: int, size: int, kind: str, **options: Any) -> dict[str, Any]:
    """The traffic of one step by the hook's own count, by the mode of torch, and by the tensors that reach torch.distributed."""
    ddp, hook = wrap(kind, torch.float32, **options)
    for step in range(2):  # in the second one DDP tells all ranks how it forms its buckets anew
        backward(ddp, gradients(rank, step, torch.float32))
    ring = {
        "all_reduce": lambda t: 2 * (size - 1) * t.nbytes // size,
        "all_gather_into_tensor": lambda t: (size - 1) * t.nbytes,
    }
    sent = []
    with contextlib.ExitStack() as stack:
        for name, of in ring.items():
            real = getattr(dist, name)

            def call(*args: Any, real: Any = real, of: Any = of, **keys: Any) -> Any:
                sent.append(of(args[-1]))
                return real(*args, **keys)

            setattr(dist, name, call)
            stack.callback(setattr, dist, name, real)
        mode = stack.enter_context(CommDebugMode())
        backward(ddp, gradients(rank, 2, torch.float32))
    return {"mode": mode.get_total_counts(), "calls": hook.last.calls, "seen": sum(sent), "sent": hook.last.sent,
            "times": len(sent), "whole": hook.last.whole, "total": hook.bytes_sent, "report": hook.report()}  # fmt: skip


def accumulated(rank: int, size: int, kind: str) -> Any:
    """Two micro-batches, the first inside no_sync; the steps that the hook saw, and the gradients."""
    ddp, hook = wrap(kind, fraction=0.1, min_compressed=0)
    ddp.zero_grad()
    with ddp.no_sync():
        ddp(gradients(rank, 0)).backward()
    ddp(gradients(rank, 1)).backward()
    one, other = wrap(kind, fraction=0.1, min_compressed=0)
    both = {name: g + gradients(rank, 1)[name] for name, g in gradients(rank, 0).items()}
    wanted = backward(one, both)
    same = all(torch.allclose(p.grad, wanted[name], rtol=0, atol=1e-15) for name, p in ddp.module.named_parameters())
    return hook.steps, other.steps, same


def registered_by_hand(rank: int, size: int) -> bool:
    """torch's own call, with the hook as the state."""
    ddp = DistributedDataParallel(Given())
    hook = hooks.RandK(0.1, min_compressed=0).name_leaves(ddp)
    ddp.register_comm_hook(hook, hooks.compress)
    other, _ = wrap("randk", fraction=0.1, min_compressed=0)
    a, b = (backward(model, gradients(rank, 0)) for model in (ddp, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def refused(rank: int, size: int) -> list[str]:
    """What is said to bad use, on every rank."""
    said = []

    def told(act: Any) -> None:
        try:
            act()
        except (InputError, CheckpointError) as fault:
            said.append(str(fault))

    ddp, hook = wrap("randk", fraction=0.1)
    told(lambda: hooks.TopK(0.1).attach(ddp))
    told(lambda: hooks.RandK(0.1).attach(Given()))
    unnamed = DistributedDataParallel(Given())
    unnamed.register_comm_hook(hooks.RandK(0.1), hooks.compress)
    told(lambda: unnamed(gradients(rank, 0)).backward())
    told(lambda: hook.load_state_dict({"hook": "topk", "steps": 0}))
    state = {"hook": "randk", "steps": 0, "sent": 0, "whole": 0, "calls": 0}
    told(lambda: hook.load_state_dict({**state, "error.gone": torch.zeros(3)}))
    told(lambda: hook.load_state_dict({**state, "error.big": torch.zeros(3)}))
    return said
