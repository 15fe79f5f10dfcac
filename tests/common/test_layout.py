"""Blocks and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_ext.common.layout import BlockLayout


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    block_size=st.integers(1, 40),
    lead=st.lists(st.integers(0, 3), max_size=2),
)
def test_there_and_back(shape, block_size, lead):
    layout = BlockLayout(tuple(shape), block_size)
    x = torch.arange(float(torch.Size(lead + shape).numel())).reshape(tuple(lead + shape)) + 1
    blocks = layout.to_blocks(x)
    assert blocks.shape == (*lead, layout.num_blocks, layout.block_size)
    assert torch.equal(layout.from_blocks(blocks), x)
    is_weight = layout.is_weight(torch.device("cpu"))
    assert int(is_weight.sum()) == layout.numel
    assert torch.equal(blocks != 0, is_weight.expand(blocks.shape))


def test_small_parameters_get_small_blocks():
    assert BlockLayout((3, 2), 128).block_size == 6
    assert BlockLayout((), 128).block_size == 1


def test_no_copy_where_nothing_is_padded():
    x = torch.zeros(4, 8)
    assert BlockLayout((4, 8), 16).to_blocks(x).data_ptr() == x.data_ptr()


def test_refuses_empty_blocks():
    with pytest.raises(ValueError, match="block_size >= 1, got 0"):
        BlockLayout((3,), 0)
