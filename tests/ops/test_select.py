"""keep_mask, nm_mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_ext import ops


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, float("inf"), float("nan")]), max_size=9),
        max_size=4,
    ),
    data=st.data(),
)
def test_keep_mask_prunes_the_lowest_in_order_of_value_then_position(values, data):
    flat = [x for part in values for x in part]
    count = data.draw(st.integers(0, len(flat)))
    key = lambda i: (flat[i] != flat[i], flat[i] if flat[i] == flat[i] else 0.0, i)
    gone = set(sorted(range(len(flat)), key=key)[:count])
    got = ops.keep_mask([torch.tensor(part, dtype=torch.float32) for part in values], count)
    assert [x for mask in got for x in mask.tolist()] == [i not in gone for i in range(len(flat))]


def test_keep_mask_keeps_shapes_and_reads_views(generator):
    scores = [
        torch.randn(4, 6, generator=generator)[:, ::2],
        torch.randn((), generator=generator),
        torch.empty(0, 3),
    ]
    masks = ops.keep_mask(scores, 5)
    assert [m.shape for m in masks] == [s.shape for s in scores]
    assert all(m.dtype == torch.bool for m in masks)
    pruned = torch.cat([s[~m].flatten() for s, m in zip(scores, masks, strict=True)])
    kept = torch.cat([s[m].flatten() for s, m in zip(scores, masks, strict=True)])
    assert len(pruned) == 5
    assert pruned.max() <= kept.min()


def test_keep_mask_results_do_not_share_memory():
    first, second = ops.keep_mask([torch.ones(2), torch.ones(2)], 1)
    first.fill_(False)
    assert second.all()


def test_keep_mask_compares_across_dtypes_without_rounding():
    just_above = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    masks = ops.keep_mask([just_above[None], torch.ones(1)], 1)
    assert [m.item() for m in masks] == [True, False]


def test_keep_mask_of_nothing_and_out_of_range():
    assert ops.keep_mask([], 0) == []
    with pytest.raises(ValueError, match="from 0 to 2, the number of scores, got 3"):
        ops.keep_mask([torch.ones(2)], 3)
    with pytest.raises(ValueError, match="got -1"):
        ops.keep_mask([torch.ones(2)], -1)
    with pytest.raises(TypeError, match=r"scores\[1\]"):
        ops.keep_mask([torch.ones(2), torch.ones(2, dtype=torch.int64)], 1)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (0, 4), (4, 4), (1, 1)])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_nm_mask_keeps_the_n_highest_of_each_m(n, m, dim, generator):
    score = torch.randint(0, 4, (8, 16, 8), generator=generator).float()
    score[0, 0, 0] = torch.nan
    mask = ops.nm_mask(score, n, m, dim)
    groups = score.movedim(dim, -1).reshape(-1, m).tolist()
    kept = mask.movedim(dim, -1).reshape(-1, m).tolist()
    for values, keep in zip(groups, kept, strict=True):
        key = lambda i, values=values: (
            values[i] != values[i],
            values[i] if values[i] == values[i] else 0,
            i,
        )
        assert [i for i in range(m) if keep[i]] == sorted(sorted(range(m), key=key)[m - n :])


def test_nm_mask_of_nothing_and_bad_input():
    assert ops.nm_mask(torch.ones(0, 4), 2, 4).shape == (0, 4)
    with pytest.raises(ValueError, match="multiple of m = 4, got 6"):
        ops.nm_mask(torch.ones(6), 2, 4)
    with pytest.raises(ValueError, match="n=5, m=4"):
        ops.nm_mask(torch.ones(8), 5, 4)
    with pytest.raises(IndexError, match="got 1"):
        ops.nm_mask(torch.ones(8), 2, 4, 1)
