"""Decoders of transformers, unchanged, block by block: their block lists are found, and the run is MeZO's bit for bit."""

import copy
from typing import Any

import pytest
import torch

from tare.methods.mezo import MeZO
from tare.methods.zo2 import ZO2

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}, "model.layers"),
    "opt": ("OPTForCausalLM", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, "model.decoder.layers"),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16, **ENDS}, "transformer.h"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_of_transformers(kind: str) -> None:
    """OPT and GPT-2 tie head and embedding, drop out unless told not to, and GPT-2 keeps buffers in its blocks."""
    name, own, blocks = KINDS[kind]
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = cls(cls.config_class(**own)).eval()
    twin = copy.deepcopy(net)
    one = MeZO(twin, 1e-3, seed=2)
    most = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in net.modules())
    all_of_it, in_blocks = (4 * sum(p.numel() for p in m.parameters()) for m in (net, net.get_submodule(blocks)))
    buffers = sum(b.numel() * b.element_size() for b in net.buffers())
    budget = all_of_it - in_blocks + buffers + 2 * in_blocks // 3 + 4 * most
    two = ZO2(net, 1e-3, seed=2, device="cpu", budget=budget)
    assert two.stream.blocks[0].name == f"{blocks}.0"
    assert two.stream.ahead == 1
    tokens = torch.arange(24).view(2, 12) * 7 % 61
    for step in range(3):
        batch = (tokens + step) % 61
        wanted = one.step(lambda batch=batch: twin(input_ids=batch, labels=batch).loss)
        assert two.step(lambda batch=batch: net(input_ids=batch, labels=batch).loss) == wanted
    report = two.stream_report()
    assert report.moves == 3, two.explain()
    assert report.peak == budget, "what stays, two blocks, and a module's copy"
    theirs = twin.state_dict()
    for key, value in net.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    with torch.no_grad():
        assert torch.equal(
            net.generate(tokens[:1, :4], max_new_tokens=3), twin.generate(tokens[:1, :4], max_new_tokens=3)
        )
