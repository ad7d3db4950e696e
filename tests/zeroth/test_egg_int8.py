"""Integer-only EGG: the published runs to the bit, its tables and limits, workers that share signs, and resume."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from zeroth_cases import Trace, load

from tare.core.errors import CheckpointError, InputError
from tare.zeroth.egg import MATRICES, VECTORS, EggNet, Noise, floor_divide
from tare.zeroth.egg_training import Alpha, EggTrainer, NoiseTable, threshold

NAMES = {
    "emb": "emb", "head": "head", "ln_out": "ln_out.weight", "ln1": "blocks.ln1.weight", "ln2": "blocks.ln2.weight",
    "wf": "blocks.att.Wf", "uf": "blocks.att.Uf", "wh": "blocks.att.Wh", "uh": "blocks.att.Uh", "bf": "blocks.att.bf",
    "bh": "blocks.att.bh", "mlp_in": "blocks.mlp.0.weight", "mlp_out": "blocks.mlp.1.weight",
}  # fmt: skip


class Recorded(EggTrainer):
    """A trainer with the noise of a trace in place of its table's."""

    trace: Trace

    def drawn(self, name: str, pairs: Any) -> Any:
        pairs, path = list(pairs), NAMES[name]
        if name in VECTORS:
            return self.trace.tensors[f"E.{path}"][self.count][pairs].to(torch.int32).prod(-1, dtype=torch.int32)
        return tuple(self.trace.tensors[f"{x}.{path}"][self.count][pairs] for x in "AB")


def recorded(trace: Trace) -> Recorded:
    """The net and trainer at the beginning of a trace."""
    layers, d = trace.tensors["W0.blocks.att.bf"].shape
    net = EggNet(trace.tensors["W0.emb"].shape[0], d, layers)
    for name, weight in net.weights().items():
        weight.copy_(trace.tensors[f"W0.{NAMES[name]}"])
    h = trace.hyper
    trainer = Recorded(net, h["members"], sigma_shift=h["sigma_shift"], still="down", table_bits=10)
    trainer.trace = trace
    return trainer


@pytest.mark.parametrize("name", ["egg_int8_small", "egg_int8_thr0"])
def test_published_runs_are_met_exactly(name: str) -> None:
    trace = load(name)
    trainer = recorded(trace)
    for t in range(trace.steps):
        trainer.alpha = Alpha(fixed=trace.hyper["alphas"][t])
        assert threshold(trainer.alpha(t)) == int(trace.tensors["thr"][t])
        tokens = trace.tensors["tokens"][t]
        noise = trainer.noise(trainer.pairs)
        scores, _ = trainer.net.read(tokens.repeat_interleave(2, 0), trainer.hidden, noise)
        assert scores.equal(trace.tensors["raw"][t].long())
        trainer.step(tokens)
        assert trainer.hidden.equal(trace.tensors["state"][t])
        for ours, path in NAMES.items():
            assert trainer.net.get_buffer(ours).equal(trace.tensors[f"W.{path}"][t]), (t, path)
    signs = torch.sign(scores.view(-1, 2)[:, 0] - scores.view(-1, 2)[:, 1])
    assert signs.equal(trace.tensors["fitness"][-1].long())


def test_tables_are_the_published_ones() -> None:
    net = EggNet(4, 4, 1)
    q = torch.arange(256, dtype=torch.float64)
    assert net.powers.equal((torch.exp2(q / 16) * 16).to(torch.int64))
    totals = torch.cat([torch.arange(16, 1 << 16), torch.arange(1 << 24, (1 << 24) + 4096)])
    ours = torch.bucketize(totals, net.thresholds, right=True) - 1
    assert ours.equal((torch.log2(totals.double() / 16) * 16).to(torch.int64))


@pytest.mark.parametrize(("value", "divisor"), [(-1, 16), (-17, 16), (17, 16), (-1, 48), (-49, 48), (47, 48)])
def test_division_rounds_down(value: int, divisor: int) -> None:
    assert int(floor_divide(torch.tensor([value], dtype=torch.int32), divisor)) == value // divisor


def read_slowly(net: EggNet, tokens: list[int], noise: dict[str, Any] | None, sign: int, shift: int) -> int:
    """The score of one member, in Python integers: no tensor, no float."""
    w = {name: weight.tolist() for name, weight in net.weights().items()}
    d, layers = net.width, net.layers

    def clip(x: int) -> int:
        return max(-127, min(127, x))

    def vector(name: str, layer: int | None) -> list[int]:
        own = w[name] if layer is None else w[name][layer]
        if noise is None:
            return own
        e = noise[name].tolist() if layer is None else noise[name][layer].tolist()
        return [clip(a + (sign * b >> shift)) for a, b in zip(own, e, strict=True)]

    def product(name: str, layer: int | None, x: list[int]) -> list[int]:
        own = w[name] if layer is None else w[name][layer]
        out = [sum(a * b for a, b in zip(row, x, strict=True)) for row in own]
        if noise is not None:
            a, b = (f.tolist() if layer is None else f[layer].tolist() for f in noise[name])
            dot = sum(p * q for p, q in zip(x, b, strict=True))
            out = [o + (dot * sign * p >> shift) for o, p in zip(out, a, strict=True)]
        return [clip(o // (16 * math.isqrt(len(x)))) for o in out]

    def norm(name: str, layer: int | None, x: list[int]) -> list[int]:
        mean = max(1, sum(map(abs, x)) // len(x))
        return [clip(a * b // mean) for a, b in zip(x, vector(name, layer), strict=True)]

    hidden = [[0] * d for _ in range(layers)]
    score = 0
    for token, target in itertools.pairwise(tokens):
        if token == 0:
            hidden = [[0] * d for _ in range(layers)]
        x = w["emb"][token]
        if noise is not None:
            a, b = (f.tolist() for f in noise["emb"])
            x = [clip(v + (sign * a[token] * p >> shift)) for v, p in zip(x, b, strict=True)]
        for layer in range(layers):
            past, u = hidden[layer], norm("ln1", layer, x)
            parts = zip(product("wf", layer, u), product("uf", layer, past), vector("bf", layer), strict=True)
            gate = [clip(sum(p)) + 127 for p in parts]
            gated = [g * s >> 8 for g, s in zip(gate, past, strict=True)]
            parts = zip(product("wh", layer, u), product("uh", layer, gated), vector("bh", layer), strict=True)
            new = [clip(sum(p)) for p in parts]
            hidden[layer] = [s + (g * (n - s) >> 8) for s, g, n in zip(past, gate, new, strict=True)]
            x = [clip(a + b) for a, b in zip(hidden[layer], x, strict=True)]
            inner = product("mlp_in", layer, norm("ln2", layer, x))
            x = [clip(a + b) for a, b in zip(x, product("mlp_out", layer, inner), strict=True)]
        q = [v + 128 for v in product("head", None, norm("ln_out", None, x))]
        total = sum(int(net.powers[v]) for v in q)
        score += q[target] - int(16 * math.log2(total / 16))
    return score


@pytest.mark.parametrize(("vocabulary", "width", "layers"), [(7, 5, 1), (12, 16, 2), (3, 9, 3)])
def test_members_read_together_as_each_alone_in_whole_numbers(vocabulary: int, width: int, layers: int) -> None:
    net = EggNet(vocabulary, width, layers, seed=3)
    trainer = EggTrainer(net, members=6, table_bits=12, sigma_shift=2)
    tokens = torch.randint(vocabulary, (3, 9), generator=torch.Generator().manual_seed(0))
    scores, _ = net.read(tokens.repeat_interleave(2, 0), noise=trainer.noise(range(3)))
    plain, _ = net.read(tokens)
    for pair in range(3):
        own: dict[str, Any] = {}
        for name in (*MATRICES, *VECTORS):
            drawn = trainer.drawn(name, [pair])
            own[name] = drawn[0] if isinstance(drawn, Tensor) else tuple(f[0] for f in drawn)
        for number, sign in enumerate((1, -1)):
            expected = read_slowly(net, tokens[pair].tolist(), own, sign, 4 + 2)
            assert int(scores[2 * pair + number]) == expected
        assert int(plain[pair]) == read_slowly(net, tokens[pair].tolist(), None, 1, 0)


def test_wide_products_stay_exact() -> None:
    net = EggNet(2, 300, 1)  # mlp_out has 1200 inputs: more than float32 sums exactly, and (x . B) A passes 2^31
    for weight in net.weights().values():
        weight.fill_(127)
    trainer = EggTrainer(net, members=2, table_bits=12)
    trainer.table.entries.fill_(127)
    from tare.zeroth.egg import _Step

    step = _Step(net, trainer.noise(range(1)), 2)
    x = torch.full((2, 1200), 127, dtype=torch.int32)
    dot = 1200 * 127 * 127
    for member, sign in ((0, 1), (1, -1)):
        expected = max(-127, min(127, (dot + (sign * dot * 127 >> 8)) // (16 * 34)))
        assert step._product("mlp_out", 0, x)[member].eq(expected).all()


@pytest.mark.parametrize("still", ["stay", "down"])
def test_a_vote_of_nobody(still: str) -> None:
    """At threshold 0 the published code moves entries with Z = 0 by -1; ours leaves them."""
    net = EggNet(5, 4, 1)
    before = {name: weight.clone() for name, weight in net.weights().items()}
    trainer = EggTrainer(net, members=4, alpha=1.0, still=still, table_bits=10)
    trainer.apply(torch.zeros(2, dtype=torch.int8))
    for name, weight in net.weights().items():
        expected = before[name] if still == "stay" else (before[name].int() - 1).clamp(-127, 127).to(torch.int8)
        assert weight.equal(expected)


def test_alpha_of_zero_moves_nothing_and_weights_stay_in_range() -> None:
    tokens = torch.randint(6, (4, 6), generator=torch.Generator().manual_seed(1))
    net = EggNet(6, 8, 1)
    before = {name: weight.clone() for name, weight in net.weights().items()}
    assert EggTrainer(net, members=8, alpha=0.0, table_bits=12).step(tokens).changed == 0.0
    assert all(weight.equal(before[name]) for name, weight in net.weights().items())
    for weight in net.weights().values():
        weight.fill_(127)
    trainer = EggTrainer(net, members=8, alpha=1.0, still="down", table_bits=12)
    trainer.apply(torch.tensor([1, -1, 1, 1], dtype=torch.int8))
    for weight in net.weights().values():
        assert weight.max() <= 127
        assert weight.min() >= 126
        weight.fill_(-127)
    trainer.apply(torch.tensor([1, -1, 1, 1], dtype=torch.int8))
    assert min(int(weight.min()) for weight in net.weights().values()) == -127


def test_the_share_of_moved_weights_is_about_alpha() -> None:
    """Z is a sum over many pairs, so nearly normal; products of two entries and truncation make the tails a little heavier."""
    net = EggNet(64, 32, 1)
    trainer = EggTrainer(net, members=256, alpha=0.2, table_bits=20)
    signs = torch.randint(0, 2, (128,), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(torch.int8)
    assert trainer.apply(signs) == pytest.approx(0.2, abs=0.03)


def test_one_pair_moves_with_the_noise_of_the_better_member() -> None:
    net = EggNet(5, 4, 1, seed=1)
    before = net.wf.clone()
    trainer = EggTrainer(net, members=2, alpha=1.0, table_bits=12)
    a, b = trainer.drawn("wf", [0])
    trainer.apply(torch.tensor([-1], dtype=torch.int8))
    expected = -torch.sign(a[0, 0][:, None].int() * b[0, 0][None].int())
    assert (net.wf[0].int() - before[0]).equal(expected)


def workers(tokens: list[Tensor], cut: int) -> tuple[EggNet, EggNet]:
    """Two processes, simulated: each reads its own pairs and hears the other's signs."""
    nets = EggNet(8, 6, 1, seed=2), EggNet(8, 6, 1, seed=2)
    heard: dict[int, Tensor] = {}
    parts = ((0, cut), (cut, 6))
    trainers = []
    for number, part in enumerate(parts):

        def share(own: Tensor, number: int = number) -> Tensor:
            heard[number] = own
            return torch.zeros(6, dtype=torch.int8)  # the votes are applied below, when both are known

        trainers.append(EggTrainer(nets[number], 12, pairs=part, share=share, table_bits=14, alpha=0.0))
    for step in tokens:
        for trainer in trainers:
            trainer.alpha = Alpha(fixed=0.0)
            trainer.step(step)
            trainer.count -= 1
        both = torch.cat([heard[0], heard[1]])
        for trainer in trainers:
            trainer.alpha = Alpha()
            trainer.apply(both)
    return nets


def test_workers_that_share_signs_equal_one() -> None:
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(8, (3, 7), generator=generator) for _ in range(4)]
    alone = EggNet(8, 6, 1, seed=2)
    trainer = EggTrainer(alone, 12, table_bits=14)
    for step in tokens:
        trainer.step(step)
    for net in workers(tokens, 2):
        for name, weight in net.weights().items():
            assert weight.equal(alone.get_buffer(name)), name


def test_resume_is_exact() -> None:
    generator = torch.Generator().manual_seed(6)
    tokens = [torch.randint(8, (2, 6), generator=generator) for _ in range(4)]
    net = EggNet(8, 6, 2)
    trainer = EggTrainer(net, 8, table_bits=14)
    for step in tokens[:2]:
        trainer.step(step)
    saved, weights = trainer.state_dict(), {k: v.clone() for k, v in net.state_dict().items()}
    for step in tokens[2:]:
        trainer.step(step)
    again = EggNet(8, 6, 2, seed=9)
    again.load_state_dict(weights)
    resumed = EggTrainer(again, 8, table_bits=14)
    resumed.load_state_dict(saved)
    for step in tokens[2:]:
        resumed.step(step)
    assert all(weight.equal(net.get_buffer(name)) for name, weight in again.weights().items())
    assert resumed.hidden.equal(trainer.hidden)
    with pytest.raises(CheckpointError, match="seed: saved with 0"):
        EggTrainer(again, 8, table_bits=14, seed=1).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="hidden: saved for"):
        EggTrainer(again, 6, table_bits=14).load_state_dict(saved)


def test_noise_is_of_the_step_the_pair_and_the_weight() -> None:
    trainer = EggTrainer(EggNet(8, 8, 2), 8, table_bits=16)
    first = trainer.drawn("wf", [0, 1])
    assert not first[0][0].equal(first[0][1])
    assert not first[0][:, 0].equal(first[0][:, 1])  # layers
    assert not first[0].equal(trainer.drawn("wh", [0, 1])[0])
    assert trainer.drawn("wf", [1])[0].equal(first[0][1:])  # a pair alone
    trainer.count = 1
    assert not first[0].equal(trainer.drawn("wf", [0, 1])[0])
    for_ever = EggTrainer(trainer.net, 8, table_bits=16, reuse=0)
    one = for_ever.drawn("wf", [0])
    for_ever.count = 7
    assert one[0].equal(for_ever.drawn("wf", [0])[0])


def test_the_table_is_cut_normal_numbers() -> None:
    entries = NoiseTable(bits=20).entries.double()
    assert entries.std().item() == pytest.approx(16.0, rel=0.03)  # cutting towards zero takes a little
    assert entries.mean().abs().item() < 0.06  # 16 / sqrt(2^20), four times
    assert int((entries == 0).sum()) / len(entries) == pytest.approx(2 * 0.0249, rel=0.05)  # P(|16 N| < 1)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda net: EggTrainer(net, 5), "members: 5; expected an even number"),
        (lambda net: EggTrainer(net, 4, alpha=1.5), "alpha: 1.5; expected a share"),
        (lambda net: EggTrainer(net, 4, pairs=(0, 1)), "share="),
        (lambda net: EggTrainer(net, 4, pairs=(1, 3)), "not within the 2 pairs"),
        (lambda net: EggTrainer(net, 4, still="up"), "still: 'up'; expected one of stay, down"),
        (lambda net: EggTrainer(net, 4).step(torch.zeros(3, 5, dtype=torch.long)), "streams dividing 2 pairs"),
        (lambda net: EggTrainer(net, 4).apply(torch.zeros(3, dtype=torch.int8)), r"expected \[2\]"),
        (lambda net: NoiseTable(bits=10).rows(0, [0], 2000), "no stretch of 2000"),
        (lambda net: EggNet(300), "expected at most 256"),
    ],
)
def test_bad_input_is_one_clear_line(build: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(EggNet(4, 4, 1))


def test_noise_of_nobody_changes_nothing() -> None:
    net = EggNet(6, 8, 2)
    tokens = torch.randint(6, (2, 8), generator=torch.Generator().manual_seed(0))
    trainer = EggTrainer(net, 4, table_bits=12)
    noise = trainer.noise(range(1))
    silent = Noise(
        {k: (a * 0, b) for k, (a, b) in noise.factors.items()}, {k: v * 0 for k, v in noise.vectors.items()}, 8
    )
    assert net.read(tokens, noise=silent)[0].equal(net.read(tokens)[0])
