"""Evaluation: the mean loss over tokens, not over batches, so it does not depend on how the tokens were batched.

`legacy=True` gives the number that the published GaLore, Q-GaLore and APOLLO scripts print: the mean of batch means divided by one
batch too many (their counter starts at 1), which understates perplexity by up to 4 %. Only to compare with their tables.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.parallel.group import Crew
from tare.plan.activations import autocast
from tare.train.config import Precision

Batch = Tensor | tuple[Tensor, int] | Mapping[str, Tensor]
IGNORED = -100  # the label that transformers' losses skip


@dataclass(frozen=True)
class EvalResult:
    """`loss`: mean negative log-likelihood in nats; `perplexity`: its exponential; `tokens`: how many were predicted."""

    loss: float
    perplexity: float
    tokens: int


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    legacy: bool = False,
    crew: Crew | None = None,
    in_step: bool = False,
) -> EvalResult:
    """The loss of a causal language model on batches of tokens.

    loss = sum of -log p(token | tokens before it) / number of tokens predicted; a sequence of n tokens predicts n - 1.

    Args:
        model: any causal LM of `transformers`; evaluated without dropout or gradients, and left in the mode it was in.
        batches: ids [batch, seq], alone or first in a tuple; or mappings with
            `input_ids` and optionally `attention_mask` (0 = padding, not counted) and `labels` (-100 = not counted).
        device: where the model is.
        precision: `bf16-autocast` runs the forward in autocast, as in training.
        legacy: the biased mean of the published scripts, see above.
        crew: workers that share the batches, all given here on each; they all get the whole result. None: this process alone.
        in_step: a forward needs all of them, see `Crew.dealt`.

    Raises:
        InputError: there is nothing to predict.
    """
    crew = crew or Crew()
    total = torch.zeros((), dtype=torch.float64)
    means: list[float] = []
    tokens = 0
    with evaluating(model), torch.no_grad():
        for _, batch, counts in crew.dealt(batches, in_step):
            inputs = prepare(batch, device)
            # A model's loss is the mean over the labels that count, after its shift by one.
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())
            if count == 0 and not in_step:
                continue
            with autocast(precision, torch.device(device).type):
                loss = model(**inputs, use_cache=False).loss
            if count == 0 or not counts:
                continue
            total += loss.double().cpu() * count
            means.append(float(loss))
            tokens += count
    summed, tokens_of_all = crew.sums(float(total), tokens)
    tokens = int(tokens_of_all)
    if tokens == 0:
        raise InputError("evaluation: no tokens to predict; the data is empty, all padding, or one token per sequence")
    mean = sum(means) / (len(means) + 1) if legacy else summed / tokens
    return EvalResult(mean, _exp(mean), tokens)


def prepare(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    """A model's inputs with the labels of next-token prediction; padding is not predicted."""
    batch = batch[0] if isinstance(batch, tuple) else batch
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    moved = {name: tensor.to(device) for name, tensor in given.items()}
    if "labels" not in moved:
        ids = moved["input_ids"]
        mask = moved.get("attention_mask")
        moved["labels"] = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    return moved


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and each put back into the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
