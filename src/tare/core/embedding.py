"""Stable embedding (Dettmers, Lewis, Shleifer, Zettlemoyer 2022, arXiv 2110.02861): what makes 8-bit moments safe for language models.

Xavier uniform values and a layer norm after the look-up keep the embedding's gradients alike in size; its moments stay in
32 bits, which is `Storage(keep=("embedding",))`.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from tare.core.errors import InputError

Model = TypeVar("Model", bound=nn.Module)


class StableEmbedding(nn.Embedding):
    """`nn.Embedding` with Xavier uniform values and a layer norm after the look-up; the same arguments.

    >>> import torch
    >>> table = StableEmbedding(11, 4, padding_idx=0)
    >>> table(torch.tensor([[1, 2, 0]])).shape, [name for name, _ in table.named_parameters()]
    (torch.Size([1, 3, 4]), ['weight', 'norm.weight', 'norm.bias'])
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.norm = nn.LayerNorm(embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(input))
        return out


def stable_embedding_(model: Model, reset: bool = True) -> Model:
    """Put a `StableEmbedding` in the place of the model's input embedding, before the optimizer is built.

    The model then computes something else (a layer norm more), so this is for training from the start. A saved `transformers`
    folder of such a model needs the same swap: build the model from its configuration, call this, then load the weights.

    Args:
        model: a `transformers` model, or a module with exactly one `nn.Embedding`; changed in place.
        reset: draw Xavier uniform values (the paper), from torch's global generator; False keeps the present ones.

    Returns:
        The model. One that has a stable embedding already is left as it is.

    Raises:
        InputError: no such embedding, several, one that does more than look up, or one that is tied to another weight.

    >>> from torch import nn
    >>> type(stable_embedding_(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)))[0]).__name__
    'StableEmbedding'
    """
    name, old = _input_embedding(model)
    if isinstance(old, StableEmbedding):
        return model
    if type(old) is not nn.Embedding:
        raise InputError(
            f"stable_embedding_: {name} is a {type(old).__name__}, not a plain nn.Embedding; replace it by hand"
        )
    users = [other for other, p in model.named_parameters(remove_duplicate=False) if p is old.weight]
    if len(users) > 1:
        raise InputError(
            f"stable_embedding_: {users[0]} is tied to {users[1]}, which has no layer norm and would change scale with it; "
            "build the model with tie_word_embeddings=False"
        )
    w = old.weight
    new = StableEmbedding(
        old.num_embeddings, old.embedding_dim, old.padding_idx, old.max_norm, old.norm_type, old.scale_grad_by_freq,
        old.sparse, device=w.device, dtype=w.dtype,
    )  # fmt: skip
    if not reset:
        new.weight = w
    new.weight.requires_grad_(w.requires_grad)
    new.train(old.training)
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, new)
    return model


def _input_embedding(model: nn.Module) -> tuple[str, nn.Module]:
    """Its name and module: what `get_input_embeddings` gives, else the only one there is."""
    wanted = getattr(model, "get_input_embeddings", lambda: None)()
    tables = [(n, m) for n, m in model.named_modules() if (m is wanted if wanted else isinstance(m, nn.Embedding))]
    if len(tables) == 1 and tables[0][0]:
        return tables[0]
    found = ", ".join(n or "the module itself" for n, _ in tables) or "none"
    raise InputError(f"stable_embedding_: expected one input embedding inside the model, found {found}")
