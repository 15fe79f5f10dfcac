"""Export in the layout of compressed-tensors, "pack-quantized", which transformers and vLLM read.

Codes of a row lie one after the other, the lowest bit first, as in `ops.pack_codes`, each row filled up to whole words
of 32 bits; a code is the level plus 2^(bits - 1). Beside them lie scales and the shape of the matrix. The layout has
one width for each linear layer, whole multiples of a scale, and no masks: weights that are zero have the code of zero.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext import ops
from fishleg_ext.common.files import replace_file, require_safetensors
from fishleg_ext.quantization.packed import QuantizedTensor


def export_compressed_tensors(
    model: nn.Module, tensors: Mapping[str, QuantizedTensor], state: Mapping[str, Tensor], folder: Path
) -> dict[str, str]:
    """Write model.safetensors and config.json into a folder.

    Args:
        model: whose `config`, if it is one of transformers, goes into config.json.
        tensors: its quantized parameters.
        state: all other tensors of its state dict.
        folder: made if it is not there.

    Returns:
        name -> why it is written dense, of the quantized parameters that the layout cannot hold.

    Raises:
        ValueError: it can hold none of them.
        ImportError: safetensors is not installed.
    """
    package = require_safetensors()
    content = {name: x.detach().cpu().contiguous().clone() for name, x in state.items()}
    dense: dict[str, str] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.to("cpu")
        layer = name.removesuffix(".weight")
        if reason := _misfit(model, name, tensor):
            dense[name] = reason
            content[name] = tensor.unpack().contiguous()
            continue
        packed, scheme = _packed(tensor)
        content |= {f"{layer}.{key}": x for key, x in packed.items()}
        group = groups.setdefault(json.dumps(scheme), {"targets": [], "weights": scheme})
        group["targets"].append(layer)
    if not groups:
        raise ValueError(f"the layout holds none of the parameters: {'; '.join(f'{n}: {w}' for n, w in dense.items())}")
    known = {layer for group in groups.values() for layer in group["targets"]}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in known],
    }
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    config = json.loads(to_json(use_diff=False)) if to_json is not None else {}
    text = json.dumps({**config, "quantization_config": quantization}, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda partial: package.torch.save_file(content, partial, {"format": "pt"})
    replace_file(folder / "model.safetensors", write)
    replace_file(folder / "config.json", lambda partial: partial.write_text(text))
    return dense


def _misfit(model: nn.Module, name: str, tensor: QuantizedTensor) -> str:
    """Say why the layout cannot hold a parameter; empty where it can."""
    layer, _, last = name.rpartition(".")
    if last != "weight" or not isinstance(model.get_submodule(layer), nn.Linear):
        return "it is the weight of no linear layer"
    if tensor.scale is None:
        return "it has a codebook, and not fixed-point numbers"
    if tensor.half:
        return "it was quantized under a mask, by levels without zero; quantize it without masks"
    if len(tensor.bits.unique()) != 1 or not 1 <= int(tensor.bits[0]) <= 8:
        return "its groups have different bits; quantize it with allocate=False"
    columns = tensor.shape[1]
    if tensor.group_size < columns and columns % tensor.group_size:
        return f"its groups of {tensor.group_size} do not divide its rows of {columns}"
    if columns < tensor.group_size < tensor.numel:
        return f"its groups of {tensor.group_size} are longer than its rows of {columns}"
    return ""


def _packed(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of one layer, and how they are to be read."""
    assert tensor.scale is not None
    rows, columns = tensor.shape
    width = int(tensor.bits[0])
    words = math.ceil(columns * width / 32)
    bits = torch.full((rows,), width, dtype=torch.uint8)
    packed = ops.pack_codes(tensor.codes(), bits, 4 * words * torch.arange(rows), 4 * words * rows, columns)
    scheme: dict[str, Any] = {"num_bits": width, "type": "int", "symmetric": True}
    if tensor.group_size == tensor.numel:
        scale, scheme["strategy"] = tensor.scale, "tensor"
    elif tensor.group_size == columns:
        scale, scheme["strategy"] = tensor.scale.view(rows, 1), "channel"
    else:
        scale = tensor.scale.view(rows, -1)
        scheme |= {"strategy": "group", "group_size": tensor.group_size}
    shape = torch.tensor([rows, columns])
    return {
        "weight_packed": packed.view(torch.int32).view(rows, words),
        "weight_scale": scale.to(tensor.dtype),
        "weight_shape": shape,
    }, scheme
