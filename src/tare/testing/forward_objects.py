"""Forward-only methods as objects: bytes, words, copies, groups that come later."""

import copy
import io
import pickle

import torch
from torch import Tensor, nn

from tare.testing.forward import ForwardSubject, drive
from tare.testing.resume import only_plain
from tare.testing.subject import same
from tare.zeroth.probes import Term


def state_bytes_are_those_allocated(subject: ForwardSubject) -> None:
    """Before and after steps; names do not depend on steps; tensors and ints only."""
    for dtype in (torch.float32, torch.bfloat16):
        problem, opt = subject.start(dtype)
        names = {entry.leaf.name: sorted(opt.state[p]) for p, entry in opt._entries.items() if p in opt.state}
        drive(opt, problem, 0, 3)
        held = [value for state in opt.state.values() for value in state.values()]
        assert all(type(value) in (int, Tensor) for value in held), "state is tensors and ints"
        assert sum(v.numel() * v.element_size() for v in held if isinstance(v, Tensor)) == opt.state_bytes().total
        for p, entry in opt._entries.items():
            if entry.leaf.name in names:
                assert sorted(opt.state[p]) == names[entry.leaf.name], (
                    f"{entry.leaf.name}: names changed with the first step"
                )
        only_plain(opt.state_dict()["param_groups"])


def explains_itself(subject: ForwardSubject) -> None:
    """Law, probe, evaluations, memory plan; every leaf, and the exact total."""
    problem, opt = subject.start()
    table = opt.explain(every_leaf=True)
    for leaf in opt.leaves:
        assert leaf.name in table, f"{leaf.name} is not explained"
    laws = {leaf.directed.law.describe() for leaf in opt._moved()}
    for words in (
        *laws,
        f"probe: {opt.probe.describe()}",
        "evaluations a step",
        opt.memory.name,
        f"{opt.state_bytes().total:,}",
    ):
        assert words in table, f"{words!r} is missing from:\n{table}"
    sixteen, other = subject.start(torch.bfloat16)
    if any(p.dtype == torch.bfloat16 for p in sixteen.tensors().values()) and other.storage.weight == "stochastic":
        assert "weights: stochastic" in other.explain()
    assert type(opt).__name__ in repr(opt)
    assert opt.probe.evaluations > 0
    assert problem.measure() == problem.measure()


def evaluations_are_counted(subject: ForwardSubject) -> None:
    """As many forward passes as the probe says, once a first step has been taken."""
    problem, opt = subject.start()
    drive(opt, problem, 0, 2)
    before, steps = opt.evaluated, 6
    drive(opt, problem, 2, 2 + steps)
    assert opt.evaluated - before == steps * opt.probe.evaluations, f"{opt.evaluated - before} in {steps} steps"


def copies_continue_alike(subject: ForwardSubject) -> None:
    """deepcopy and pickle of (problem's parameters, optimizer) take the same steps, and are independent."""
    problem, opt = subject.start()
    if problem.module is None or type(problem.module).__module__ != "tare.testing.subject":
        return
    from tare.testing.subject import loss_of

    net = problem.module
    drive(opt, problem, 0, 3)
    buffer = io.BytesIO()
    pickle.dump((net, opt), buffer)
    buffer.seek(0)
    twins = [copy.deepcopy((net, opt)), pickle.load(buffer)]
    drive(opt, problem, 3, 6)
    for twin, other in twins:
        for number in range(3, 6):
            other.step(lambda number=number, twin=twin: loss_of(twin, number))
        same(dict(twin.named_parameters()), dict(net.named_parameters()), "a copy")


def records_tell_the_step(subject: ForwardSubject) -> None:
    """Every step is told, once, with finite numbers and the rates that it was taken with."""
    problem, opt = subject.start()
    seen: list = []
    opt.on_step = seen.append
    drive(opt, problem, 0, 4)
    assert [record.step for record in seen] == [0, 1, 2, 3]
    rate = float(opt.param_groups[0]["lr"])
    for record in seen:
        assert record.rates == ((rate, float(opt.param_groups[0]["weight_decay"])),)
        assert all(isinstance(term, Term) for term in record.terms)
        assert record.leaves == tuple(leaf.draw(0).leaf.name for leaf in opt._moved())
        assert len(record.losses) >= 1


def groups_may_come_later(subject: ForwardSubject) -> None:
    """A leaf that is added is trained from then on, without disturbing the others' directions."""
    problem, opt = subject.start()
    if problem.module is None:
        return
    late = nn.Parameter(torch.full((12, 5), 0.5))
    opt.add_param_group({"params": [("late.weight", late)], "lr": opt.param_groups[0]["lr"]})
    trained = {leaf.draw(0).leaf.name for leaf in opt._moved()}
    opt.step(lambda: problem.loss(0) + late.square().sum())
    assert torch.equal(late, torch.full((12, 5), 0.5)) == ("late.weight" not in trained)
    opt.zero_grad()


CHECKS = (
    state_bytes_are_those_allocated, explains_itself, evaluations_are_counted, copies_continue_alike, records_tell_the_step,
    groups_may_come_later,
)  # fmt: skip
