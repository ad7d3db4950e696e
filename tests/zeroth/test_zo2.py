"""ZO2 is MeZO bit for bit, with each block brought once a step and no more of the model on the device than it says."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.errors import InputError
from tare.methods.mezo import MeZO
from tare.methods.zo2 import ZO2
from tare.testing.blocks import Decoder
from tare.testing.subject import loss_of, same
from tare.zeroth.log import SeedLog
from tare.zeroth.stream_memory import Streamed

BLOCK = 4 * (8 + 16 + 16 * 8 + 16 + 8 * 16)  # bytes of one block of `Decoder`: gain, norm, up, down
LR = 2e-2


def both(net: nn.Module, **own: Any) -> tuple[nn.Module, MeZO, nn.Module, ZO2]:
    """The same model in memory and streamed, with an optimizer each."""
    twin = copy.deepcopy(net)
    streamed = {name: own.pop(name) for name in ("together", "ahead", "budget", "blocks") if name in own}
    return twin, MeZO(twin, LR, **own), net, ZO2(net, LR, device="cpu", **own, **streamed)


def walk(net: nn.Module, opt: Any, first: int, last: int, rates: list[float] | None = None) -> list[float]:
    losses = []
    for number in range(first, last):
        if rates:
            opt.param_groups[0]["lr"] = rates[number]
        losses.append(opt.step(lambda number=number: loss_of(net, number)))
    return losses


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def storage(p: Tensor) -> int:
    """Where its memory is; without an address that would be taken for a read."""
    return p.untyped_storage()._cdata


@pytest.mark.parametrize(
    "own",
    [
        {}, {"together": 1}, {"weight_decay": 0.3}, {"n": 3, "together": 6}, {"n": 3, "together": 4}, {"ahead": 0}, {"ahead": 2},
        {"directions": "rademacher"}, {"targets": "layers.*.weight", "seed": 7}, {"maximize": True},
    ],
    ids=str,
)  # fmt: skip
def test_bit_for_bit_mezo(own: dict[str, Any]) -> None:
    """Losses at every step, and weights after a flush; as it is by itself for 1, 2 and 5 steps."""
    for steps in (3,) if own else (1, 2, 5):
        twin, one, net, two = both(Decoder(), **own)
        assert walk(twin, one, 0, steps) == walk(net, two, 0, steps)
        two.flush()
        same(dict(net.named_parameters()), dict(twin.named_parameters()), f"after {steps} steps")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_bit_for_bit_in_other_dtypes(dtype: torch.dtype) -> None:
    """16-bit weights are rounded stochastically, late as they are stepped."""
    twin, one, net, two = both(Decoder().to(dtype))
    assert walk(twin, one, 0, 4) == walk(net, two, 0, 4)
    same(state(net), state(twin), str(dtype))


def test_an_update_takes_the_rate_of_its_own_step() -> None:
    """And the decay, and a rate that is a tensor."""
    rates = [3e-2, 1e-2, 0.0, 2e-2, 5e-3]
    twin, one, net, two = both(Decoder(), weight_decay=0.1)
    assert walk(twin, one, 0, 5, rates) == walk(net, two, 0, 5, rates)
    two.param_groups[0]["lr"] = 1.0  # too late for what is owed
    same(state(net), state(twin), "varying rates")
    assert two.param_groups[0]["lr"] == 1.0


def test_dropout_falls_alike_in_both_lanes() -> None:
    """The generators of a lane that waits are not those of the one that runs."""
    twin, one, net, two = both(Decoder(dropout=0.3).train())
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="drop out"):
        wanted = walk(twin, one, 0, 4)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="drop out"):
        assert walk(net, two, 0, 4) == wanted
    assert torch.equal(torch.get_rng_state(), after)
    assert two.stream_report().moves == 3
    same(state(net), state(twin), "dropout")


def test_blocks_are_a_step_behind_until_they_are_flushed() -> None:
    net = Decoder()
    opt = ZO2(net, LR, device="cpu")
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    walk(net, opt, 0, 1)
    for name, p in net.named_parameters():
        assert torch.equal(p, start[name]) == name.startswith("layers."), name
    opt.flush()
    assert not any(torch.equal(p, start[name]) for name, p in net.named_parameters())
    flushed = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt.flush()
    same(dict(net.named_parameters()), flushed, "a second flush")


def test_each_block_moves_once_each_way() -> None:
    net = Decoder(layers=5)
    opt = ZO2(net, LR, device="cpu")
    walk(net, opt, 0, 2)
    for step in range(2, 4):
        walk(net, opt, step, step + 1)
        report = opt.stream_report()
        assert (report.moves, report.brought, report.written) == (5, 5 * BLOCK, 5 * BLOCK)
    frozen = Decoder(layers=5).requires_grad_(False)
    frozen.layers[1].up.weight.requires_grad_(True)
    opt = ZO2(frozen, LR, device="cpu")
    walk(frozen, opt, 0, 3)
    assert opt.stream_report().written == 4 * 128, "only what changed is written back"


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_peak_on_the_device(ahead: int) -> None:
    """What stays, the blocks that are there at once, and one module's perturbed copy: all that is counted, and not a byte more."""
    net = Decoder(layers=6)
    resident = sum(t.numel() * 4 for name, t in net.state_dict().items() if not name.startswith("layers."))
    copies = 4 * max(13 * 8, 16 * 8 + 16)
    budget = resident + (1 + ahead) * BLOCK + copies
    opt = ZO2(net, LR, device="cpu", budget=budget, ahead=ahead)
    walk(net, opt, 0, 3)
    opt.flush()
    report = opt.stream_report()
    assert report.peak == budget
    assert (report.resident_bytes, report.block_bytes, report.slots) == (resident, BLOCK, 1 + ahead)
    tight = ZO2(Decoder(layers=6), LR, device="cpu", budget=budget, ahead=ahead + 3)
    assert tight.stream.ahead == ahead
    assert "the budget is short" in tight.explain()
    with pytest.raises(InputError, match=f"give {resident + BLOCK + copies:,}"):
        ZO2(Decoder(layers=6), LR, device="cpu", budget=resident + BLOCK + copies - 1)


def test_weights_are_on_the_device_while_their_block_runs_and_only_then() -> None:
    """On the simulated device a block's weights are other memory than those at rest; the counting room is never passed by."""
    net = Decoder()
    opt = ZO2(net, LR, device="cpu", together=2)
    rest = {p: storage(p) for p in opt.stream.streamed}
    seen: list[tuple[int, int, bool]] = []
    for number, layer in enumerate(net.layers):

        def look(module: nn.Module, arguments: Any, number: int = number) -> None:
            away = [
                i for i, other in enumerate(net.layers) for p in other.parameters()
                if p in rest and storage(p) != rest[p]
            ]  # fmt: skip
            seen.append((number, len(set(away)), not away or set(away) == {number}))

        layer.norm.register_forward_pre_hook(look)
    walk(net, opt, 0, 2)
    assert all(alone for _, _, alone in seen)
    order = [number for number, _, _ in seen][-6:]
    assert order == [0, 0, 1, 1, 2, 2], "both points pass a block while it is there"
    assert {p: storage(p) for p in rest} == rest


def test_evaluation_between_steps_needs_no_flush() -> None:
    """A forward of the model brings blocks, which take what they are owed; afterwards nothing is."""
    twin, one, net, two = both(Decoder())
    walk(twin, one, 0, 3)
    walk(net, two, 0, 3)
    assert two.stream.owed
    with torch.no_grad():
        assert torch.equal(loss_of(net), loss_of(twin))
        assert not two.stream.owed
        assert torch.equal(net.layers[1](torch.ones(2, 8)), twin.layers[1](torch.ones(2, 8))), "a block by itself"
    assert walk(twin, one, 3, 5) == walk(net, two, 3, 5)
    same(state(net), state(twin), "evaluated between")


def test_inference_mode_and_modes_of_torch() -> None:
    """Evaluating under inference mode leaves nothing behind; under a mode of torch, which threads do not share, points go by themselves."""
    twin, one, net, two = both(Decoder())
    with torch.inference_mode():
        assert torch.equal(loss_of(net), loss_of(twin))
    assert walk(net, two, 0, 3) == walk(twin, one, 0, 3)
    assert two.stream_report().moves == 3
    with torch.device("cpu"):
        assert walk(net, two, 3, 4) == walk(twin, one, 3, 4)
    assert two.stream_report().moves == 6
    assert "each point takes a pass of its own (a mode of torch is on)" in two.explain()
    assert walk(net, two, 4, 5) == walk(twin, one, 4, 5)
    assert two.stream_report().moves == 3
    same(state(net), state(twin), "modes")


def test_backward_is_told_that_weights_have_gone() -> None:
    net = Decoder()
    ZO2(net, LR, device="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(net).backward()


def test_saving_and_loading_need_no_flush() -> None:
    """Weights from state_dict are up to date; loaded ones are not stepped by what was owed to those before."""
    twin, one, net, two = both(Decoder())
    walk(twin, one, 0, 3)
    walk(net, two, 0, 3)
    same(state(net), state(twin), "state_dict")
    walk(twin, one, 3, 4)
    walk(net, two, 3, 4)
    same(net.layers[0].state_dict(), twin.layers[0].state_dict(), "of a block")
    start = Decoder().state_dict()
    twin.load_state_dict(start)
    net.load_state_dict(start)
    assert walk(twin, one, 4, 6) == walk(net, two, 4, 6)
    buffer = io.BytesIO()
    torch.save({"model": net.state_dict(), "opt": two.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = Decoder()
    other.load_state_dict(saved["model"])
    resumed = ZO2(other, 1.0, device="cpu", seed=9)
    resumed.load_state_dict(saved["opt"])
    assert walk(twin, one, 6, 8) == walk(other, resumed, 6, 8)
    same(state(other), state(twin), "resumed")


def test_copies_owe_what_the_original_does() -> None:
    net = Decoder()
    opt = ZO2(net, LR, device="cpu")
    walk(net, opt, 0, 2)
    copies = [copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))]
    walk(net, opt, 2, 4)
    for other, second in copies:
        assert second.stream.owed
        walk(other, second, 2, 4)
        same(state(other), state(net), "a copy")


def test_a_log_is_sealed_with_flushed_weights(tmp_path: Any) -> None:
    """And replays, also with an optimizer that does not stream."""
    net = Decoder()
    with SeedLog(tmp_path / "run.seeds") as log:
        walk(net, ZO2(net, LR, device="cpu", on_step=log), 0, 4)
    other = Decoder()
    assert tare.replay(tmp_path / "run.seeds", other).exact
    same(state(other), state(net), "replayed")


class Auxiliary(nn.Module):
    """Blocks that leave numbers behind for a loss at the end, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()
        for layer in self.inner.layers:
            layer.register_forward_hook(lambda module, _, out: setattr(module, "left", out.square().mean()))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.inner(tokens)
        return out + sum(layer.left for layer in self.inner.layers)


class ReadElsewhere(nn.Module):
    """The closure's model reads a block's weight past the block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.inner(tokens)
        return out + self.inner.layers[1].up.weight.square().mean()


@pytest.mark.parametrize("kind", [Auxiliary, ReadElsewhere])
def test_models_that_lanes_would_disturb_take_a_pass_for_each_point(kind: type[nn.Module]) -> None:
    """The same numbers, and explain says so."""
    twin, one, net, two = both(kind())
    assert "together" not in two.memory.apart
    assert walk(twin, one, 0, 4) == walk(net, two, 0, 4)
    same(state(net), state(twin), kind.__name__)
    assert "each point takes a pass of its own" in two.explain()
    assert two.stream_report().moves >= 6 - 1


def test_tied_embeddings_are_one_weight() -> None:
    twin, one, net, two = both(Decoder(tied=True))
    assert walk(twin, one, 0, 4) == walk(net, two, 0, 4)
    same(state(net), state(twin), "tied")
    assert two.stream_report().moves == 3


def test_skipped_blocks_and_repeated_ones() -> None:
    """Blocks that run in another order, twice or not at all."""

    class Turns(Decoder):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens) + self.offset
            for number in (2, 0, 0, 2):
                x = self.layers[number](x)
            out: Tensor = self.head(self.norm(x))
            return out

    twin, one, net, two = both(Turns())
    assert walk(twin, one, 0, 4) == walk(net, two, 0, 4)
    same(state(net), state(twin), "other orders")


def test_accuracies_that_are_equal_and_losses_that_are_not_finite() -> None:
    """delta = 0 is a step like any other, with its decay; a step that is skipped owes nothing."""
    twin, one, net, two = both(Decoder(), weight_decay=0.5)
    for model, opt in ((twin, one), (net, two)):
        opt.step(lambda model=model: float(loss_of(model) > 0))
        opt.step(lambda model=model: loss_of(model) * float("nan"))
        opt.step(lambda model=model: loss_of(model))
    same(state(net), state(twin), "odd losses")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(("step", "call"), [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1)])
def test_a_fault_inside_of_a_block_loses_nothing(step: int, call: int, kind: type[BaseException]) -> None:
    """In either lane, in the first step (each point by itself, then both) or a later one: the step is taken again, the run is MeZO's."""
    twin, one, net, two = both(Decoder())
    walk(net, two, 0, step)
    count = iter(range(100))

    def fail(module: nn.Module, arguments: Any) -> None:
        if next(count) == call:
            raise kind

    handle = net.layers[1].norm.register_forward_pre_hook(fail)
    with pytest.raises(kind):
        walk(net, two, step, step + 1)
    handle.remove()
    assert walk(twin, one, 0, 4)[step:] == walk(net, two, step, 4)
    same(state(net), state(twin), f"after a fault at call {call}")


def test_autocast_and_contexts_reach_every_lane() -> None:
    twin, one, net, two = both(Decoder())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = walk(twin, one, 0, 3)
        assert walk(net, two, 0, 3) == wanted
    assert two.stream_report().moves == 3
    assert wanted != walk(Decoder(), MeZO(Decoder(), LR), 0, 3)


def test_largest_list_of_blocks_is_found_or_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.large = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))
            self.mixed = nn.ModuleList([nn.Linear(40, 40), nn.LayerNorm(4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.large[1](self.large[0](x)).mean() + self.small[2](x[:, :4]).sum()

    assert [block.name for block in ZO2(Two(), device="cpu").stream.blocks] == ["large.0", "large.1"]
    named = ZO2(Two(), device="cpu", blocks=("small", "mixed"))
    assert [block.name for block in named.stream.blocks] == ["small.0", "small.1", "small.2", "mixed.0", "mixed.1"]


def test_explain_and_report() -> None:
    net = Decoder()
    opt = ZO2(net, LR, device="cpu", budget=10_000)
    walk(net, opt, 0, 3)
    text = opt.explain()
    for words in (
        "streamed: 3 blocks of layers",
        f"{BLOCK:,}",
        "2 points pass a block",
        "3 brought",
        f"{3 * BLOCK:,} back",
        "10,000",
    ):
        assert words in text, f"{words!r} is missing from:\n{text}"


def test_what_cannot_be_streamed_is_refused() -> None:
    shared = Decoder()
    shared.layers[2].up = shared.layers[0].up
    outside = Decoder()
    outside.head.weight = nn.Parameter(torch.zeros(16, 8))
    outside.layers[1].up.weight = outside.head.weight
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (nn.Linear(3, 3), {}, "no nn.ModuleList"),
        (Decoder(), {"blocks": "leyers"}, "did you mean|layers"),
        (shared, {}, "tied: layers.0 and layers.2"),
        (outside, {}, "tied: head .* and layers.1"),
        (Decoder(), {"device": "abacus"}, "device: 'abacus'"),
        (Decoder(), {"device": "meta"}, "device: meta"),
        (Decoder(), {"budget": 100}, "100 bytes are too few"),
        (Decoder(), {"budget": -1}, "budget"),
        (Decoder(), {"ahead": -1}, "ahead"),
        (Decoder(), {"together": 0}, "together"),
        (Decoder().bfloat16(), {"storage": {"weight": "split24"}}, "not streamed"),
        (nn.ModuleList(nn.Tanh() for _ in range(3)), {}, "no nn.ModuleList"),
    ]
    for model, own, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            ZO2(model, **{"device": "cpu", **own})
        assert "\n" not in str(caught.value)
        assert not any(module._forward_pre_hooks for module in model.modules()), f"hooks are left: {words}"
    with pytest.raises(InputError, match="give the model itself"):
        ZO2(list(Decoder().parameters()))


def test_two_optimizers_on_one_model_do_not_stream_it_twice() -> None:
    net = Decoder()
    first = ZO2(net, LR, device="cpu")
    walk(net, first, 0, 2)
    twin = Decoder()
    walk(twin, MeZO(twin, LR), 0, 2)
    second = ZO2(net, LR, device="cpu", seed=3)
    same(state(net), state(twin), "what the first owed")
    walk(net, second, 0, 2)
    assert len(net.layers[0]._forward_pre_hooks) == 1
    second.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_the_plan_is_a_memory_plan() -> None:
    opt = ZO2(Decoder(), device="cpu")
    assert isinstance(opt.memory, Streamed)
    assert not opt.memory.drifts
