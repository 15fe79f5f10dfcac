"""pack_codes, unpack_codes, dequantize_fixed_point, dequantize_codebook, assign_codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fishleg_ext import ops
from fishleg_ext.ops.quantize import chunk_ranks, kept_counts, offsets_of


def layout_of(bits, numel, group_size, mask=None):
    offsets, num_bytes = offsets_of(bits, numel, group_size, mask)
    masks = () if mask is None else (ops.pack_mask(mask), chunk_ranks(mask, group_size))
    return offsets, num_bytes, masks


def bits_by_hand(codes, bits, group_size, mask):
    """The bytes of each group, from strings of binary digits."""
    content = b""
    for group, width in enumerate(bits.tolist()):
        part = slice(group * group_size, (group + 1) * group_size)
        kept = codes[part] if mask is None else codes[part][mask[part]]
        digits = "".join(format(code % (1 << width), f"0{width}b")[::-1] if width else "" for code in kept.tolist())
        digits += "0" * (-len(digits) % 8)
        content += bytes(int(digits[i : i + 8][::-1], 2) for i in range(0, len(digits), 8))
    return content


@given(st.data())
def test_packing_is_bit_after_bit_and_unpacking_its_inverse(data):
    """Every width, odd lengths, groups of any size, with masks and without."""
    numel, group_size = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 40))
    groups = -(-numel // group_size)
    integers = lambda most, count: data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))
    bits = torch.tensor(integers(8, groups), dtype=torch.uint8)
    codes = torch.tensor(integers(255, numel), dtype=torch.uint8)
    mask = torch.tensor(integers(1, numel)).bool() if data.draw(st.booleans()) else None
    offsets, num_bytes, masks = layout_of(bits, numel, group_size, mask)
    packed = ops.pack_codes(codes, bits, offsets, num_bytes, group_size, *masks)
    assert bytes(packed.tolist()) == bits_by_hand(codes, bits, group_size, mask)
    unpacked = ops.unpack_codes(packed, bits, offsets, numel, group_size, *masks)
    width = bits.long()[torch.arange(numel) // group_size]
    expected = codes.long() % (1 << width)
    assert torch.equal(unpacked.long(), expected if mask is None else expected * mask)


def test_offsets_and_ranks_count_kept_weights(generator):
    mask = torch.rand(5000, generator=generator) < 0.3
    counts = kept_counts(5000, 1500, mask, mask.device)
    assert counts.tolist() == [int(mask[i : i + 1500].sum()) for i in range(0, 5000, 1500)]
    ranks = chunk_ranks(mask, 1500)
    assert ranks.shape == (4, 2)
    assert ranks[:, 0].tolist() == [0] * 4
    assert ranks[2, 1] == mask[3000:4024].sum()
    bits = torch.tensor([3, 0, 8, 1], dtype=torch.uint8)
    offsets, num_bytes = offsets_of(bits, 5000, 1500, mask)
    sizes = [-(-int(c) * int(b) // 8) for c, b in zip(counts, bits, strict=True)]
    assert offsets.tolist() == [sum(sizes[:i]) for i in range(4)]
    assert num_bytes == sum(sizes)


def test_levels_of_fixed_point():
    codes, bits = torch.arange(8, dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)
    offsets, num_bytes, _ = layout_of(bits, 8, 8)
    packed = ops.pack_codes(codes, bits, offsets, num_bytes, 8)
    whole = ops.dequantize_fixed_point(packed, bits, offsets, torch.tensor([0.5]), False, [2, 4], 8)
    assert whole.flatten().tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    half = ops.dequantize_fixed_point(packed, bits, offsets, torch.tensor([0.5]), True, [8], 8)
    assert half.tolist() == [-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75]


def test_a_code_beyond_the_codebook_is_nan():
    bits, packed = torch.tensor([2], dtype=torch.uint8), torch.tensor([0b11100100], dtype=torch.uint8)
    offsets, starts = torch.tensor([0]), torch.tensor([0])
    weight = ops.dequantize_codebook(packed, bits, offsets, torch.tensor([5.0, 6.0, 7.0]), starts, [4], 4)
    assert weight[:3].tolist() == [5.0, 6.0, 7.0]
    assert weight[3].isnan()


def test_assigns_to_the_nearest_code_and_adds_up(generator):
    weight = torch.randn(3, 700, generator=generator)
    importance = torch.rand(3, 700, generator=generator)
    values = torch.randn(3, 9, generator=generator).sort(1).values
    codes, sums = ops.assign_codes(weight, importance, (values[:, 1:] + values[:, :-1]) / 2)
    nearest = (weight[..., None] - values[:, None]).abs().argmin(2)
    assert torch.equal(codes.long(), nearest)
    for row in range(3):
        for code in range(9):
            mine = nearest[row] == code
            h, w = importance[row][mine].double(), weight[row][mine].double()
            torch.testing.assert_close(
                sums[row, code].double(), torch.stack([h.sum(), (h * w).sum()]), rtol=1e-5, atol=1e-6
            )


def test_refuses_bad_input():
    bits, offsets = torch.tensor([3, 5], dtype=torch.uint8), torch.tensor([0, 2])
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"expected codes of dtype torch.uint8, got torch.int64"):
        ops.pack_codes(codes.long(), bits, offsets, 5, 4)
    with pytest.raises(ValueError, match=r"expected bits of shape \[G\].* = \[3\], got \[2\]"):
        ops.pack_codes(codes, bits, offsets, 5, 3)
    with pytest.raises(TypeError, match=r"expected offsets of dtype torch.int64"):
        ops.unpack_codes(codes, bits, offsets.int(), 8, 4)
    with pytest.raises(ValueError, match="both packed_mask and ranks"):
        ops.unpack_codes(codes, bits, offsets, 8, 4, torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected scale of shape \[G\] = \[2\], got \[3\]"):
        ops.dequantize_fixed_point(codes, bits, offsets, torch.ones(3), True, [8], 4)
    with pytest.raises(ValueError, match=r"group_size >= 1, got 0"):
        ops.unpack_codes(codes, bits, offsets, 8, 0)
    with pytest.raises(ValueError, match="at most 255 boundaries, got 256"):
        ops.assign_codes(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 256))
