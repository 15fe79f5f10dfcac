"""Codes to weights and weights to codes, against PyTorch's gathers, shifts and searches.

Bytes of the floor: of dequantize_* 1/2 byte of code and, under a mask, 1/8 of mask are read and 4 of weight written, 4
bits a code; of unpack_codes 1/2 is read and 1 written, of pack_codes the reverse; of assign_codes weight and importance
are read and a byte of code is written. Tables of values are small.
"""

import math

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.bench import harness
from fishleg_ext.ops.quantize import chunk_ranks, offsets_of

pytestmark = pytest.mark.benchmark(timer=harness.synchronised)
NUMEL = 25_502_912 if harness.DEVICE.type == "cuda" else 270_896  # weights of ResNet-50, or of ResNet-20
BITS, CODES = 4, 16
EPS = torch.finfo(torch.float32).eps


def layout(group_size, density=None):
    """Codes, widths, offsets, bytes, and mask and ranks if a density is given."""
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    new = {"device": harness.DEVICE, "generator": generator}
    codes = torch.randint(0, CODES, (NUMEL,), dtype=torch.uint8, **new)
    bits = torch.full((-(-NUMEL // group_size),), BITS, dtype=torch.uint8, device=harness.DEVICE)
    mask = None if density is None else torch.rand(NUMEL, **new) < density
    offsets, num_bytes = offsets_of(bits, NUMEL, group_size, mask)
    masks = () if mask is None else (ops.pack_mask(mask), chunk_ranks(mask, group_size))
    return codes, bits, offsets, num_bytes, mask, masks


def nibbles(packed):
    """Codes of four bits, by shifts: what is usual where all have one width and none is left out."""
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:NUMEL]


@pytest.mark.parametrize("implementation", ["shifts", "fishleg_ext reference", "fishleg_ext triton"])
def bench_unpack_codes(measure, implementation):
    """4 bits, one group."""
    harness.skip_unless_available("unpack_codes", implementation)
    codes, bits, offsets, num_bytes, _, _ = layout(NUMEL)
    packed = ops.pack_codes(codes, bits, offsets, num_bytes, NUMEL)
    buffers = [packed.clone() for _ in range(harness.copies(num_bytes))]
    unpack = nibbles
    if implementation.startswith("fishleg_ext"):
        impl = implementation.split()[1]
        unpack = lambda given: ops.unpack_codes(given, bits, offsets, NUMEL, NUMEL, impl=impl)
    gate = lambda: (0.0 if torch.equal(unpack(packed), codes) else math.inf, 0.0)
    calls = [lambda given=given: unpack(given) for given in buffers]
    work = harness.Work(num_bytes + NUMEL)
    measure("unpack_codes", f"{NUMEL} codes, 4 bits, one group", implementation, calls, work, gate)


@pytest.mark.parametrize("implementation", ["fishleg_ext reference", "fishleg_ext triton"])
def bench_pack_codes(measure, implementation):
    """4 bits, groups of 64."""
    harness.skip_unless_available("pack_codes", implementation)
    codes, bits, offsets, num_bytes, _, _ = layout(64)
    buffers = [codes.clone() for _ in range(harness.copies(NUMEL))]
    impl = implementation.split()[1]
    pack = lambda given: ops.pack_codes(given, bits, offsets, num_bytes, 64, impl=impl)
    gate = lambda: (0.0 if torch.equal(nibbles(pack(codes)), codes) else math.inf, 0.0)
    calls = [lambda given=given: pack(given) for given in buffers]
    work = harness.Work(num_bytes + NUMEL)
    measure("pack_codes", f"{NUMEL} codes, 4 bits, groups of 64", implementation, calls, work, gate)


@pytest.mark.parametrize("implementation", ["shifts and a product", "fishleg_ext reference", "fishleg_ext triton"])
@pytest.mark.parametrize("group_size", [64, 4608])
def bench_dequantize_fixed_point(measure, group_size, implementation):
    """4 bits, nothing pruned."""
    harness.skip_unless_available("dequantize_fixed_point", implementation)
    codes, bits, offsets, num_bytes, _, _ = layout(group_size)
    packed = ops.pack_codes(codes, bits, offsets, num_bytes, group_size)
    scale = torch.rand(len(bits), device=harness.DEVICE)
    padding = len(bits) * group_size - NUMEL
    buffers = [packed.clone() for _ in range(harness.copies(num_bytes))]

    def usual(given):
        level = torch.nn.functional.pad(nibbles(given).float() - 8, (0, padding))
        return (level.view(-1, group_size) * scale[:, None]).flatten()[:NUMEL]

    dequantize = usual
    if implementation.startswith("fishleg_ext"):
        impl = implementation.split()[1]
        rest = scale, False, [NUMEL], group_size
        dequantize = lambda given: ops.dequantize_fixed_point(given, bits, offsets, *rest, impl=impl)

    def gate():
        group = torch.arange(NUMEL, device=harness.DEVICE) // group_size
        expected = scale.double()[group] * (codes.double() - 8)
        return float((dequantize(packed) - expected).abs().max() / expected.abs().max()), 2 * EPS

    calls = [lambda given=given: dequantize(given) for given in buffers]
    work = harness.Work(num_bytes + 4 * NUMEL + 4 * len(bits), NUMEL)
    case = f"{NUMEL} weights, 4 bits, groups of {group_size}"
    measure("dequantize_fixed_point", case, implementation, calls, work, gate)


@pytest.mark.parametrize("implementation", ["gather of stored codes", "fishleg_ext reference", "fishleg_ext triton"])
@pytest.mark.parametrize("density", [None, 0.1])
def bench_dequantize_codebook(measure, density, implementation):
    """4 bits, one codebook; under a mask, what is usual scatters values into zeros."""
    harness.skip_unless_available("dequantize_codebook", implementation)
    codes, bits, offsets, num_bytes, mask, masks = layout(NUMEL, density)
    packed = ops.pack_codes(codes, bits, offsets, num_bytes, NUMEL, *masks)
    codebook = torch.randn(CODES, device=harness.DEVICE)
    starts = torch.zeros(1, dtype=torch.int64, device=harness.DEVICE)
    buffers = [packed.clone() for _ in range(harness.copies(num_bytes))]
    kept = int(NUMEL if mask is None else mask.sum())

    def usual(given):
        values = codebook[torch.stack([given & 15, given >> 4], dim=1).flatten()[:kept].long()]
        if mask is None:
            return values
        weight = torch.zeros(NUMEL, device=harness.DEVICE)
        weight[mask] = values
        return weight

    dequantize = usual
    if implementation.startswith("fishleg_ext"):
        impl = implementation.split()[1]
        rest = codebook, starts, [NUMEL], NUMEL, *masks
        dequantize = lambda given: ops.dequantize_codebook(given, bits, offsets, *rest, impl=impl)
    expected = codebook[codes.long()] * (1 if mask is None else mask)
    gate = lambda: (0.0 if torch.equal(dequantize(packed), expected) else math.inf, 0.0)
    calls = [lambda given=given: dequantize(given) for given in buffers]
    work = harness.Work(num_bytes + 4 * NUMEL + (0 if mask is None else NUMEL // 8))
    case = f"{NUMEL} weights, 4 bits, one codebook" + ("" if mask is None else f", {density:.0%} kept")
    measure("dequantize_codebook", case, implementation, calls, work, gate)


@pytest.mark.parametrize("implementation", ["searchsorted, scatter_add", "fishleg_ext reference", "fishleg_ext triton"])
@pytest.mark.parametrize("rows", [1, 512])
def bench_assign_codes(measure, rows, implementation):
    """One step of k-means with 16 codes."""
    harness.skip_unless_available("assign_codes", implementation)
    size = NUMEL // rows
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device=harness.DEVICE, generator=generator)
    buffers = [(new(rows, size), new(rows, size).abs()) for _ in range(harness.copies(8 * NUMEL))]
    boundaries = new(rows, CODES - 1).sort(1).values

    def usual(weight, importance):
        codes = torch.searchsorted(boundaries, weight)
        sums = weight.new_zeros(rows, CODES, 2, dtype=torch.float64)  # so many float32 terms would be off by 1e-3
        terms = torch.stack([importance, importance * weight], dim=2).double()
        return codes.to(torch.uint8), sums.scatter_add_(1, codes[..., None].expand(-1, -1, 2), terms)

    assign = usual
    if implementation.startswith("fishleg_ext"):
        impl = implementation.split()[1]
        assign = lambda weight, importance: ops.assign_codes(weight, importance, boundaries, impl=impl)

    def gate():
        """Against float64; sums of many terms in float32 may be off by their roundings."""
        weight, importance = buffers[0]
        codes, sums = assign(weight, importance)
        expected, exact = ops.assign_codes(weight.double(), importance.double(), boundaries.double())
        error = float((sums - exact).abs().max() / exact.abs().max())
        return (error if torch.equal(codes, expected) else math.inf), EPS * size**0.5

    calls = [lambda pair=pair: assign(*pair) for pair in buffers]
    work = harness.Work(9 * NUMEL)
    measure("assign_codes", f"{rows} rows of {size} weights, {CODES} codes", implementation, calls, work, gate)
