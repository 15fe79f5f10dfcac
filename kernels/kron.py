"""Kronecker-factored inverses times many parameters in one launch a factor.

kron_mul: y = scale * (P (scale * x) M), in two products that read what they scale as they load it and scale what they
write as they store it, and nothing else in between:

    z = P (scale * x)       rows, left out where P is diagonal
    y = scale * (z M)       columns; where P is diagonal, scale * p * ((scale * x) M)

Each program computes a BLOCK_M x BLOCK_N tile of z or y of one parameter. One table on the device has a row for each
parameter, the addresses of its tensors and its sizes, another a row for each tile; so layers that are far too small for
a GPU by themselves share a launch. Products are of three TF32 products each (tf32x3), which is float32 but for the last
bit or two, on tensor cores.

Bytes per weight, float32: x and scale are read o / BLOCK_M times and z is read i / BLOCK_N times, where P is diagonal x
and scale in its place, mostly from the L2; scale once more; z and y are written. FLOP per weight: 2 o + 2 i. Where a
matrix is wider than a few hundred, arithmetic is what takes the time. Invariants: sums in float32; what lies beyond an
edge counts as 0; offsets within a matrix fit into 32 bits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishleg_ext.kernels import capturing, launch_on, wrong_device
from fishleg_ext.reference.kron import dtype_of

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 16
NUM_WARPS, NUM_STAGES = 4, 3
MOST_ROWS = 46340  # and columns: a matrix has fewer than 2^31 entries
FIELDS = tl.constexpr(8)  # of a parameter: addresses of x, P, M, scale, z and y, then o and i
ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _address(entry_ptr, field: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor of a parameter."""
    address = tl.load(entry_ptr + field).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _size(entry_ptr, field: tl.constexpr, ALIGNED: tl.constexpr):
    """o or i of a parameter."""
    size = tl.load(entry_ptr + field).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    return size


@triton.jit
def row_product_kernel(
    table_ptr,
    tiles_ptr,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z[b, m, n] = sum_k P[m, k] * (scale[k, n] * x[b, k, n]), one tile of one b."""
    tile_ptr = tiles_ptr + 4 * tl.program_id(0).to(tl.int64)
    entry_ptr = table_ptr + FIELDS * tl.load(tile_ptr)
    o, i = _size(entry_ptr, 6, ALIGNED), _size(entry_ptr, 7, ALIGNED)
    begin = tl.load(tile_ptr + 1) * o.to(tl.int64) * i
    if ALIGNED:
        begin = tl.multiple_of(begin, 4)
    x_ptr = _address(entry_ptr, 0, DTYPE, ALIGNED) + begin
    row_ptr = _address(entry_ptr, 1, tl.float32, ALIGNED)
    scale_ptr = _address(entry_ptr, 3, tl.float32, ALIGNED)
    z_ptr = _address(entry_ptr, 4, tl.float32, ALIGNED) + begin
    m = tl.load(tile_ptr + 2).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.load(tile_ptr + 3).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, o, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = tl.load(row_ptr + m[:, None] * o + k[None, :], mask=(m < o)[:, None] & (k < o)[None, :], other=0.0)
        inside = (k < o)[:, None] & (n < i)[None, :]
        offsets = k[:, None] * i + n[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(scale_ptr + offsets, mask=inside, other=0.0)
        total = tl.dot(row, x, total, input_precision="tf32x3")
    tl.store(z_ptr + m[:, None] * i + n[None, :], total, mask=(m < o)[:, None] & (n < i)[None, :])


@triton.jit
def col_product_kernel(
    table_ptr,
    tiles_ptr,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    ROW_DIAGONAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[r, n] = scale[r, n] * sum_k z[r, k] * M[k, n], r over the rows of all b.

    Where ROW_DIAGONAL, z = scale * x and the sum is multiplied by p[r].

    Rows count from the first of the tile.
    """
    tile_ptr = tiles_ptr + 4 * tl.program_id(0).to(tl.int64)
    entry_ptr = table_ptr + FIELDS * tl.load(tile_ptr)
    o, i = _size(entry_ptr, 6, ALIGNED), _size(entry_ptr, 7, ALIGNED)
    first = tl.load(tile_ptr + 2) * BLOCK_M
    rows = tl.minimum(tl.load(tile_ptr + 1) * o - first, BLOCK_M).to(tl.int32)
    begin = first * i
    if ALIGNED:
        begin = tl.multiple_of(begin, 4)
    x_ptr = _address(entry_ptr, 0, DTYPE, ALIGNED) + begin
    row_ptr = _address(entry_ptr, 1, tl.float32, ALIGNED)
    col_ptr = _address(entry_ptr, 2, tl.float32, ALIGNED)
    scale_ptr = _address(entry_ptr, 3, tl.float32, ALIGNED)
    z_ptr = _address(entry_ptr, 4, tl.float32, ALIGNED) + begin
    y_ptr = _address(entry_ptr, 5, tl.float32, ALIGNED) + begin
    r = tl.arange(0, BLOCK_M)
    n = tl.load(tile_ptr + 3).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = ((first + r) % o).to(tl.int32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, i, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (r < rows)[:, None] & (k < i)[None, :]
        offsets = r[:, None] * i + k[None, :]
        if ROW_DIAGONAL:
            z = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            if SCALED:
                z *= tl.load(scale_ptr + m[:, None] * i + k[None, :], mask=inside, other=0.0)
        else:
            z = tl.load(z_ptr + offsets, mask=inside, other=0.0)
        col = tl.load(col_ptr + k[:, None] * i + n[None, :], mask=(k < i)[:, None] & (n < i)[None, :], other=0.0)
        total = tl.dot(z, col, total, input_precision="tf32x3")
    inside = (r < rows)[:, None] & (n < i)[None, :]
    if ROW_DIAGONAL:
        total *= tl.load(row_ptr + m, mask=r < rows, other=0.0)[:, None]
    if SCALED:
        total *= tl.load(scale_ptr + m[:, None] * i + n[None, :], mask=inside, other=0.0)
    tl.store(y_ptr + r[:, None] * i + n[None, :], total, mask=inside)


def supports_kron_mul(
    x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Tensor | None = None
) -> tuple[bool, str]:
    """See `supports_foreach_kron_mul`."""
    return supports_foreach_kron_mul([x], [row_factor], [col_factor], [scale])


def kron_mul(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Tensor | None = None) -> Tensor:
    """Multiply one parameter; see `ops.kron_mul`."""
    return foreach_kron_mul([x], [row_factor], [col_factor], [scale])[0]


def supports_foreach_kron_mul(
    x: list[Tensor], row_factor: list[Tensor], col_factor: list[Tensor], scale: list[Tensor | None]
) -> tuple[bool, str]:
    """Float32 results on a GPU, outside the capture of a CUDA graph, which would hold the addresses of this call."""
    for tensor, row, col, factor in zip(x, row_factor, col_factor, scale, strict=True):
        if (reason := wrong_device(tensor)) is not None:
            return False, reason
        if tensor.dtype not in ELEMENTS:
            return False, f"its Triton kernel does not read {tensor.dtype}"
        if dtype_of(row, col, factor) != torch.float32:
            return False, "its Triton kernel computes in float32"
        if max(tensor.shape[-2:]) > MOST_ROWS:
            return False, f"its Triton kernel takes at most {MOST_ROWS} rows and columns, got {list(tensor.shape[-2:])}"
    if capturing():
        return False, "a CUDA graph is being captured"
    return True, ""


def foreach_kron_mul(
    x: list[Tensor], row_factor: list[Tensor], col_factor: list[Tensor], scale: list[Tensor | None]
) -> list[Tensor]:
    """One launch, where P is dense two, for each device, dtype, kind of scale and of P, and alignment."""
    results = [torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in x]
    kept: list[Tensor] = []  # what a launch reads, until all are launched

    def address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        kept.append(tensor.to(dtype).contiguous())
        return kept[-1].data_ptr()

    groups: dict[tuple, list[tuple[tuple[int, ...], tuple[int, int, int]]]] = {}
    for tensor, row, col, factor, result in zip(x, row_factor, col_factor, scale, results, strict=True):
        if tensor.numel() == 0:
            continue
        o, i = tensor.shape[-2:]
        z = 0 if row.dim() == 1 else address(torch.empty_like(result))
        addresses = (
            address(tensor, tensor.dtype),
            address(row),
            address(col),
            0 if factor is None else address(factor),
            z,
            result.data_ptr(),
        )
        aligned = o % 4 == 0 and i % 4 == 0 and not any(place % 16 for place in addresses)
        key = tensor.device, tensor.dtype, factor is not None, row.dim() == 1, aligned
        groups.setdefault(key, []).append(((*addresses, o, i), (tensor.numel() // (o * i), o, i)))
    for (device, dtype, scaled, row_diagonal, aligned), members in groups.items():
        entries, shapes = zip(*members, strict=True)
        table = torch.tensor(entries).to(device, non_blocking=True)
        sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
        options = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
        with launch_on(device):
            if not row_diagonal:
                tiles = _tiles_in_use(shapes, True, device)
                row_product_kernel[(len(tiles),)](table, tiles, ELEMENTS[dtype], scaled, aligned, **sizes, **options)
            tiles = _tiles_in_use(shapes, False, device)
            col_product_kernel[(len(tiles),)](
                table, tiles, ELEMENTS[dtype], scaled, row_diagonal, aligned, **sizes, **options
            )
    return results


def _tiles_in_use(shapes: tuple[tuple[int, int, int], ...], by_batch: bool, device: torch.device) -> Tensor:
    """A table that is not given away before what the current stream has been told to do is done."""
    tiles = _tiles(shapes, by_batch, device)
    if device.type == "cuda":
        tiles.record_stream(torch.cuda.current_stream(device))
    return tiles


@functools.lru_cache(maxsize=64)
def _tiles(shapes: tuple[tuple[int, int, int], ...], by_batch: bool, device: torch.device) -> Tensor:
    """A row for each tile, int64 [tiles, 4]: parameter, batch or how many there are, tile of rows, tile of columns.

    Args:
        shapes: (batch, o, i) of each parameter.
        by_batch: tiles of each [o, i] of the batch; else of all its rows together.
        device: where it is wanted.
    """
    rows = []
    for index, (batch, o, i) in enumerate(shapes):
        down, across = torch.arange(-(-(o if by_batch else batch * o) // BLOCK_M)), torch.arange(-(-i // BLOCK_N))
        grid = torch.cartesian_prod(torch.arange(batch) if by_batch else torch.tensor([batch]), down, across)
        rows.append(torch.cat([torch.full((len(grid), 1), index), grid], dim=1))
    tiles = torch.cat(rows).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams may read it, too
    return tiles
