"""A log applied to the base weights gives the trained ones, bit for bit: all rules, storages, probes, kinds of parameters."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tare import InputError, MeZO, SeedLog, replay
from tare.core.random import make_key, normal
from tare.rules.lion import Lion
from tare.zeroth.directions import Gaussian
from tare.zeroth.logfile import read
from tare.zeroth.recall import Recall


class Net(nn.Module):
    """Embedding, tied head, norm, an uneven matrix, a bias, an empty and an unused leaf."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.idle = nn.Linear(2, 2)
        self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            p.data = normal(make_key(1, name), tuple(p.shape)).mul_(0.3)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        return self.head(x + self.down(torch.tanh(self.up(x))))


def loss(net: nn.Module, step: int) -> Tensor:
    tokens = (torch.arange(12) * 5 + step) % 11
    return nn.functional.cross_entropy(net(tokens).float(), (tokens + 1) % 11)


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def drive(opt: MeZO, net: nn.Module, steps: int, after: Callable[[int], Any] = lambda step: None) -> None:
    for step in range(steps):
        opt.step(lambda step=step: loss(net, step))
        after(step)


BF16 = {"dtype": torch.bfloat16}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "decay": {"weight_decay": 0.3},
    "four": {"n": 4, "mean": False, "directions": "rademacher"},
    "one-sided": {"probe": "one-sided", "n": 2},
    "one-point": {"probe": "one-point", "eps": 1e-2},
    "sign": {"coefficients": "sign", "lr": 1e-3},
    "conservative": {"probe": "conservative", "lr": 0.5},
    "forward gradient": {"probe": "forward-gradient"},
    "momentum": {"rule": "momentum"},
    "adam": {"rule": "adam"},
    "adam ascending": {"rule": "adam", "maximize": True},
    "momentum replayed": {"rule": "momentum", "moments": "replay", "tolerance": 0.3},
    "adam replayed": {"rule": "adam", "betas": (0.5, 0.7), "moments": "replay"},
    "lion recalled": {"rule": Recall(Lion(), 3), "lr": 1e-3},
    "8-bit adam": {"rule": "adam", "storage": {"moment": "int8", "min_quantized": 1, "block": 16}},
    "parameter norms": {"scales": "parameter-norm"},
    "gradient norms": {"scales": "gradient-norm", "rescale_every": 5, "modify": "expectation"},
    "targets": {"targets": ("up.*", "embedding")},
    "a law": {"directions": Gaussian()},
    "bf16": {**BF16, "weight_decay": 0.1},
    "bf16 adam": {**BF16, "rule": "adam", "storage": {"moment": "bf16"}},
    "bf16 plain": {**BF16, "storage": {"weight": "plain"}},
    "bf16 split": {**BF16, "storage": {"weight": "split24"}},
    "fp16": {"dtype": torch.float16},
    "fp16 master": {"dtype": torch.float16, "storage": {"weight": "master"}},
    "fp64": {"dtype": torch.float64, "rule": "adam"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*updates were too small")
@pytest.mark.parametrize("case", CASES)
def test_replay_is_the_trained_model(case: str, tmp_path: Path) -> None:
    own = dict(CASES[case])
    dtype, lr = own.pop("dtype", torch.float32), own.pop("lr", 2e-2)
    net, base = Net(dtype), Net(dtype)
    with SeedLog(tmp_path / "run") as log:
        opt = MeZO(net, lr, seed=7, on_step=log, **own)
        drive(opt, net, 13)
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), base.parameters(), strict=True))
    found = replay(tmp_path / "run", base)
    assert (found.steps, found.exact) == (13, True)
    same(base, net)
    assert all(p.requires_grad for p in base.parameters())


def test_state_after_a_replay_goes_on_as_the_run(tmp_path: Path) -> None:
    net, base = Net(), Net()
    with SeedLog(tmp_path / "run") as log:
        opt = MeZO(net, 1e-2, rule="adam", probe="one-point", on_step=log)
        drive(opt, net, 6)
    twin = MeZO(base, 1e-2, rule="adam", probe="one-point")
    replay(tmp_path / "run", base, optimizer=twin)
    for p, q in zip(net.parameters(), base.parameters(), strict=True):
        for name, value in opt.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin.state[q][name])), name


def test_schedules_skipped_steps_and_leaves_that_rest(tmp_path: Path) -> None:
    net, base = Net(), Net()
    log = SeedLog(tmp_path / "run")
    opt = MeZO(net, 2e-2, rule="momentum", on_step=log)
    schedule = LambdaLR(opt, lambda t: 0.8**t)

    def after(step: int) -> None:
        schedule.step()
        net.up.requires_grad_(step not in (3, 4, 5))
        net.norm.weight.data[0] = float("nan") if step == 6 else 1.0  # the next step is skipped

    base.norm.weight.data[0] = net.norm.weight.data[0] = 1.0
    drive(opt, net, 12, after)
    log.close()
    records = list(read(tmp_path / "run").records())
    assert [record.step for record in records if record.skipped] == [7]
    assert len({record.rates for record in records}) == 12
    assert {len(record.leaves) for record in records} == {8, 6}
    # by hand, since the test wrote to a weight between two steps
    twin = MeZO(base, 2e-2, rule="momentum")
    for record in records:
        twin.replay(record)
        base.norm.weight.data[0] = 1.0
    same(base, net)


def test_groups_and_roles(tmp_path: Path) -> None:
    """Named groups with rates of their own, given in another order than the module's."""
    net, base = Net(), Net()
    named = dict(net.named_parameters())

    def groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        first = [("down.weight", named["down.weight"]), ("norm.weight", named["norm.weight"])]
        return [
            {"params": first, "lr": 1e-2, "weight_decay": 0.2},
            {"params": [("up.weight", named["up.weight"])], "role": "head"},
        ]

    with SeedLog(tmp_path / "run") as log:
        drive(MeZO(groups(named), 3e-2, rule="adam", on_step=log), net, 8)
    assert replay(tmp_path / "run", base).exact
    same(base, net)
    assert {leaf["role"] for leaf in read(tmp_path / "run").header["leaves"]} == {"linear", "norm", "head"}
    other = Net()
    assert replay(tmp_path / "run", dict(other.named_parameters())).exact
    same(other, net)


def test_tensors_without_names(tmp_path: Path) -> None:
    """They go by their order; two of one shape draw different directions."""
    net, base = Net(), Net()
    twice = [net.up.weight, net.down.weight, net.norm.weight, net.norm.bias]
    with SeedLog(tmp_path / "run") as log:
        drive(MeZO(twice, 1e-2, on_step=log), net, 5)
    assert replay(tmp_path / "run", [base.up.weight, base.down.weight, base.norm.weight, base.norm.bias]).exact
    same(base, net)
    with pytest.raises(InputError, match="4 leaves, 3 tensors"):
        replay(tmp_path / "run", [base.up.weight, base.down.weight, base.norm.weight])
    moved = [(p - q).detach() for p, q in ((net.norm.weight, Net().norm.weight), (net.norm.bias, Net().norm.bias))]
    assert not torch.allclose(moved[0], moved[1])


class Adapter(nn.Module):
    """y = W x + B A x, the base frozen."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(normal(make_key(2, "a"), (rank, base.in_features)))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def adapted() -> Net:
    net = Net().requires_grad_(False)
    net.up, net.down = Adapter(net.up, 2), Adapter(net.down, 2)  # type: ignore[assignment]
    return net


def test_adapters_alone(tmp_path: Path) -> None:
    net, base = adapted(), adapted()
    with SeedLog(tmp_path / "run") as log:
        opt = MeZO(net, 1e-2, rule="adam", on_step=log)
        drive(opt, net, 10)
    assert [leaf["name"] for leaf in read(tmp_path / "run").header["leaves"] if leaf["trained"]] == [
        "up.a",
        "up.b",
        "down.a",
        "down.b",
    ]
    found = replay(tmp_path / "run", base)
    assert found.exact
    same(base, net)
    assert found.optimizer.state_bytes().total == opt.state_bytes().total
    assert found.optimizer.state_bytes().total == 8 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    # another base under the same adapters is another model
    other = adapted()
    other.up.base.weight.data[0, 0] += 1e-3
    with pytest.raises(InputError, match=r"up.base.weight and 0 more of \d+ leaves differ"):
        replay(tmp_path / "run", other)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    net = Net()
    with SeedLog(tmp_path / "run") as log:
        drive(MeZO(net, 1e-2, on_step=log), net, 4)
    for model, words in (
        (net, "began from other weights"), (Net(torch.bfloat16), "is .* bfloat16, in the run it was .* float32"),
        (nn.Linear(3, 4), "has no empty"), ({**dict(Net().named_parameters()), "up.bias": torch.zeros(7)}, r"up.bias is \(7,\)"),
    ):  # fmt: skip
        before = copy.deepcopy(model)
        with pytest.raises(InputError, match=words) as error:
            replay(tmp_path / "run", model)
        assert "\n" not in str(error.value)
        if isinstance(model, nn.Module):
            same(model, before)
    with pytest.raises(InputError, match="other leaves than the run"):
        replay(tmp_path / "run", Net(), optimizer=MeZO(nn.Linear(2, 2)))
    base = Net()
    with pytest.raises(InputError, match="seeds differ"):
        replay(tmp_path / "run", base, optimizer=MeZO(base, seed=3))


class Doubled(Gaussian):
    """A law that no file can hold: it is no frozen dataclass of this package."""

    def update(self, leaf: Any, state: Any) -> float:
        return 2.0


def test_own_laws_need_an_optimizer_built_by_hand(tmp_path: Path) -> None:
    net, base = Net(), Net()
    with SeedLog(tmp_path / "run") as log:
        drive(MeZO(net, 1e-2, directions=Doubled(), on_step=log), net, 4)
    with pytest.raises(InputError, match=r"option 'directions' of mezo: .*Doubled was given, which no file can hold"):
        replay(tmp_path / "run", base)
    assert replay(tmp_path / "run", base, optimizer=MeZO(base, 1e-2, directions=Doubled())).exact
    same(base, net)


def test_part_of_a_log(tmp_path: Path) -> None:
    net, base, seen = Net(), Net(), []
    with SeedLog(tmp_path / "run") as log:
        opt = MeZO(net, 1e-2, on_step=log)
        drive(opt, net, 3)
        third = copy.deepcopy(net)
        drive(opt, net, 3)
    found = replay(tmp_path / "run", base, steps=3, progress=lambda done, of: seen.append((done, of)))
    assert (found.steps, found.exact, seen) == (3, None, [(1, 3), (2, 3), (3, 3)])
    same(base, third)


def test_threads_do_not_matter(tmp_path: Path) -> None:
    """Leaves larger than a piece and of odd sizes, trained on one thread and replayed on three."""
    threads = torch.get_num_threads()
    start = normal(3, (611, 433))
    nets = [nn.Linear(433, 611, bias=False) for _ in range(2)]
    for net in nets:
        net.weight.data = start.clone()
    try:
        torch.set_num_threads(1)
        with SeedLog(tmp_path / "run") as log:
            opt = MeZO(nets[0], 1e-3, rule="adam", weight_decay=0.1, on_step=log)
            for _ in range(3):
                opt.step(lambda: nets[0].weight[:3].square().sum())
        torch.set_num_threads(3)
        assert replay(tmp_path / "run", nets[1]).exact
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("own", [{"memory": "in-place"}, {"legacy": True}])
def test_plans_that_drift_cannot_be_logged(own: dict[str, Any], tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(InputError, match="leaves rounding errors"):
        drive(MeZO(net, 1e-2, on_step=SeedLog(tmp_path / "run"), **own), net, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("memory", ["forward", "in-place-exact"])
def test_the_memory_plan_leaves_no_trace(memory: str, tmp_path: Path) -> None:
    net, base = Net(torch.bfloat16), Net(torch.bfloat16)
    with SeedLog(tmp_path / "run") as log:
        drive(MeZO(net, 1e-2, memory=memory, on_step=log), net, 5)
    assert replay(tmp_path / "run", base).exact
    same(base, net)
