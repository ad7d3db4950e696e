"""Roles of the parameters of real models: what is an embedding, a head, a norm, and that a tied weight counts once."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
)

from tare.core.errors import InputError
from tare.core.leaf import Leaf, named_roles, role_of_name
from tare.methods import registry


def llama(tied: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def roles(model: nn.Module) -> dict[str, str]:
    return {name: role for name, _, role in named_roles(model)}


def test_llama() -> None:
    found = roles(llama(tied=False))
    assert found["model.embed_tokens.weight"] == "embedding"
    assert found["lm_head.weight"] == "head"
    assert found["model.norm.weight"] == "norm"
    for name, role in found.items():
        if ".layers." in name:
            assert role == ("norm" if "layernorm" in name else "linear"), name
    assert sum(role == "linear" for role in found.values()) == 2 * 7


def test_llama_tied_counts_once() -> None:
    model = llama(tied=True)
    found = roles(model)
    assert "lm_head.weight" not in found
    assert found["model.embed_tokens.weight"] == "embedding"
    opt = registry.build("galore", model, 0.01, rank=4)
    assert len(opt.leaves) == len(found) == len(list(model.parameters()))
    dense = 2 * 4 * 40 * 16
    assert opt.state_bytes().by_role["embedding"] == dense


def test_gpt2_with_its_conv1d_layers() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    found = roles(model)
    assert "lm_head.weight" not in found
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == "embedding"
    assert found["transformer.ln_f.weight"] == found["transformer.h.0.ln_1.weight"] == "norm"
    assert found["transformer.h.1.attn.c_attn.weight"] == found["transformer.h.0.mlp.c_proj.weight"] == "linear"
    assert found["transformer.h.0.attn.c_attn.bias"] == found["transformer.ln_f.bias"] == "bias"


def bert() -> Any:
    return BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip


def test_bert() -> None:
    found = roles(BertForMaskedLM(bert()))
    for name, role in found.items():
        last = name.rsplit(".", 1)[1]
        if last == "bias":
            assert role == "bias", name
        elif "LayerNorm" in name:
            assert role == "norm", name
        elif "embeddings" in name:
            assert role == "embedding", name
        elif "encoder" in name:
            assert role == "linear", name
    assert "cls.predictions.decoder.weight" not in found  # tied
    assert roles(BertForSequenceClassification(bert()))["classifier.weight"] == "head"


def test_every_model_is_stepped_by_every_method() -> None:
    tokens = torch.arange(24).view(2, 12) % 40
    for model in (
        llama(True),
        AutoModelForCausalLM.from_config(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)),
    ):
        for key in sorted(registry.keys("gradient")):
            own = {**registry.card(key).every_leaf, **({"rank": 1} if "rank" in registry.options(key) else {})}
            opt = registry.build(key, model, 1e-3, **own)
            before = [p.detach().clone() for p in model.parameters()]
            model(input_ids=tokens, labels=tokens).loss.backward()
            opt.step()
            opt.zero_grad()
            moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert all(moved), key


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("", (3, 4), "linear"), ("", (3,), "norm"), ("", (), "scalar"), ("a.bias", (3,), "bias"),
        ("a.lm_head.weight", (9, 3), "head"), ("score.weight", (2, 3), "head"), ("wte.weight", (9, 3), "embedding"),
        ("tok_embeddings.weight", (9, 3), "embedding"), ("pos_embed", (9, 3), "embedding"), ("conv.weight", (2, 3, 5, 5), "conv"),
        ("experts.w1", (4, 3, 5), "expert"), ("mlp.up.weight", (5, 3), "linear"), ("a.scale", (), "scalar"),
    ],
)  # fmt: skip
def test_roles_from_names_alone(name: str, shape: tuple[int, ...], role: str) -> None:
    assert role_of_name(name, shape) == role


def test_the_matrix_of_a_leaf() -> None:
    def leaf(shape: tuple[int, ...], role: Any = "linear") -> Leaf:
        return Leaf("x", shape, torch.float32, role)

    assert leaf((3, 4)).matrix == (3, 4)
    assert leaf((8, 3, 5, 5), "conv").matrix == (8, 75)
    assert leaf((3, 4, 5), "expert").matrix == (4, 5)
    assert leaf((3, 4, 5), "expert").view == (3, 4, 5)
    assert leaf((7,)).matrix is None
    assert leaf(()).matrix is None
    assert leaf((0, 4)).matrix is None


def test_a_misspelt_role_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'embedding'"):
        registry.build("adamw", [{"params": [nn.Parameter(torch.ones(2, 2))], "role": "embeding"}], 0.1)
