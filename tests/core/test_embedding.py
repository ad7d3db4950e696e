"""The stable embedding: the swap, what it refuses, and the storage that keeps its moments in 32 bits."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tare.core.embedding import StableEmbedding, stable_embedding_
from tare.core.errors import InputError
from tare.core.storage import Storage
from tare.methods import registry


class Model(nn.Module):
    """Looks like a `transformers` model: position and token embeddings, and one method that says which is which."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.inner = nn.ModuleDict({"tokens": nn.Embedding(40, 16, padding_idx=3), "places": nn.Embedding(9, 16)})
        self.head = nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = self.inner["tokens"].weight

    def get_input_embeddings(self) -> nn.Module:
        return self.inner["tokens"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner["tokens"](tokens))


def test_it_is_xavier_uniform_then_layer_norm() -> None:
    table = StableEmbedding(500, 30, padding_idx=7)
    bound = (6 / (500 + 30)) ** 0.5
    assert table.weight.detach().abs().max() <= bound
    assert abs(table.weight.detach().std().item() - bound / 3**0.5) < 0.05 * bound
    assert (table.weight[7] == 0).all()
    tokens = torch.tensor([[1, 7, 499]])
    wanted = nn.functional.layer_norm(table.weight[tokens], (30,))
    assert torch.equal(table(tokens), wanted)


def test_the_swap_takes_the_input_embedding_only() -> None:
    model = Model()
    before = model.inner["places"].weight
    assert stable_embedding_(model) is model
    new = model.get_input_embeddings()
    assert isinstance(new, StableEmbedding)
    assert (new.num_embeddings, new.embedding_dim, new.padding_idx) == (40, 16, 3)
    assert model.inner["places"].weight is before
    assert type(model.inner["places"]) is nn.Embedding
    again = new.weight
    stable_embedding_(model)
    assert model.get_input_embeddings().weight is again, "a second swap changed it"
    model(torch.tensor([[1, 2]])).sum().backward()


def test_weights_dtype_and_mode_may_stay() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)).to(torch.bfloat16).eval()
    values, frozen = model[0].weight.detach().clone(), model[0].weight.requires_grad_(False)
    stable_embedding_(model, reset=False)
    assert torch.equal(model[0].weight, values)
    assert model[0].weight is frozen
    assert model[0].norm.weight.dtype == torch.bfloat16
    assert not model[0].norm.training


def test_refusals_name_the_cause() -> None:
    with pytest.raises(InputError, match=r"inner\.tokens\.weight is tied to head\.weight.*tie_word_embeddings=False"):
        stable_embedding_(Model(tied=True))
    with pytest.raises(InputError, match="found none"):
        stable_embedding_(nn.Linear(3, 3))
    with pytest.raises(InputError, match="found 0, 1"):
        stable_embedding_(nn.Sequential(nn.Embedding(3, 2), nn.Embedding(3, 2)))
    with pytest.raises(InputError, match="the module itself"):
        stable_embedding_(nn.Embedding(3, 2))

    class Scaled(nn.Embedding):
        pass

    with pytest.raises(InputError, match="0 is a Scaled, not a plain"):
        stable_embedding_(nn.Sequential(Scaled(3, 2)))


def test_kept_roles_have_exact_moments() -> None:
    """keep overrules every form of moment, for the named roles alone; a word, a list or a tuple."""
    for moment in ("int8", "bf16", "bf16_legacy"):
        for keep in ("embedding", ["embedding"], ("embedding", "head")):
            storage = Storage.of({"moment": moment, "min_quantized": 1, "keep": keep})
            optimizer = registry.build("adamw", Model(), 1e-3, storage=storage)
            for leaf, entry in zip(optimizer.leaves, optimizer._entries.values(), strict=True):
                exact = entry.slots["exp_avg"].form == "plain" and entry.slots["exp_avg"].dtype == torch.float32
                assert exact == (leaf.role in keep), f"{leaf.name} with {moment}"
    with pytest.raises(InputError, match=r"embeding.*did you mean 'embedding'"):
        Storage(keep=("embeding",))  # type: ignore[arg-type]


def test_the_option_of_the_8_bit_method() -> None:
    """stable_embedding=True is keep=("embedding",), on top of whatever storage is given."""
    model = stable_embedding_(Model())
    for storage in (None, {"moment": "int8", "min_quantized": 1}, Storage("int8", min_quantized=1, keep=("head",))):
        own = {} if storage else {"min_quantized": 1}
        optimizer = registry.build("adamw-8bit", model, 1e-3, stable_embedding=True, storage=storage, **own)
        forms = {e.leaf.name: e.slots["exp_avg"].form for e in optimizer._entries.values()}
        assert forms["inner.tokens.weight"] == "plain"
        assert forms["inner.tokens.norm.weight"] == "int8"
        assert forms["head.weight"] == ("plain" if isinstance(storage, Storage) else "int8")
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert registry.build("adamw-8bit", Model(), 1e-3).storage.keep == ()


def test_a_saved_transformers_folder_needs_the_same_swap(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
    )  # fmt: skip
    model = stable_embedding_(LlamaForCausalLM(config)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    wanted = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = stable_embedding_(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)), reset=False)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again.eval()(tokens).logits, wanted)
    tied = LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True})
    with pytest.raises(InputError, match=r"embed_tokens\.weight is tied to lm_head\.weight"):
        stable_embedding_(LlamaForCausalLM(tied))
