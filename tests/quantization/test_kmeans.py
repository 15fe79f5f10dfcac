"""Codebooks: the dynamic program against all partitions, and k-means against the dynamic program."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fishleg_ext import ops
from fishleg_ext.quantization import kmeans
from fishleg_ext.quantization.kmeans import boundaries_of, distortion, exact_codebook, fit_codebook

NUMBERS = st.floats(-5, 5, width=32, allow_subnormal=False)


def distortion_of(weight, importance, values):
    codes, _ = ops.assign_codes(weight, importance, boundaries_of(values.float()))
    return distortion(weight, importance, values.float().gather(1, codes.long()))


def least_over_partitions(w, h, num_codes):
    """The least distortion of all ways to cut the sorted weights into so many intervals."""
    w, order = w.double().sort()
    h = h.double()[order]
    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(w) + 1), num_codes - 1):
        total = 0.0
        for a, b in itertools.pairwise([0, *cuts, len(w)]):
            mass = h[a:b].sum()
            if b > a and mass > 0:
                total += float(0.5 * (h[a:b] * (w[a:b] - (h[a:b] * w[a:b]).sum() / mass) ** 2).sum())
        best = min(best, total)
    return best


@given(st.lists(st.tuples(NUMBERS, st.floats(0, 3, width=32)), min_size=1, max_size=8), st.integers(1, 4))
def test_the_dynamic_program_finds_the_best_partition(pairs, num_codes):
    weight, importance = (torch.tensor([x]) for x in zip(*pairs, strict=True))
    values = exact_codebook(weight, importance, num_codes)
    if importance.sum() > 0:
        least = least_over_partitions(weight[0], importance[0], num_codes)
        assert float(distortion_of(weight, importance, values)) == pytest.approx(least, rel=1e-4, abs=1e-5)


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_its_distortion_is_never_above_that_of_k_means(seed, num_codes):
    generator = torch.Generator().manual_seed(seed)
    weight, importance = torch.randn(2, 40, generator=generator), torch.rand(2, 40, generator=generator) ** 3
    values = weight[:, :num_codes].sort(1).values  # k-means from weights drawn at random
    for _ in range(50):
        _, sums = ops.assign_codes(weight, importance, boundaries_of(values))
        values = torch.where(sums[..., 0] > 0, sums[..., 1] / sums[..., 0], values).sort(1).values
    exact = distortion_of(weight, importance, exact_codebook(weight, importance, num_codes))
    assert (exact <= distortion_of(weight, importance, values) * (1 + 1e-5) + 1e-9).all()


def test_long_rows_come_close_to_the_dynamic_program(generator, monkeypatch):
    weight = torch.randn(3, 1500, generator=generator)
    importance = torch.rand(3, 1500, generator=generator) ** 4
    monkeypatch.setattr(kmeans, "EXACT", 2000)
    exact = distortion_of(weight, importance, fit_codebook(weight, importance, 16))
    monkeypatch.setattr(kmeans, "EXACT", 512)
    found = distortion_of(weight, importance, fit_codebook(weight, importance, 16))
    assert (exact <= found * (1 + 1e-6)).all()
    assert (found < 1.02 * exact).all()


@pytest.mark.parametrize("size", [100, 600, 20000])
def test_distortions_of_all_widths_are_those_of_codebooks(size, generator):
    weight, importance = torch.randn(2, size, generator=generator), torch.rand(2, size, generator=generator) ** 4
    found = kmeans.distortions(weight, importance, 6)
    fitted = [distortion_of(weight, importance, fit_codebook(weight, importance, 1 << bits)) for bits in range(7)]
    ratio = found / torch.stack(fitted, dim=1).clamp(min=1e-9)
    assert ((ratio[:, :5] - 1).abs() < 0.03).all()
    if size == 20000:  # where further bits take three quarters each
        assert ((ratio[:, 5:] - 1).abs() < 0.25).all()


@pytest.mark.parametrize("size", [30, 3000])
def test_zero_can_be_pinned(size, generator):
    weight, importance = torch.randn(4, size, generator=generator) + 3, torch.ones(4, size)
    values = fit_codebook(weight, importance, 4, with_zero=torch.tensor([True, True, False, True]))
    assert (values == 0).any(1).tolist() == [True, True, False, True]
    assert values.isfinite().all()
    assert (values.diff(dim=1) > 0).all()


def test_few_different_weights_need_few_codes():
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    values = fit_codebook(weight, torch.ones(2, 4), 4)
    assert values.tolist() == [[1.0, 2.0, torch.inf, torch.inf], [3.0] + 3 * [torch.inf]]
    assert fit_codebook(weight, torch.zeros(2, 4), 2).isinf().all()  # nothing matters
