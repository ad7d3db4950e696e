"""Perturbing weights that are more or less than a float tensor, and what all of it costs at its peak."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tare
from tare.core.errors import InputError
from tare.core.int8_weight import Int8Weight
from tare.plan.measure import StepMeter
from tare.plan.models import build_model
from tare.zeroth.memory import InForward
from tare.zeroth.probes import Point

TOKENS = torch.arange(40).view(4, 10) % 32
POINT = Point(((0, 0.05), (1, -0.02)))


class Net(nn.Module):
    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.functional = nn.Embedding(32, 24), nn.Linear(24, 24), functional
        self.head = nn.Linear(24, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(tokens)))
        return F.linear(h, self.embed.weight) if self.functional else self.head(h)


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS).reshape(-1, 32).float(), TOKENS.reshape(-1))


def built(
    functional: bool = False, dtype: torch.dtype = torch.float32, int8: object = ("linear", "embedding", "head")
) -> Net:
    torch.manual_seed(0)
    model = Net(functional).to(dtype)
    if int8:
        tare.quantize_weights_(model, int8, group=16)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("functional", [False, True])
def test_int8_weights_are_decoded_and_perturbed_as_forward_sees_them(dtype: torch.dtype, functional: bool) -> None:
    model = built(functional, dtype)
    codes = {name: p.codes.clone() for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    optimizer = tare.MeZO(model, lr=0.1, seed=2, storage={"weight": "int8"})
    leaves = optimizer._moved()
    twin = copy.deepcopy(model)
    tare.dequantize_weights_(twin)
    own = dict(twin.named_parameters())
    for leaf in leaves:
        own[leaf.name].data.copy_(leaf.perturbed(POINT))
    for _ in range(2):
        with torch.no_grad():
            found = optimizer.memory.evaluate(leaves, POINT, lambda: loss(model))
            assert torch.equal(found, loss(twin))
    for name, p in model.named_parameters():
        assert isinstance(p, Int8Weight) == (name in codes)
        assert name not in codes or torch.equal(p.codes, codes[name])
    said = "\n".join(optimizer.memory.describe())
    held = "held perturbed for the whole evaluation: embed.weight (read outside its module's forward)"
    assert (held in said) == functional


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: F.linear(torch.ones(24), weight),
        lambda weight: weight.t().sum(),
        lambda weight: weight[3] * 2,
        lambda weight: weight.square(),
        lambda weight: F.embedding(torch.tensor([1]), weight),
        lambda weight: weight.dense(),
    ],
    ids=["product", "view", "row", "operation", "look-up", "decoded"],
)
def test_an_int8_weight_that_is_read_past_its_module_is_refused(read: Callable[[Tensor], Tensor]) -> None:
    model = built()
    weight = model.embed.weight
    optimizer = tare.MeZO(model, lr=0.1, storage={"weight": "int8"})
    before = weight.codes.clone()
    with pytest.raises(InputError, match=r"embed.weight: this quantised weight is read past its module"):
        optimizer.step(lambda: loss(model) + read(weight).sum())
    assert model.embed.weight is weight
    assert torch.equal(weight.codes, before)


def test_int8_steps_train() -> None:
    model = built()
    optimizer = tare.MeZO(model, lr=0.05, n=8, storage={"weight": "int8"})
    first = loss(model).item()
    for _ in range(60):
        optimizer.step(lambda: loss(model))
    assert loss(model).item() < first - 0.1


@pytest.mark.parametrize("weight", ["stochastic", "split24", "master", "plain"])
def test_the_weight_that_forward_sees_is_the_one_perturbed(weight: str) -> None:
    """Whatever a 16-bit weight has beside it, points lie around the 16-bit value, and evaluating writes nothing."""
    model = built(dtype=torch.bfloat16, int8=())
    optimizer = tare.MeZO(model, lr=0.01, storage={"weight": weight})
    optimizer.step(lambda: loss(model))  # there is something beside it now
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    leaves = optimizer._moved()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, leaf in zip(twin.parameters(), leaves, strict=True):
            leaf.add_(p, POINT)
        assert torch.equal(optimizer.memory.evaluate(leaves, POINT, lambda: loss(model)), loss(twin))
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


# -- peaks -------------------------------------------------------------------------------------------------------------


def peaks(model: nn.Module, batch: int, sequence: int, memory: object = "auto", **more: object) -> tuple[int, int]:
    """Bytes at the highest point: of one forward pass without gradients, and of a step."""
    tokens = torch.arange(batch * sequence).view(batch, sequence) % 1000

    def run() -> Tensor:
        found = model(input_ids=tokens, labels=tokens).loss
        return found.float()

    with torch.no_grad():
        run()
        with StepMeter(model, extra=[tokens]) as inference:
            run()
    optimizer = tare.MeZO(model, lr=1e-6, memory=memory, **more)
    optimizer.step(run)
    with StepMeter(model, optimizer, extra=[tokens]) as step:
        optimizer.step(run)
    return inference.peak, step.peak


def largest(model: nn.Module) -> int:
    return max(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "batch", "sequence"), [("llama-tiny", 4, 128), ("llama-9m", 1, 64), ("llama-9m", 4, 128)]
)
def test_a_step_on_all_parameters_needs_inference_and_the_largest_leaf(
    name: str, batch: int, sequence: int, dtype: str
) -> None:
    model = build_model(name, dtype=dtype).eval()
    inference, step = peaks(model, batch, sequence)
    assert step <= 1.05 * (inference + largest(model))


def test_where_the_step_is_all_that_counts_the_largest_leaf_is_what_it_needs() -> None:
    """One token: activations are nothing, so the copies are seen: one leaf at a time, although there are many."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(6)))
    x = torch.ones(1, 512)
    optimizer = tare.MeZO(model, lr=1e-6)
    optimizer.step(lambda: model(x).sum())
    with StepMeter(model, optimizer) as meter:
        optimizer.step(lambda: model(x).sum())
    leaf = 512 * 512 * 4
    assert leaf <= meter.peak - meter.baseline <= 1.06 * leaf + 2**14


def test_the_bound_of_a_module_that_owns_much() -> None:
    """A module's own leaves are copied together, with those of the modules that it is called from."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(256, 256)), nn.Parameter(torch.ones(256, 256))
            self.inner = nn.Linear(256, 256, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x @ self.a @ self.b)

    model = nn.Sequential(Pair(), Pair())
    optimizer = tare.MeZO(model, lr=1e-6)
    x = torch.ones(1, 256)
    optimizer.step(lambda: model(x).sum())
    leaves = optimizer._moved()
    memory = optimizer.memory
    assert isinstance(memory, InForward)
    leaf = 256 * 256 * 4
    assert memory.overhead(leaves) == 3 * leaf
    with StepMeter(model, optimizer) as meter:
        optimizer.step(lambda: model(x).sum())
    assert 3 * leaf <= meter.peak - meter.baseline <= 3.06 * leaf + 2**14


def test_in_place_costs_a_tenth_of_the_model_or_nothing() -> None:
    for memory, share in (("in-place-exact", 0.13), ("in-place", 0.005)):
        model = build_model("llama-9m", dtype="bf16").eval()
        inference, step = peaks(model, 4, 128, memory)
        assert step - inference <= share * sum(p.numel() * 2 for p in model.parameters())


def test_int8_linear_layers_cost_no_more_than_their_decoding() -> None:
    """Inference decodes a layer's weight; a step decodes it and perturbs what it decoded."""
    model = build_model("llama-9m", dtype="bf16").eval()
    tare.quantize_weights_(model, ("linear",))
    inference, step = peaks(model, 4, 128, storage={"weight": "int8"})
    assert step <= 1.05 * (inference + largest(model))


# -- models of transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mixtral", "mamba"])
def test_models_of_transformers_stand_at_the_point(kind: str) -> None:
    """Tied heads, checkpointed blocks, experts in one tensor, weights read past their module: in forward as in place, to the last bit."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    config, auto = {
        "gpt2": (
            transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64),
            transformers.AutoModelForCausalLM,
        ),
        "bert": (transformers.BertConfig(**small, intermediate_size=64), transformers.AutoModelForMaskedLM),
        "mixtral": (
            transformers.MixtralConfig(**small, intermediate_size=64, num_key_value_heads=2),
            transformers.AutoModelForCausalLM,
        ),
        "mamba": (
            transformers.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64),
            transformers.AutoModelForCausalLM,
        ),
    }[kind]
    torch.manual_seed(0)
    model = auto.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    model.gradient_checkpointing_enable()
    found = []
    for memory in ("forward", "in-place-exact"):
        optimizer = tare.MeZO(model, lr=0.1, memory=memory)
        with torch.no_grad():
            found.append(
                [
                    optimizer.memory.evaluate(
                        optimizer._moved(), point, lambda: model(input_ids=TOKENS, labels=TOKENS).loss
                    )
                    for point in (POINT, Point(((0, -0.05),)))
                ]
            )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1])
    moved = tare.MeZO(model, lr=0.1)
    moved.step(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
    elsewhere = {name for name, _ in moved.memory.elsewhere.values()}
    assert bool(elsewhere) == (kind == "mamba")  # whose mixer reads the weights of its own layers
