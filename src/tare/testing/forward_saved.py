"""Forward-only methods, saved: resume, distributed checkpoints, the seed log."""

import copy
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tare.core.errors import CheckpointError
from tare.methods.replay import replay
from tare.testing.forward import ForwardSubject, Problem, drive
from tare.testing.resume import through_file
from tare.testing.subject import refuses, same, same_state
from tare.zeroth.log import SeedLog

STOP, MORE = 3, 4


def _put(problem: Problem, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in problem.tensors().items():
            tensor.copy_(weights[name])


def resume_is_bit_exact(subject: ForwardSubject) -> None:
    """Through a file that is loaded safely: the next steps are those of the run that never stopped. Another seed, rate and decay at
    construction on purpose: the saved ones count."""
    for dtype in (torch.float32, torch.bfloat16):
        problem, opt = subject.start(dtype)
        drive(opt, problem, 0, STOP)
        saved = through_file({"weights": problem.snapshot(), "optimizer": opt.state_dict()})
        drive(opt, problem, STOP, STOP + MORE)
        own = {"weight_decay": 0.3} if "weight_decay" in subject.options else {}
        other = subject.problem(dtype)
        _put(other, saved["weights"])
        resumed = subject.build(other.params, lr=1.0, seed=5, **own)
        resumed.load_state_dict(saved["optimizer"])
        drive(resumed, other, STOP, STOP + MORE)
        same(other.snapshot(), problem.snapshot(), f"resumed, {dtype}")
        for (p, entry), (q, _) in zip(opt._entries.items(), resumed._entries.items(), strict=True):
            if p in opt.state:
                same_state(resumed.state[q], opt.state[p], f"{entry.leaf.name} resumed, {dtype}")


def the_source_of_a_load_is_not_shared(subject: ForwardSubject) -> None:
    problem, opt = subject.start()
    other, second = subject.start()
    drive(opt, problem, 0, 2)
    second.load_state_dict(opt.state_dict())
    kept = copy.deepcopy([dict(opt.state[p]) for p in opt._entries if p in opt.state])
    groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in opt.param_groups]
    drive(second, other, 2, 4)
    for state, before in zip((opt.state[p] for p in opt._entries if p in opt.state), kept, strict=True):
        same_state(state, before, "the source of a load")
    for group, was in zip(opt.param_groups, groups, strict=True):
        for name, value in was.items():
            now = group[name]
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value, name


def a_state_that_does_not_fit_is_refused(subject: ForwardSubject) -> None:
    problem, opt = subject.start()
    wrong = opt.state_dict()
    wrong["param_groups"] = [*wrong["param_groups"], {**wrong["param_groups"][0], "params": []}]
    with refuses("load_state_dict", kind=CheckpointError):
        subject.build(problem.params).load_state_dict(wrong)


def distributed_checkpoint(subject: ForwardSubject) -> None:
    """Through torch's distributed state dicts, nested and flat: nothing is disturbed, and the run goes on as before."""
    if subject.problem().module is None:
        return
    for flat in (False, True):
        problem, opt = subject.start()
        other, fresh = subject.start()
        assert problem.module is not None
        assert other.module is not None
        drive(opt, problem, 0, STOP)
        before = problem.snapshot()
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = through_file(get_optimizer_state_dict(problem.module, opt, options=options))
        set_optimizer_state_dict(other.module, fresh, saved, options=options)
        same(problem.snapshot(), before, "weights after saving")
        _put(other, before)
        drive(opt, problem, STOP, STOP + MORE)
        drive(fresh, other, STOP, STOP + MORE)
        same(other.snapshot(), problem.snapshot(), f"continued, {'flat' if flat else 'nested'}")


def a_log_replays_the_run(subject: ForwardSubject) -> None:
    """Onto the base weights, bit for bit, for float32 and bf16 weights."""
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.seeds"
            problem, opt = subject.start(dtype, seed=11)
            base = subject.problem(dtype)
            with SeedLog(path) as log:
                opt.on_step = log
                drive(opt, problem, 0, STOP + MORE)
            found = replay(path, base.module if base.module is not None else dict(base.params))
            assert found.exact, f"the replay is not the trained model, {dtype}"
            same(base.snapshot(), problem.snapshot(), f"replayed, {dtype}")


CHECKS = (
    resume_is_bit_exact, the_source_of_a_load_is_not_shared, a_state_that_does_not_fit_is_refused, distributed_checkpoint,
    a_log_replays_the_run,
)  # fmt: skip
