"""Members side by side in one forward have the losses that each has alone, whatever the modules and however many at once."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.methods.eggroll import Eggroll
from tare.zeroth.lowrank import LowRank
from tare.zeroth.members import Members, as_losses, join, split, takes_members
from tare.zeroth.probes import Point
from tare.zeroth.record import Record
from tare.zeroth.side_by_side import SideBySide

MEMBERS = 6


class Bag(nn.Module):
    """Embedding with positions without a batch axis, both norms, a bias that is perturbed and one that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.norm, self.wide, self.rms = nn.LayerNorm(8), nn.Linear(8, 13), nn.RMSNorm(13)
        self.narrow = nn.Linear(13, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.token(x) + self.place(torch.arange(x.shape[1])))
        return self.narrow(self.rms(torch.tanh(self.wide(h))).mean(1))


class Tied(nn.Module):
    """A head that is the embedding, and a weight of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight
        self.inner = Scaled(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.token(x)).flatten(0, 1)).view(*x.shape, 11).sum(1)


class Scaled(nn.Module):
    """Owns a vector and a matrix, and a module that owns more: all of it is run once per member."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale, self.turn = nn.Parameter(torch.ones(d)), nn.Parameter(torch.eye(d))
        self.linear = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale) @ self.turn


class Image(nn.Module):
    """A convolution and a norm over channels, by member; a linear layer by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        picture = nn.functional.one_hot(x, 25).double().to(self.out.weight.dtype)[:, :1].reshape(-1, 1, 5, 5)
        return self.out(self.norm(torch.relu(self.conv(picture))).flatten(1))


class Experts(nn.Module):
    """A stack of matrices [E, m, n]; every row goes to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.stack = nn.Embedding(11, 6), nn.Parameter(torch.randn(2, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsn,emn->bem", self.token(x), self.stack).flatten(1)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    return Wrapped(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Wrapped(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=16,
            )
        )
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    return Wrapped(BertForSequenceClassification(config))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return Wrapped(
        OPTForCausalLM(
            OPTConfig(
                vocab_size=11, hidden_size=8, num_hidden_layers=1, ffn_dim=12, max_position_embeddings=16, num_attention_heads=2,
                word_embed_proj_dim=8, dropout=0.0, pad_token_id=1,
            )
        )
    )  # fmt: skip


class Wrapped(nn.Module):
    """A model of transformers, as one that returns its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bag": Bag, "tied": Tied, "image": Image, "experts": Experts, "gpt2": gpt2, "llama": llama, "bert": bert, "opt": opt,
}  # fmt: skip


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))


def losses_of(name: str, dtype: torch.dtype = torch.float64, **own: Any) -> tuple[tuple[float, ...], list[Tensor]]:
    """The losses of one step, and the weights after it."""
    model, x = built(name, dtype)
    records: list[Record] = []
    options = {"members": MEMBERS, "sigma": 0.1, "vectors": "gaussian", "embeddings": True, "lr": 0.5, **own}
    optimizer = Eggroll(model, on_step=records.append, **options)

    def closure(members: Members) -> Tensor:
        return members.mean(model(members.repeat(x)).double().square())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    return records[0].losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("name", list(MODELS))
def test_as_each_alone(name: str, rank: int) -> None:
    alone, stepped = losses_of(name, rank=rank, together=1)
    side, also = losses_of(name, rank=rank)
    assert len(set(alone)) == MEMBERS
    assert max(abs(a - b) / abs(a) for a, b in zip(alone, side, strict=True)) < 1e-12
    for p, q in zip(stepped, also, strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["bag", "gpt2", "llama"])
def test_as_each_alone_in_single_precision(name: str) -> None:
    alone, _ = losses_of(name, torch.float32, together=1)
    side, _ = losses_of(name, torch.float32)
    assert max(abs(a - b) / abs(a) for a, b in zip(alone, side, strict=True)) < 1e-5


@pytest.mark.parametrize("together", [2, 3, 4, 5, 100])
def test_in_chunks_of_any_size(together: int) -> None:
    whole, weights = losses_of("gpt2", rank=2)
    parts, also = losses_of("gpt2", rank=2, together=together)
    assert max(abs(a - b) / abs(a) for a, b in zip(whole, parts, strict=True)) < 1e-12
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-10) for p, q in zip(weights, also, strict=True))


@pytest.mark.parametrize("own", [{"vectors": "frozen"}, {"embeddings": False}, {"targets": "*wide*"}])
def test_with_some_leaves_frozen(own: dict[str, Any]) -> None:
    alone, _ = losses_of("bag", together=1, **own)
    side, _ = losses_of("bag", **own)
    assert max(abs(a - b) / abs(a) for a, b in zip(alone, side, strict=True)) < 1e-12


def test_the_model_repeats_the_batch_where_the_closure_does_not_ask() -> None:
    model, x = built("bag")
    seen: list[Record] = []
    own = {"members": MEMBERS, "sigma": 0.1, "vectors": "gaussian", "embeddings": True}
    for together, closure in ((1, lambda: model(x).square().mean()), (4, lambda: model(x).square().mean(1))):
        Eggroll(model, lr=0.0, together=together, on_step=seen.append, **own).step(closure)
    for a, b in zip(seen[0].losses, seen[1].losses, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_points_of_several_directions() -> None:
    """A member may stand off along many directions, or none: sums of factors, padded."""
    model, x = built("bag")
    optimizer = Eggroll(model, lr=0.0, members=2, vectors="gaussian", embeddings=True, rank=2)
    points = [Point(), Point(((0, 0.1), (3, -0.2))), Point(((1, 0.3),)), Point(((2, 0.1), (2, -0.1)))]
    leaves = optimizer._moved()
    with torch.no_grad(), SideBySide(model, leaves, points, repeat=True):
        side = model(x).view(4, 3, -1)
    for number, point in enumerate(points):
        with torch.no_grad(), optimizer.memory.at(leaves, point):
            assert torch.allclose(model(x), side[number], rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(model(x), side[0], rtol=0, atol=1e-12)


def test_nothing_is_left_behind() -> None:
    model, x = built("tied")
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = Eggroll(model, lr=0.0, members=4, vectors="gaussian", embeddings=True)

    def closure(members: Members) -> Tensor:
        model(members.repeat(x))
        raise KeyError("the user's own")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert model(x).equal(before)
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_a_module_that_runs_often_draws_once() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = torch.tanh(self.turn(x))
            return x

    drawn: list[int] = []

    class Counting(LowRank):
        def noise(self, draw: Any, members: Any, device: Any) -> Tensor:
            drawn.append(len(members))
            return super().noise(draw, members, device)

    model, x = Recurrent().double(), torch.randn(2, 4, dtype=torch.float64)
    optimizer = Eggroll(model, lr=0.0, members=4, directions=Counting())
    optimizer._compared = True
    optimizer.step(lambda members: members.mean(model(members.repeat(x)).square()))
    assert drawn == [2, 2, 2]  # the first call, the second one and what is kept of it, the update


class Mixing(nn.Module):
    """Rows of a batch see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0, keepdim=True)


class Aside(nn.Module):
    """Reads a weight past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight)


@pytest.mark.parametrize(
    ("kind", "says"), [(Mixing, "does not keep rows apart"), (Aside, "linear.weight: read outside")]
)
def test_a_model_that_cannot_is_evaluated_one_member_at_a_time(kind: type[nn.Module], says: str) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(3, 4, dtype=torch.float64)
    seen: list[Record] = []
    optimizer = Eggroll(model, lr=0.0, sigma=0.1, members=4, on_step=seen.append)

    def closure(members: Members) -> Tensor:
        return members.mean(model(members.repeat(x)).square())

    with pytest.warns(UserWarning, match=says):
        optimizer.step(closure)
    alone = Eggroll(model, lr=0.0, sigma=0.1, members=4, together=1, on_step=seen.append)
    alone.step(closure)
    assert seen[0].losses == seen[1].losses
    optimizer.step(closure)  # and stays so, without a word


@pytest.mark.parametrize("directions", ["low-rank", "gaussian"])
def test_int8_weights_are_decoded_and_never_written_to_evaluate(directions: str) -> None:
    """Factors beside the product with decoded codes; other laws by a decoded copy for each member."""
    x, seen = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), list[Record]()
    for together in (None, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False))
        tare.quantize_weights_(model, ("linear", "head"), group=16)
        own: dict[str, Any] = {"directions": directions, "together": together, "storage": {"weight": "int8"}}
        optimizer = Eggroll(model, lr=0.5, sigma=1e-3, members=6, on_step=seen.append, **own)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(lambda members, model=model: members.mean(model(members.repeat(x)).square()))
        assert all(isinstance(p, Int8Weight) for p in model.parameters())
    assert len({f"{loss:.7g}" for loss in seen[1].losses}) == 6  # far below the gap between two codes
    for a, b in zip(seen[0].losses, seen[1].losses, strict=True):
        assert a == pytest.approx(b, rel=2e-6)
    assert max(seen[1].losses) > min(seen[1].losses) * (1 + 1e-4)


def test_memory_that_does_not_hold_all_members_halves_them() -> None:
    model, x = built("bag")
    sizes: list[int] = []
    seen: list[Record] = []

    def closure(members: Members) -> Tensor:
        sizes.append(len(members))
        if len(members) > 3:
            raise torch.OutOfMemoryError("no")
        return members.mean(model(members.repeat(x)).square())

    optimizer = Eggroll(model, lr=0.0, members=10, sigma=0.1, on_step=seen.append)
    optimizer._compared = True
    with pytest.warns(UserWarning, match="10 members at once do not fit, 5 from now on"):
        optimizer.step(closure)
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    optimizer.step(closure)
    assert sizes[7:] == [2] * 5
    Eggroll(model, lr=0.0, members=10, sigma=0.1, together=1, on_step=seen.append).step(closure)
    assert seen[0].losses == pytest.approx(seen[2].losses, rel=1e-12)


def test_dropout_and_recurrent_modules_are_refused() -> None:
    x = torch.randn(2, 4)
    drops = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    with pytest.warns(UserWarning, match="drop out"), pytest.raises(InputError, match="dropout: members side by side"):
        Eggroll(drops, members=4).step(lambda members: members.mean(drops(members.repeat(x)).square()))
    gru = nn.GRU(4, 4)
    with pytest.raises(InputError, match="GRU cannot run members side by side"):
        Eggroll(gru, members=4).step(lambda members: members.mean(gru(members.repeat(x))[0].square()))


@pytest.mark.parametrize(
    ("closure", "says"),
    [
        (lambda model, x: lambda members: model(x).square().mean(), "given 3 rows for 4 members"),
        (
            lambda model, x: lambda members: model(members.repeat(x)).square().mean(),
            "expected one loss for each of 4 members, got 1",
        ),
        (lambda model, x: lambda members: "four", "expected 4 losses, got str"),
        (lambda model, x: lambda members: members.mean(torch.zeros(7)), r"\(7,\) losses do not divide among 4"),
        (lambda model, x: lambda members, more: 0.0, "takes 2 arguments"),
    ],
)
def test_bad_closures_are_one_clear_line(closure: Any, says: str) -> None:
    model, x = built("bag")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=says):
        Eggroll(model, members=4).step(closure(model, x))
    assert all(p.equal(q) for p, q in zip(model.parameters(), before, strict=True))


def test_together_needs_the_model() -> None:
    net = nn.Linear(4, 2)
    with pytest.raises(InputError, match="together: members run side by side inside the modules"):
        Eggroll(list(net.named_parameters()), together=2)
    with pytest.raises(InputError, match="together"):
        Eggroll(net, together=0)
    assert Eggroll(list(net.named_parameters()), together=2, model=net).model is net


def test_a_default_is_no_argument() -> None:
    assert not takes_members(lambda x=1: x)
    assert not takes_members(lambda *x: x)
    assert takes_members(lambda members: 0)


def test_members_lay_rows_out_one_after_another() -> None:
    members = Members((3, 7), (1, 0))
    x = torch.arange(6).view(3, 2)
    assert members.repeat({"x": x, "n": 4})["x"].equal(torch.cat([x, x]))
    assert members.pick(x[:2, None])[:, 0].tolist() == x[1].tolist()[:1] + x[0].tolist()[:1]
    assert members.mean(torch.tensor([1.0, 3.0, 5.0, 9.0])).tolist() == [2.0, 7.0]
    assert as_losses([1, 2, 3, 4], 2) == [1.5, 3.5]
    parts = [split((torch.cat([x, x]), {"shared": x[:1]}), 6, 2, k) for k in range(2)]
    assert parts[1][0].equal(x)
    assert parts[1][1]["shared"].equal(x[:1])
    assert join(parts)[0].equal(torch.cat([x, x]))
