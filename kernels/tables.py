"""Tables by which one launch handles many tensors.

A table on the device has a row for each tile of BLOCK elements of every tensor: the addresses of the tile in each of
the tensors that belong together, and the number of elements up to the end. One program handles one tile and reads
nothing else about the tensors. Tables are kept between calls: the next call with the same tensors copies nothing from
the host, which also makes it possible to capture it in a CUDA graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fishleg_ext.kernels import capturing

BLOCK = 4096
MAX_TABLES = 256  # kept at most; one is 8 bytes an address or size, for each BLOCK elements

# (device, bytes that each address advances by from tile to tile, ((addresses ..., elements), ...))
Key = tuple[torch.device, tuple[int, ...], tuple[tuple[int, ...], ...]]

_tables: dict[Key, Tensor] = {}
_captured: list[Tensor] = []  # tables that a CUDA graph may read for as long as it lives


def is_kept(key: Key) -> bool:
    """Tell whether the table is there, so that nothing is copied from the host."""
    return key in _tables


def table_of(key: Key) -> Tensor:
    """Return rows of tiles, int64 [tiles, addresses + 1], on the device when this returns."""
    if key not in _tables:
        _tables[key] = _make(*key)
    if capturing():
        _captured.append(_tables[key])
    return _tables[key]


def _make(device: torch.device, advances: Sequence[int], entries: Sequence[Sequence[int]]) -> Tensor:
    rows = []
    for *addresses, size in entries:
        tile = torch.arange(-(-size // BLOCK))
        places = [address + advance * tile for address, advance in zip(addresses, advances, strict=True)]
        rows.append(torch.stack([*places, size - BLOCK * tile], dim=1))
    if len(_tables) >= MAX_TABLES:
        for used in {table.device for table in _tables.values() if table.is_cuda}:
            torch.cuda.synchronize(used)  # before memory that a launch may yet read is given away
        _tables.clear()
    table = torch.cat(rows).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams may read it, too
    return table
