"""Loops that are somebody else's: what they sum in release mode, what they save, and what they are warned of."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tare
from tare.core.errors import InputError
from tare.parallel.frameworks import follow_accelerate

pytest.importorskip("accelerate")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 5, 6, generator=generator))


def accelerated(
    release: bool, count: int, follow: bool = True, method: str = "adamw", **more: Any
) -> dict[str, Tensor]:
    """`count` micro-batches, three a step; the last step has fewer where that does not divide."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = net()
    loader = torch.utils.data.DataLoader(batches(count), batch_size=None)
    model, optimizer, loader = accelerator.prepare(
        model, tare.create(method, model, lr=1e-2, release=release, **more), loader
    )
    if follow:
        assert follow_accelerate(optimizer) is optimizer
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("count", [6, 7])
def test_release_in_a_loop_of_accelerate_is_the_ordinary_step(count: int) -> None:
    ordinary, released = accelerated(False, count), accelerated(True, count)
    assert all(torch.equal(ordinary[name], released[name]) for name in ordinary)


def test_projected_gradients_are_summed_too() -> None:
    more = {"rank": 2, "period": 2}
    ordinary, released = (accelerated(release, 9, method="galore", **more) for release in (False, True))
    for name, p in ordinary.items():
        torch.testing.assert_close(released[name], p, rtol=0, atol=1e-6)  # a sum of projections, rounded otherwise


def test_who_does_not_follow_is_warned() -> None:
    with pytest.warns(UserWarning, match=r"backward ran more than once before step\(\).*accumulate_while"):
        wrong = accelerated(True, 6, follow=False)
    right = accelerated(False, 6)
    assert not torch.equal(wrong["0.weight"], right["0.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerated(True, 6)


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(InputError, match="follow_accelerate: expected an optimizer of tare, got a SGD"):
        follow_accelerate(torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(InputError, match=r"release with accumulation: .* scales the raw gradient"):
        follow_accelerate(tare.create("apollo", net(), lr=1e-3, rank=2, release=True))
    follow_accelerate(tare.create("apollo", net(), lr=1e-3, rank=2))  # where nothing is released nothing is to be done


def test_no_longer() -> None:
    optimizer = tare.AdamW(model := net(), lr=1e-2, release=True)
    optimizer.accumulate_while(lambda: True)
    model(batches(1)[0]).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.accumulate_while(None)
    model(batches(1)[0]).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())


def test_bare_tensors_of_a_trainer_are_told_apart_by_shape_only() -> None:
    """The trap of `optimizer_cls_and_kwargs` without "params": an embedding is stepped like a layer."""
    table = nn.Embedding(20, 8)
    bare = tare.GaLore([{"params": list(table.parameters())}], lr=1e-2, rank=2)
    named = tare.GaLore(table, lr=1e-2, rank=2)
    assert (bare.leaves[0].role, named.leaves[0].role) == ("linear", "embedding")


@pytest.mark.parametrize("key", ["galore", "adamw-8bit", "fira", "adamw-4bit"])
def test_a_plain_loop_resumes_from_torch_save(key: str) -> None:
    """`weights_only`, and state in its own dtype: torch's own loading would make floats of codes."""
    more: dict[str, Any] = {"rank": 2} if key in ("galore", "fira") else {}
    storage = {"min_quantized": 1} if key.startswith("adamw") else {"moment": "int8", "min_quantized": 1}

    def built(model: nn.Module) -> tare.Optimizer:
        return tare.create(key, model.bfloat16(), lr=1e-2, storage={**storage, "weight": "stochastic"}, **more)

    def steps(model: nn.Module, optimizer: tare.Optimizer, some: list[Tensor]) -> None:
        for x in some:
            model(x.bfloat16()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    one = net()
    optimizer = built(one)
    steps(one, optimizer, batches(3))
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(one, optimizer, batches(6)[3:])
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = net().bfloat16()
    other.load_state_dict(saved["model"])
    again = built(other)
    again.load_state_dict(saved["optimizer"])
    steps(other, again, batches(6)[3:])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert all(
            v.dtype == b[k].dtype and torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
        )


@pytest.mark.slow
def test_trainer_in_release_mode_is_the_ordinary_trainer(tmp_path: Path) -> None:
    """AdamW, bit for bit: three micro-batches a step, the last step of the epoch has fewer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(8) + torch.arange(14)[:, None]) % 30]
    found = []
    for release in (False, True):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32, max_position_embeddings=16))
        arguments = TrainingArguments(
            str(tmp_path / str(release)), num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=3,
            max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        given = {"lr": 1e-2, "params": model, "release": release}
        trainer = Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(tare.AdamW, given))
        follow_accelerate(trainer.create_optimizer())
        trainer.train()
        assert trainer.state.global_step == 6
        found.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in found), strict=True))
