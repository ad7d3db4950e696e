"""Evaluation against losses computed by hand."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tare.core.errors import InputError
from tare.train.evaluate import evaluate


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=97, attention_dropout=0.5)).train()


def ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 97, (rows, columns), generator=torch.Generator().manual_seed(seed))


def token_losses(model: LlamaForCausalLM, row: torch.Tensor) -> list[float]:
    """-log p of every token but the first, one row at a time, in fp64."""
    model.eval()
    with torch.no_grad():
        logits = model(row[None]).logits[0].double()
    model.train()
    return [-float(functional.log_softmax(logits[at], -1)[row[at + 1]]) for at in range(len(row) - 1)]


def test_the_loss_is_the_mean_over_tokens_whatever_the_batches(model: LlamaForCausalLM) -> None:
    batches = [ids(4, 17, 1), ids(1, 5, 2), ids(2, 9, 3)]
    by_hand = [loss for batch in batches for row in batch for loss in token_losses(model, row)]
    result = evaluate(model, batches)
    assert result.tokens == len(by_hand) == 4 * 16 + 4 + 2 * 8
    # each batch's mean is rounded to fp32: relative 6e-8, plus the error of fp32 logits
    assert result.loss == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    one_by_one = evaluate(model, [row[None] for batch in batches for row in batch])
    assert one_by_one.loss == pytest.approx(result.loss, rel=1e-6)
    assert one_by_one.tokens == result.tokens


def test_padding_is_not_predicted(model: LlamaForCausalLM) -> None:
    rows = ids(3, 12, 4)
    lengths = (12, 7, 1)
    mask = torch.stack([(torch.arange(12) < length).long() for length in lengths])
    by_hand = [
        loss
        for row, length in zip(rows, lengths, strict=True)
        for loss in (token_losses(model, row[:length]) if length > 1 else [])
    ]
    result = evaluate(model, [{"input_ids": rows, "attention_mask": mask}])
    assert result.tokens == len(by_hand) == 11 + 6
    assert result.loss == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-6)


def test_a_batch_of_padding_alone_counts_nothing_and_is_no_nan(model: LlamaForCausalLM) -> None:
    rows = ids(2, 6, 5)
    empty = {"input_ids": rows, "attention_mask": torch.tensor([[1] + [0] * 5] * 2)}
    assert evaluate(model, [rows, empty]) == evaluate(model, [rows])
    with pytest.raises(InputError, match="no tokens to predict"):
        evaluate(model, [empty])
    with pytest.raises(InputError, match="no tokens to predict"):
        evaluate(model, [])


def test_legacy_divides_the_batch_means_by_one_too_many(model: LlamaForCausalLM) -> None:
    # the published loop starts its batch counter at 1 and takes the mean of batch means
    batches = [ids(4, 17, 1), ids(1, 5, 2), ids(2, 9, 3)]
    means = []
    for batch in batches:
        losses = [loss for row in batch for loss in token_losses(model, row)]
        means.append(sum(losses) / len(losses))
    result = evaluate(model, batches, legacy=True)
    assert result.loss == pytest.approx(sum(means) / (len(means) + 1), rel=1e-6)
    assert result.loss < evaluate(model, batches).loss


def test_the_model_is_left_as_it_was(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[0].eval()
    before = torch.get_rng_state()
    first = evaluate(model, [(ids(2, 9, 6), 16)])
    assert first == evaluate(model, [ids(2, 9, 6)])  # without dropout, so equal
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()


def test_autocast_evaluates_in_bf16(model: LlamaForCausalLM) -> None:
    batch = ids(2, 9, 7)
    exact, rough = evaluate(model, [batch]), evaluate(model, [batch], precision="bf16-autocast")
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=2e-2)  # bf16 keeps 8 bits
