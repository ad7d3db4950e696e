"""GPTQ-like checkpoints, read into `QuantizedLinear` layers: `qweight`, `qzeros`, `scales` and `g_idx` of each layer in safetensors files.

W[o, i] = scales[g_idx[i], o] (code[i, o] - zero[g_idx[i], o]). Codes lie along the inputs, 32 / bits of them in an int32, lowest bits
first; zeros alike along the outputs, and one less than they are (0 as the largest code) except in the format `gptq_v2`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tare.core.errors import InputError
from tare.zeroth.quantized import QuantizedLinear, replace_module

PARTS = ("qweight", "qzeros", "scales", "g_idx")
Get = Callable[[str], Tensor]


@torch.no_grad()
def load_gptq_(model: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Fill `model`, built from the folder's configuration without weights, with those of a GPTQ checkpoint, in place.

    Args:
        model: its linear layers that are quantised in the folder are replaced by `QuantizedLinear`; all other weights are copied.
        folder: with `*.safetensors` and `config.json` or `quantize_config.json`.
        dtype: of the scales; the files mostly have fp16, in which steps of a scale would be lost.

    Returns:
        The names of the quantised layers.

    Raises:
        InputError: not such a checkpoint, another method of quantisation, bits other than 2, 4 or 8, tensors that do not fit or lack.
    """
    from safetensors import safe_open

    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no *.safetensors files; give the folder of a GPTQ checkpoint")
    settings = _settings(folder)
    opened = [safe_open(file, "pt") for file in files]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    return place_gptq_(
        model, where, lambda name: where[name].get_tensor(name), dtype, legacy_zeros=settings.get("checkpoint_format") != "gptq_v2",
        where=str(folder),
    )  # fmt: skip


@torch.no_grad()
def place_gptq_(
    model: nn.Module, names: Iterable[str], get: Get, dtype: torch.dtype = torch.float32, *, legacy_zeros: bool = True,
    where: str = "checkpoint",
) -> list[str]:  # fmt: skip
    """`load_gptq_` from any source of tensors. legacy_zeros: they are kept one less than they are. where: for errors."""
    names = set(names)
    layers = sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
    if not layers:
        raise InputError(f"{where}: no tensor is called *.qweight; this is not a GPTQ checkpoint")
    for name in layers:
        replace_module(model, name, _layer(model, name, names, get, dtype, legacy_zeros, where))
        names -= {f"{name}.{part}" for part in PARTS}
    own = dict(model.state_dict(keep_vars=True))
    made = {f"{name}.{part}" for name in layers for part in ("codes", "zero", "order", "scale")}
    filled = {own[name].data_ptr() for name in names & own.keys()}  # under one name of several, where weights are tied
    lacking = [name for name in own if name not in names | made and own[name].data_ptr() not in filled]
    if lacking:
        raise InputError(
            f"{where}: lacks {lacking[0]} and {len(lacking) - 1} more of the model; is it of another architecture?"
        )
    for name in sorted(names & own.keys()):
        value = get(name)
        if value.shape != own[name].shape:
            raise InputError(f"{where}: {name} is {tuple(value.shape)}, the model has {tuple(own[name].shape)}")
        own[name].data.copy_(value)
    unknown = sorted(name for name in names - own.keys() if not name.endswith((".inv_freq", ".masked_bias")))
    if unknown:
        raise InputError(f"{where}: {unknown[0]} belongs to nothing in the model; is it of another architecture?")
    return layers


def _layer(
    model: nn.Module, name: str, names: set[str], get: Get, dtype: torch.dtype, legacy_zeros: bool, where: str
) -> QuantizedLinear:
    missing = [part for part in PARTS[:3] if f"{name}.{part}" not in names]
    if missing:
        raise InputError(f"{where}: {name} has qweight but no {missing[0]}; only GPTQ's layout is read")
    try:
        old: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        old = None
    if not isinstance(old, nn.Linear):
        raise InputError(
            f"{where}: {name} is quantised, but the model has {'nothing' if old is None else type(old).__name__} there"
        )
    n, m = old.in_features, old.out_features
    qweight, qzeros, scales = (get(f"{name}.{part}") for part in PARTS[:3])
    bits = qweight.shape[0] * 32 // n if qweight.ndim == 2 else 0
    if bits not in (2, 4, 8) or qweight.dtype != torch.int32 or qweight.shape != (n * bits // 32, m):
        raise InputError(
            f"{where}: {name}.qweight is {tuple(qweight.shape)} {qweight.dtype}; GPTQ's layout of an {m} x {n} layer is int32 of "
            f"({n} * bits / 32, {m}) with 2, 4 or 8 bits"
        )
    groups = scales.shape[0]
    if scales.shape != (groups, m) or qzeros.shape != (groups, m * bits // 32):
        raise InputError(
            f"{where}: {name}: scales {tuple(scales.shape)} and qzeros {tuple(qzeros.shape)} do not go together"
        )
    group = -(-n // groups)
    order = _order(get(f"{name}.g_idx"), n, group, f"{where}: {name}.g_idx") if f"{name}.g_idx" in names else None
    biased = old.bias is not None or f"{name}.bias" in names
    layer = QuantizedLinear(n, m, 8 if bits == 8 else 4, group, biased, dtype=dtype, ordered=order is not None)
    layer = layer.to(old.weight.device)
    codes = _unpack(qweight, bits)  # [n, m], in the order of inputs
    layer.write((codes if order is None else codes[order]).T.contiguous())
    layer.zero.copy_((_unpack(qzeros.T.contiguous(), bits) + int(legacy_zeros)) & (2**bits - 1))
    layer.scale.copy_(scales.T)
    if layer.order is not None and order is not None:
        layer.order.copy_(order)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(m, dtype=old.weight.dtype, device=old.weight.device))
    return layer.train(old.training)


def _order(g_idx: Tensor, n: int, group: int, what: str) -> Tensor | None:
    """Inputs sorted by their group; None where they lie like that already."""
    expected = torch.arange(n) // group
    if g_idx.shape != (n,) or not torch.equal(g_idx.long().sort().values, expected):
        raise InputError(f"{what}: expected the group of each of {n} inputs, {group} to a group")
    return None if torch.equal(g_idx.long(), expected) else torch.argsort(g_idx.long(), stable=True)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """[k, c] int32 -> [k * 32 / bits, c] uint8: the lowest bits of a word are its first row."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(1, -1, 1)
    return ((packed.unsqueeze(1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(0, 1)


def _settings(folder: Path) -> dict[str, Any]:
    """What the folder says of its quantisation."""
    for name in ("quantize_config.json", "config.json"):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text())
            except ValueError as error:
                raise InputError(f"{folder / name}: not JSON ({error})") from None
            found = found.get("quantization_config", found if name.startswith("quantize") else {})
            method = found.get("quant_method", "gptq")
            if method != "gptq":
                raise InputError(f"{folder / name}: quantised by {method!r}; only GPTQ checkpoints are read")
            if found:
                return dict(found)
    return {}
