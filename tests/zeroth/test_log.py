"""The seed log as a file: small, only growing, whole after a kill, and honest about damage and about whose it is."""

import copy
import os
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tare import InputError, MeZO, SeedLog, replay
from tare.zeroth.logfile import read
from tare.zeroth.logformat import Context, Reader, framed, read_step, step_payload, varint
from tare.zeroth.probes import Term
from tare.zeroth.record import Record


def net(seed: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))


def batch(step: int) -> Tensor:
    return torch.sin(torch.arange(30.0).view(5, 6) * (1 + step))


def train(opt: MeZO, model: nn.Module, first: int, last: int) -> None:
    for step in range(first, last):
        opt.step(lambda step=step: (model(batch(step)) - 0.3).square().mean())


def logged(path: Path, steps: int = 12, seal: bool = True) -> nn.Module:
    """The trained model of a run with a log."""
    model = net()
    log = SeedLog(path)
    train(MeZO(model, lr=1e-2, on_step=log), model, 0, steps)
    log.close(seal)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_whatever_a_record_holds_comes_back() -> None:
    order = {"a": 0, "b": 1, "c": 200}
    names = ["a", "b", *[f"x{i}" for i in range(198)], "c"]
    cases = [
        Record(0, (Term(0, 0.1),), 1.0, ((1e-3, 0.0), (1e-4, 0.1)), leaves=("a", "b", "c")),
        Record(
            1, (Term(0, 0.5), Term(1, -2.0), Term(2, 1e30)), 0.25, ((1e-3, 0.0), (2e-4, 0.1)), leaves=("a", "b", "c")
        ),
        Record(
            2,
            (Term(3, 1e300), Term(1 << 41, -0.0)),
            1.0,
            ((1e-3, 0.0), (2e-4, 0.1)),
            keep={"scale ü": 0.3},
            leaves=("b",),
        ),
        Record(3, (), 1.0, ((1e-3, 0.0), (2e-4, 0.1)), leaves=("b",)),
        Record(4, (), 1.0, ((1e-3, 0.0), (2e-4, 0.1)), moved=False, leaves=("b", "c")),
        Record(5, (), 0.0, ((1e-3, 0.0), (2e-4, 0.1)), skipped=True, moved=False, leaves=("b", "c")),
    ]
    before = after = Context()
    for record in cases:
        payload = step_payload(record, before, order, with_kept=True)
        found, after = read_step(payload, record.step, after, names, groups=2)
        assert found == record
        before = Context.after(record, order)
        assert before == after


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 1 << 14, (1 << 63) + 5])
def test_whole_numbers(number: int) -> None:
    assert Reader(varint(number)).varint() == number


def test_bytes_of_a_step() -> None:
    """One direction: 15 bytes at a constant rate, 24 at one that changes. 20,000 steps of a 7B model with 16 directions: 3 MB."""
    constant = Record(1, (Term(0, 0.1),), 1.0, ((1e-6, 0.0),), leaves=("a",))
    context = Context.after(constant, {"a": 0})
    assert len(framed(step_payload(constant, context, {"a": 0}, False), 0)[0]) == 15
    moving = Record(1, (Term(0, 0.1),), 1.0, ((2e-6, 0.0),), leaves=("a",))
    assert len(framed(step_payload(moving, context, {"a": 0}, False), 0)[0]) == 24
    many = Record(1, tuple(Term(j, 0.1) for j in range(16)), 1.0, ((2e-6, 0.0),), leaves=("a",))
    assert 20_000 * len(framed(step_payload(many, context, {"a": 0}, False), 0)[0]) < 3.1e6


def test_size_of_a_real_file(tmp_path: Path) -> None:
    """The header is a few lines of JSON for each leaf; a step takes 11 to 15 bytes."""
    logged(tmp_path / "a", 1, seal=False)
    logged(tmp_path / "b", 301, seal=False)
    sizes = [os.path.getsize(tmp_path / name) for name in "ab"]
    assert (
        300 * 11 <= sizes[1] - sizes[0] <= 300 * 15
    )  # differences of float32 losses often fit into float32 themselves
    assert sizes[0] < 4000
    leaves, per_leaf = 291, 230  # a llama of 7B; name, shape, hash
    assert 20_000 * 24 + leaves * per_leaf < 1e6


def test_a_torn_tail_is_cut_wherever_it_tears(tmp_path: Path) -> None:
    path = tmp_path / "run"
    logged(path, 5, seal=False)
    whole = path.read_bytes()
    ends = read(path).ends
    for size in range(ends[3] + 1, len(whole)):
        path.write_bytes(whole[:size])
        log = read(path)
        steps = 4 if size >= ends[4] else 3
        assert (log.steps, log.torn) == (steps, size - ends[steps])
    path.write_bytes(whole + bytes(512))  # a block that was allocated and not yet written
    assert read(path).steps == 5


def test_the_last_record_with_wrong_bytes_counts_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "run"
    logged(path, 5, seal=False)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    assert read(path).steps == 4


def test_damage_is_named_and_changes_nothing(tmp_path: Path) -> None:
    """Any single byte before the last record, the lengths too."""
    path = tmp_path / "run"
    logged(path, 6)
    whole = path.read_bytes()
    log = read(path)
    base = net()
    for at in [8, 9, 12, 40, log.ends[0] - 2, *range(log.ends[0], log.ends[6])]:
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged at byte"):
            replay(path, base)
        assert same(base, net())


def test_records_cannot_be_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "run"
    logged(path, 6)
    whole, ends = path.read_bytes(), read(path).ends
    path.write_bytes(whole[: ends[2]] + whole[ends[3] :])
    with pytest.raises(InputError, match="damaged"):
        read(path)


def test_what_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a seed log"):
        read(tmp_path / "text")
    (tmp_path / "beginning").write_bytes(b"TARELOG1" + struct.pack("<I", 50) + b"{")
    with pytest.raises(InputError, match="damaged"):
        read(tmp_path / "beginning")


def test_a_run_that_resumes_goes_on_in_its_log(tmp_path: Path) -> None:
    """From a checkpoint at step 7 of a run that was killed at step 10, with half a record at the end."""
    path = tmp_path / "run"
    model = net()
    log = SeedLog(path)
    opt = MeZO(model, lr=1e-2, rule="adam", on_step=log)
    train(opt, model, 0, 7)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(opt, model, 7, 10)
    with path.open("ab") as file:
        file.write(b"\x0b\x03")

    resumed = net(8)
    resumed.load_state_dict(saved[0])
    again = SeedLog(path)
    opt = MeZO(resumed, lr=1e-2, rule="adam", on_step=again)
    opt.load_state_dict(saved[1])
    train(opt, resumed, 7, 15)
    again.close()
    assert again.steps == 15

    base = net()
    found = replay(path, base)
    assert (found.steps, found.exact) == (15, True)
    assert same(base, resumed)


def test_a_log_that_ends_before_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    logged(path, 3)
    model = net()
    opt = MeZO(model, lr=1e-2)
    train(opt, model, 0, 5)
    opt.on_step = SeedLog(path)
    with pytest.raises(InputError, match="holds steps 0 to 3, the optimizer is at 5"):
        train(opt, model, 5, 6)
    assert read(path).steps == 3


@pytest.mark.parametrize(
    ("other", "what"),
    [({"seed": 1}, "seeds"), ({"rule": "momentum"}, "options"), ({"storage": {"moment": "bf16"}}, "options|storage")],
)
def test_the_log_of_another_run(tmp_path: Path, other: dict, what: str) -> None:
    path = tmp_path / "run"
    logged(path, 3)
    model = net()
    opt = MeZO(model, lr=1e-2, on_step=SeedLog(path), **other)
    with pytest.raises(InputError, match=what):
        train(opt, model, 0, 1)


def test_the_log_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "run"
    logged(path, 3)
    model = nn.Linear(6, 2)
    with pytest.raises(InputError, match="leaves differ"):
        train(MeZO(model, lr=1e-2, on_step=SeedLog(path)), model, 0, 1)


def test_steps_are_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "run"
    logged(path, 3)
    model = net()
    with pytest.raises(InputError, match="holds 3 steps already"):
        train(MeZO(model, lr=1e-2, on_step=SeedLog(path)), model, 0, 1)
    assert same(model, net())
    train(MeZO(model, lr=1e-2, on_step=SeedLog(path, overwrite=True)), model, 0, 1)
    assert read(path).steps == 1


def test_a_log_may_begin_late_where_there_is_no_state(tmp_path: Path) -> None:
    """The base is then the weights of that moment; with moments it is refused."""
    path = tmp_path / "run"
    model = net().bfloat16()
    opt = MeZO(model, lr=1e-2)
    closure = lambda: model(batch(0).bfloat16()).float().square().mean()  # noqa: E731
    for _ in range(4):
        opt.step(closure)
    base = copy.deepcopy(model)
    with SeedLog(path) as log:
        opt.on_step = log
        for _ in range(4):
            opt.step(closure)
    assert replay(path, base).exact
    assert same(base, model)

    for rule in ({"rule": "momentum"}, {"rule": "momentum", "moments": "replay"}):
        other = net()
        opt = MeZO(other, lr=1e-2, **rule)
        train(opt, other, 0, 1)
        opt.on_step = SeedLog(tmp_path / "late")
        with pytest.raises(InputError, match="would lack the state"):
            train(opt, other, 1, 2)


def test_one_log_is_of_one_run(tmp_path: Path) -> None:
    log = SeedLog(tmp_path / "run")
    one, two = net(), net()
    train(MeZO(one, lr=1e-2, on_step=log), one, 0, 1)
    with pytest.raises(InputError, match="a SeedLog of its own"):
        train(MeZO(two, lr=1e-2, on_step=log), two, 0, 1)
    log.close()
    with pytest.raises(InputError, match="closed"):
        log(Record(0, (), 1.0, ((1.0, 0.0),), leaves=("0.weight",)))


def test_parameters_that_come_later_are_refused(tmp_path: Path) -> None:
    model = net()
    opt = MeZO(model, lr=1e-2, on_step=SeedLog(tmp_path / "run"))
    train(opt, model, 0, 1)
    opt.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    with pytest.raises(InputError, match="parameters were added"):
        train(opt, model, 1, 2)


def test_two_leaves_of_one_name_are_refused(tmp_path: Path) -> None:
    a, b = nn.Linear(6, 2), nn.Linear(6, 2)
    opt = MeZO(
        [{"params": [("w", a.weight)]}, {"params": [("w", b.weight)]}], lr=1e-2, on_step=SeedLog(tmp_path / "run")
    )
    with pytest.raises(InputError, match="two leaves have one name"):
        opt.step(lambda: (a(batch(0)) + b(batch(0))).square().mean())


def test_a_copy_of_the_optimizer_does_not_write(tmp_path: Path) -> None:
    model = net()
    log = SeedLog(tmp_path / "run")
    opt = MeZO(model, lr=1e-2, on_step=log)
    train(opt, model, 0, 2)
    twin, other = copy.deepcopy((model, opt))
    train(other, twin, 2, 4)
    assert log.steps == 2
    train(opt, model, 2, 4)
    assert log.steps == 4
    assert same(model, twin)
