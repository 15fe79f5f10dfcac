"""Files of quantized models: safetensors, in which each parameter is its streams of bytes, with a checksum of all.

`NAME.codes` holds codes, packed as `ops.pack_codes` does or in Huffman's code; `NAME.codebook` or `NAME.scale` what
they stand for; `NAME.bits` the width of each group where these differ; `NAME.mask` which weights are kept, as one bit
each or as the lengths of the gaps between them, whichever is shorter. All other tensors of the model's state dict are
there as they are. The file's metadata says which of these ways was taken.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.files import read_safetensors, replace_file, require_safetensors
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.ops.quantize import MAX_BITS
from fishleg_ext.quantization.entropy import (
    ESCAPE,
    best_escape,
    from_gaps,
    from_huffman,
    gaps_of,
    huffman,
    pack_uniform,
    unpack_uniform,
)
from fishleg_ext.quantization.packed import QuantizedTensor

KEY = "fishleg_ext.quantized"
CHECKSUM = "sha256"
STREAMS = ("codes", "codebook", "scale", "bits", "mask")


def streams_of(tensor: QuantizedTensor, coding: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the streams of one parameter, on the CPU, and what must be known to read them.

    Args:
        tensor: the parameter.
        coding: "fixed" or "entropy".
    """
    tensor = tensor.to("cpu")
    entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    streams: dict[str, Tensor] = {}
    if not tensor.orientation.is_plain:
        o = tensor.orientation
        entry["orientation"] = {"split": list(o.split), "order": list(o.order), "num_out": o.num_out}
    if tensor.group_size < tensor.numel:
        entry["group_size"] = tensor.group_size
    widths = tensor.bits.unique()
    if len(widths) == 1:
        entry["bits"] = int(widths)
    else:
        streams["bits"] = tensor.bits
    if tensor.scale is not None:
        streams["scale"] = tensor.scale
        entry |= {"half": True} if tensor.half else {}
    else:
        assert tensor.codebook is not None
        streams["codebook"] = tensor.codebook
    mask = tensor.mask()
    streams["codes"] = tensor.packed
    if coding == "entropy":
        codes = tensor.codes() if mask is None else tensor.codes()[mask]
        coded = _bytes(huffman(codes))
        if len(coded) < len(tensor.packed):  # else Huffman's code would be longer
            streams["codes"] = coded
            entry |= {"codes": "huffman", "num_codes": len(codes)}
    if mask is not None:
        assert tensor.packed_mask is not None
        streams["mask"] = tensor.packed_mask
        if coding == "entropy":
            gaps = gaps_of(mask)
            shorter, how = _bytes(huffman(gaps)), {"mask": "huffman", "num_gaps": len(gaps)}
        else:
            width, gaps = best_escape(mask)
            shorter, how = pack_uniform(gaps, width), {"mask": width, "num_gaps": len(gaps)}
        if len(shorter) < len(tensor.packed_mask):
            streams["mask"] = shorter
            entry |= how
    return streams, entry


def tensor_of(name: str, streams: Mapping[str, Tensor], entry: Mapping[str, Any]) -> QuantizedTensor:
    """Return the parameter that `streams_of` cut up.

    Raises:
        ValueError: the streams do not fit together.
    """
    try:
        shape = [int(size) for size in entry["shape"]]
        dtype = getattr(torch, str(entry["dtype"]))
        given = entry.get("orientation")
        orientation = Orientation.of(shape)
        if given is not None:
            orientation = Orientation.of(shape, given["order"], split=given["split"], num_out=int(given["num_out"]))
        numel = math.prod(shape)
        if min(shape, default=0) < 0:
            raise ValueError(f"expected sizes >= 0, got shape {shape}")
        if not isinstance(dtype, torch.dtype) or math.prod(orientation.matrix_shape) != numel:
            raise ValueError(f"expected a dtype and the dimensions of a parameter, got {dtype} and {dict(given or {})}")
        group_size = int(entry.get("group_size", max(1, numel)))
        if not 1 <= group_size <= max(1, numel):
            raise ValueError(f"expected groups of 1 to {numel} weights, got {group_size}")
        groups = -(-numel // group_size)
        bits = torch.full((groups,), int(entry["bits"]), dtype=torch.uint8) if "bits" in entry else streams["bits"]
        scale, codebook = streams.get("scale"), streams.get("codebook")
        mask = None
        if "mask" in streams:
            stored, how = streams["mask"], entry.get("mask")
            if how is None:
                mask = ops.unpack_mask(stored, [numel])
            elif how == "huffman":
                mask = from_gaps(from_huffman(stored.numpy().tobytes(), int(entry["num_gaps"])), numel, ESCAPE)
            else:
                gaps = unpack_uniform(stored, int(how), int(entry["num_gaps"]))
                mask = from_gaps(gaps, numel, (1 << int(how)) - 1)
        fields: dict[str, Any] = {
            "orientation": orientation,
            "dtype": dtype,
            "group_size": group_size,
            "scale": scale,
            "half": bool(entry.get("half", False)),
            "codebook": codebook,
        }
        if bits.dtype != torch.uint8 or bits.shape != (groups,) or (groups and int(bits.max()) > MAX_BITS):
            raise ValueError(f"expected the bits of {groups} groups, from 0 to {MAX_BITS}")
        sizes = 1 << bits.long()
        tables = [x for x in (scale, codebook) if x is not None]
        if len(tables) != 1 or not tables[0].is_floating_point():
            raise ValueError("expected either a scale or a codebook, in floating point")
        if scale is not None and scale.shape != (groups,):
            raise ValueError(f"expected scale of shape [{groups}], got {list(scale.shape)}")
        if codebook is not None and (codebook.dim() != 1 or (groups > 1 and len(codebook) != int(sizes.sum()))):
            raise ValueError(f"expected a codebook of {int(sizes.sum())} values, got shape {list(codebook.shape)}")
        if entry.get("codes") == "huffman":
            kept = from_huffman(streams["codes"].numpy().tobytes(), int(entry["num_codes"]))
            codes = kept if mask is None else torch.zeros(numel, dtype=torch.uint8)
            if mask is not None:
                if len(kept) != int(mask.sum()):
                    raise ValueError(f"expected {int(mask.sum())} codes, got {len(kept)}")
                codes[mask] = kept
            if len(codes) != numel:
                raise ValueError(f"expected {numel} codes, got {len(codes)}")
            return QuantizedTensor.of_codes(codes, mask, bits, **fields)
        packed_mask = None if mask is None else ops.pack_mask(mask)
        tensor = QuantizedTensor(bits=bits, packed=streams["codes"], packed_mask=packed_mask, **fields)
        tensor.check()
        return tensor
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ValueError, MemoryError) as error:
        raise ValueError(f"{name} cannot be unpacked: {error!r}") from error


def contents_of(
    tensors: Mapping[str, QuantizedTensor], others: Mapping[str, Tensor], coding: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    content: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, tensor in tensors.items():
        streams, entries[name] = streams_of(tensor, coding)
        content |= {f"{name}.{stream}": x.contiguous() for stream, x in streams.items()}
    if both := sorted(content.keys() & others.keys()):
        raise ValueError(f"expected a model without tensors named as streams of codes are, got {', '.join(both)}")
    content |= {name: x.detach().cpu().contiguous().clone() for name, x in others.items()}
    text = json.dumps(entries, separators=(",", ":"))
    return content, {KEY: text, CHECKSUM: _checksum(content, text)}


def write(content: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a file whole or not at all."""
    package = require_safetensors()
    replace_file(path, lambda partial: package.torch.save_file(dict(content), partial, dict(metadata)))


def num_bytes(content: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return how many bytes the file has."""
    return len(require_safetensors().torch.save(dict(content), dict(metadata)))


def read(
    path: Path, shapes: Mapping[str, list[int]] | None = None
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Return the quantized parameters of a file, and its other tensors, by name.

    Args:
        path: of the file.
        shapes: of the model's tensors, by name; what is of another is refused before memory is taken for it.

    Raises:
        ValueError: it is truncated, altered, of another kind, or of another model.
        OSError: it cannot be opened.
    """
    content, metadata = read_safetensors(path)
    if KEY not in metadata:
        raise ValueError(f"{path} is no file of a quantized model: QuantizeResult.save writes these")
    if metadata.get(CHECKSUM) != _checksum(content, metadata[KEY]):
        raise ValueError(f"{path} was altered since it was written: its checksum is another")
    try:
        entries = dict(json.loads(metadata[KEY]))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} says in no way that is known how it is to be read: {error!r:.200}") from error
    tensors, used = {}, set()
    for name, entry in entries.items():
        given = entry.get("shape") if isinstance(entry, dict) else None
        if shapes is not None and shapes.get(name) != given:
            raise ValueError(
                f"expected a model with the tensors of {path}: {name} is {shapes.get(name, 'missing')}, not {given}"
            )
        streams = {stream: content[f"{name}.{stream}"] for stream in STREAMS if f"{name}.{stream}" in content}
        used |= {f"{name}.{stream}" for stream in streams}
        tensors[name] = tensor_of(name, streams, entry)
    return tensors, {name: x for name, x in content.items() if name not in used}


def _checksum(content: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(content):
        x = content[name]
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
