"""Named models are exactly those of the papers; folders and configs are read safely."""

import json
from pathlib import Path

import pytest
import torch

from tare.core.errors import InputError
from tare.plan.models import MODELS, build_model, build_skeleton, config_for, named, parameter_count

# Method cards, section 2; the small ones are ours.
COUNTS = {
    "llama-tiny": 1_053_824,
    "llama-3m": 3_000_384,
    "llama-9m": 8_917_248,
    "llama-20m": 19_078_272,
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", list(MODELS))
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        assert parameter_count(build_skeleton(config_for(name), torch.float32)) == COUNTS[name]


def test_shapes_follow_the_papers() -> None:
    config = config_for("7B")
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (32_000, 2048, 1e-6)
    assert (config.initializer_range, config.tie_word_embeddings) == (0.02, False)
    assert config_for("llama-60m").max_position_embeddings == 1024


@pytest.mark.parametrize("name", ["7b", "7B", "llama-7b", "LLaMA-7B", " llama-7b "])
def test_names_are_forgiving(name: str) -> None:
    assert named(name) == "llama-7b"


def test_weights_are_a_function_of_the_seed_and_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = build_model("tiny", seed=1), build_model("tiny", seed=1), build_model("tiny", seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    head = first.get_parameter("lm_head.weight")
    assert head.std().item() == pytest.approx(0.02, rel=0.02)  # 131,072 draws: 0.2 % standard error


def test_dtype_by_name() -> None:
    assert {p.dtype for p in build_model("tiny", dtype="bf16").parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_model("tiny", seed=3).save_pretrained(path)  # type: ignore[operator]
    return path


def test_folder_gives_its_weights(folder: Path) -> None:
    loaded, made = build_model(folder, seed=99), build_model("tiny", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), made.parameters(), strict=True))


def test_config_alone_gives_fresh_weights(folder: Path) -> None:
    assert parameter_count(build_model(folder / "config.json", seed=0)) == COUNTS["llama-tiny"]


def refused(call: object, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()  # type: ignore[operator]
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_unknown_name_lists_the_known_and_the_nearest() -> None:
    refused(lambda: config_for("llama-8b"), "llama-7b", "did you mean", "llama-tiny")


def test_bad_configs(tmp_path: Path) -> None:
    refused(lambda: config_for(tmp_path), "config.json", str(tmp_path))
    file = tmp_path / "config.json"
    for text, word in [
        ("{", "JSON"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        ('{"model_type": "lama"}', "lama"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}', "never runs"),
        ('{"model_type": "clip"}', "causal"),
    ]:
        file.write_text(text)
        refused(lambda: config_for(tmp_path), "config.json", word)
    file.write_bytes(b"\xff\xfe\x00")
    refused(lambda: config_for(tmp_path), "config.json")


def test_config_that_cannot_be_built(tmp_path: Path) -> None:
    config = config_for("tiny").to_dict() | {"hidden_size": -3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: build_model(tmp_path))


def test_bad_weights(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    refused(lambda: build_model(tmp_path), "pickled", "safetensors")
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(lambda: build_model(tmp_path), str(tmp_path))
    from safetensors.torch import load, save

    tensors = load(whole)
    (tmp_path / "model.safetensors").write_bytes(
        save({k: v for k, v in tensors.items() if k != "model.norm.weight"}, {"format": "pt"})
    )
    refused(lambda: build_model(tmp_path), "missing", "model.norm.weight")
    tensors["model.norm.weight"][3] = float("nan")
    (tmp_path / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    refused(lambda: build_model(tmp_path), "NaN", "model.norm.weight")
    tensors["model.norm.weight"] = torch.ones(7)
    (tmp_path / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    refused(lambda: build_model(tmp_path), str(tmp_path))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "absent.safetensors", "x.bin"])
def test_index_stays_inside_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(lambda: build_model(tmp_path), name)
