"""Our files of tensors are what the `safetensors` package reads and would have written, and a part is read as a part."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tare.core.errors import CheckpointError
from tare.train import tensorfile
from tare.train.tensorfile import TensorFile


def tensors() -> dict[str, torch.Tensor]:
    some = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = {
        str(dtype)[6:]: (some * 50).abs().to(dtype)
        for dtype in tensorfile.DTYPES
        if not dtype.is_floating_point or dtype.itemsize > 1
    }
    found |= {str(dtype)[6:]: some.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    return {
        **found, "number": torch.tensor(2.5), "none": torch.zeros(0, 4), "turned": torch.arange(6.0).reshape(2, 3).T,
        "odd": torch.tensor([True]), "name.with/marks é": torch.ones(2),
    }  # fmt: skip


def test_the_package_reads_every_dtype_bit_for_bit(tmp_path: Path) -> None:
    given = tensors()
    fact = tensorfile.write(tmp_path / "a", given, {"note": "é"})
    data = (tmp_path / "a").read_bytes()
    assert fact == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    back = load_file(tmp_path / "a")
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


def test_the_bytes_are_those_of_the_package(tmp_path: Path) -> None:
    given = {name: tensor.contiguous() for name, tensor in tensors().items()}
    tensorfile.write(tmp_path / "ours", given)
    save_file(given, tmp_path / "theirs", {"format": "pt"})
    ours, theirs = TensorFile(tmp_path / "ours"), TensorFile(tmp_path / "theirs")
    assert (sorted(ours.names), ours.shapes, ours.dtypes) == (sorted(theirs.names), theirs.shapes, theirs.dtypes)
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_more_than_a_chunk_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "CHUNK", 7)
    given = {"a": torch.randn(13), "b": torch.arange(5, dtype=torch.uint8)}
    tensorfile.write(tmp_path / "a", given)
    assert all(torch.equal(tensor, given[name]) for name, tensor in load_file(tmp_path / "a").items())


def test_a_part_is_read_as_a_part(tmp_path: Path) -> None:
    given = torch.arange(60.0).reshape(5, 4, 3)
    tensorfile.write(tmp_path / "a", {"x": given, "n": torch.tensor(1.0)})
    file = TensorFile(tmp_path / "a")
    assert torch.equal(file.part("x", (1, 2, 0), (3, 2, 3)), given[1:4, 2:4])
    assert torch.equal(file.part("x", (0, 0, 0), (5, 4, 3)), given)
    assert file.part("n", (), ()).item() == 1.0
    assert file.part("x", (2, 0, 0), (0, 4, 3)).shape == (0, 4, 3)


def test_an_unknown_dtype_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state z: a tensor of torch\.complex64"):
        tensorfile.write(tmp_path / "a", {"z": torch.zeros(1, dtype=torch.complex64)})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("size", [0, 4, 40, 300])
def test_a_torn_file_is_named(size: int, tmp_path: Path) -> None:
    tensorfile.write(tmp_path / "a", {"x": torch.zeros(100)})
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match="a: damaged"):
        TensorFile(tmp_path / "a")
