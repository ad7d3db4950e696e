"""Blocks that rest and travel in few bits: the run is that of weights rounded after each step, and the mean is exact."""

import copy

import pytest
import torch
from torch import Tensor

import tare
from tare.core.errors import InputError
from tare.core.random import make_key, normal
from tare.methods.mezo import MeZO
from tare.methods.zo2 import ZO2
from tare.testing.blocks import Decoder
from tare.testing.subject import loss_of, same
from tare.zeroth.log import SeedLog
from tare.zeroth.stream_codecs import CODECS, codec

NAMES = list(CODECS)
LR = 2e-2


def rounded(value: Tensor, name: str, key: int | None) -> Tensor:
    form = CODECS[name]
    codes, out = form.empty(value), torch.empty_like(value)
    form.encode(value, codes, key)
    form.decode(codes, out)
    return out


def size(name: str, value: Tensor) -> int:
    return sum(code.numel() * code.element_size() for code in CODECS[name].empty(value))


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_near_and_right_on_average(name: str) -> None:
    """Uneven sizes, with a last group that is not full, and a group of zeros; the standard error of 400 draws is a twentieth of a step."""
    value = normal(3, (13, 37)) * 0.02
    value[3:8] = 0.0
    value[0, 0] = 0.3
    relative = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp8": 2.0**-3, "int8": 0.0}[name]
    scale = value.abs().max().item()
    bound = relative * value.abs() + {"fp8": scale * 2.0**-16, "int8": scale / 127}.get(name, 1e-7)
    assert bool(((rounded(value, name, None) - value).abs() <= 0.51 * bound + 1e-9).all())
    drawn = torch.stack([rounded(value, name, make_key(1, "draw", i)) for i in range(400)])
    assert bool(((drawn - value).abs() <= 1.01 * bound).all())
    assert bool(((drawn.mean(0) - value).abs() <= 0.15 * bound + 1e-9).all())
    assert bool((drawn[:, 4] == 0).all())


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8"])
def test_what_is_decoded_encodes_to_itself(name: str) -> None:
    once = rounded(normal(5, (9, 64)), name, 7)
    assert torch.equal(rounded(once, name, None), once)
    assert torch.equal(rounded(once, name, 8), once)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_mezo_with_matrices_rounded_after_each_step(name: str) -> None:
    """Bit for bit; vectors and what is outside of blocks are not rounded."""
    net = Decoder()
    twin = copy.deepcopy(net)
    one, two = MeZO(twin, LR), ZO2(net, LR, device="cpu", transfer=name)
    matrices = {n: p for n, p in twin.layers.named_parameters() if p.ndim == 2}
    for p in matrices.values():
        p.data = rounded(p.data, name, None)
    for step in range(4):
        wanted = one.step(lambda step=step: loss_of(twin, step))
        for n, p in matrices.items():
            p.data = rounded(p.data, name, make_key(0, f"layers.{n}/transfer", step))
        assert two.step(lambda step=step: loss_of(net, step)) == wanted
    report = two.stream_report()
    vectors = 4 * (8 + 16 + 16)
    assert report.brought == 3 * (
        vectors + sum(size(name, net.layers[0].get_submodule(m).weight) for m in ("up", "down"))
    )
    assert report.written == report.brought
    assert report.moves == 3
    two.flush()
    same(dict(net.named_parameters()), dict(twin.named_parameters()), name)
    assert f"6 matrices kept as {name}" in two.explain()


def test_changed_by_hand_copied_and_saved() -> None:
    """Weights that somebody has written count; copies and resumed runs go on from what is kept."""
    net = Decoder()
    opt = ZO2(net, LR, device="cpu", transfer="fp8")
    for step in range(2):
        opt.step(lambda step=step: loss_of(net, step))
    other, second = copy.deepcopy((net, opt))
    saved = {name: value.clone() for name, value in net.state_dict().items()}
    third = Decoder()
    third.load_state_dict(saved)
    resumed = ZO2(third, 1.0, device="cpu", transfer="fp8")
    resumed.load_state_dict(opt.state_dict())
    for model, one in ((net, opt), (other, second), (third, resumed)):
        for step in range(2, 4):
            one.step(lambda step=step, model=model: loss_of(model, step))
    same(other.state_dict(), net.state_dict(), "a copy")
    same(third.state_dict(), net.state_dict(), "resumed")
    opt.flush()
    with torch.no_grad():
        net.layers[0].up.weight.fill_(0.25)
        assert torch.equal(net.layers[0].up(torch.ones(8)), net.layers[0].up.bias + 2.0)


def test_a_log_replays_it(tmp_path: object) -> None:
    net = Decoder()
    with SeedLog(f"{tmp_path}/run.seeds") as log:
        opt = ZO2(net, LR, device="cpu", transfer="int8", on_step=log)
        for step in range(3):
            opt.step(lambda step=step: loss_of(net, step))
    other = Decoder()
    assert tare.replay(f"{tmp_path}/run.seeds", other).exact
    same(dict(other.named_parameters()), dict(net.named_parameters()), "replayed")


def test_bf16_weights_are_not_kept_in_more_bits_than_they_have() -> None:
    net = Decoder().bfloat16()
    assert not ZO2(net, device="cpu", transfer="fp16").stream.codes
    assert len(ZO2(net, device="cpu", transfer="int8").stream.codes) == 6


def test_what_low_bits_would_round_away_is_refused() -> None:
    class ReadElsewhere(Decoder):
        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = super().forward(tokens)
            return out + self.layers[1].up.weight.square().mean()

    net = ReadElsewhere()
    opt = ZO2(net, LR, device="cpu", transfer="bf16")
    with pytest.raises(InputError, match=r"layers.1.up.weight.*transfer='exact'"):
        opt.step(lambda: loss_of(net))
    with pytest.raises(InputError, match="transfer: expected exact"):
        codec("int3")
