"""Bits of groups: never above the budget, and the best there are on small problems."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fishleg_ext.quantization.allocation import allocate_bits, least_bits


def cost(distortions, bits):
    return sum(float(d[range(len(b)), b.long()].sum()) for d, b in zip(distortions, bits, strict=True))


@given(st.integers(0, 2**31), st.floats(0, 8), st.integers(0, 3))
def test_codes_never_take_more_than_the_budget(seed, mean, least):
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 3, 7]
    distortions = [torch.rand(size, 9, generator=generator) for size in sizes]
    counts = [torch.randint(0, 100, (size,), generator=generator) for size in sizes]
    total = sum(int(count.sum()) for count in counts)
    budget = int(mean * total)
    if budget < least * total:
        with pytest.raises(ValueError, match=f"expected a budget of at least {least * total} bits"):
            allocate_bits(distortions, counts, budget, least)
        return
    bits = allocate_bits(distortions, counts, budget, least)
    assert sum(int((b.long() * c).sum()) for b, c in zip(bits, counts, strict=True)) <= budget
    assert all(torch.equal(b >= max(least, 1), (b > 0)) for b in bits if least)
    assert all((b[c > 0] >= least).all() and not b[c == 0].any() for b, c in zip(bits, counts, strict=True))


def test_is_the_best_where_distortions_are_convex(generator):
    for _ in range(20):
        gains = torch.rand(3, 4, generator=generator).sort(1, descending=True).values
        table = torch.cat([gains.sum(1, keepdim=True), gains.sum(1, keepdim=True) - gains.cumsum(1)], 1)
        counts = torch.full((3,), 5)
        for budget in (0, 5, 20, 35, 60, 100):
            bits = allocate_bits([table], [counts], budget)
            choices = [c for c in itertools.product(range(5), repeat=3) if 5 * sum(c) <= budget]
            least = min(float(table[range(3), c].sum()) for c in choices)
            assert cost([table], bits) == pytest.approx(least, abs=1e-6)


def test_with_many_bits_it_is_reverse_water_filling():
    """b_g = b_mean + 1/2 log2(F_g var_g / geometric mean), to a bit."""
    power = torch.tensor([1.0, 30.0, 0.01, 5.0, 700.0])
    distortions = power[:, None] * 4.0 ** -torch.arange(9)
    (bits,) = allocate_bits([100 * distortions], [torch.full((5,), 100)], 2000)
    formula = 4 + 0.5 * (power.log2() - power.log2().mean())
    assert ((bits - formula).abs() <= 1).all()
    assert bits.sum() == 20


def test_a_large_group_has_its_bit_before_what_is_left_is_wasted():
    falling = 4.0 ** -torch.arange(9)
    table = torch.stack([100 * falling, 90 * falling])
    # One by one the small group would have all its bits first, and the large one none of the 90 that are left.
    bits = allocate_bits([table], [torch.tensor([100, 10])], 200, 1)
    assert bits[0].tolist() == [1, 8]
    bits = allocate_bits([table], [torch.tensor([100, 10])], 220, 1)
    assert bits[0].tolist() == [2, 2]


def test_groups_without_weights_have_the_least(generator):
    bits = allocate_bits([torch.rand(2, 5, generator=generator)], [torch.tensor([0, 10])], 40)
    assert bits[0].tolist()[0] == 0


def test_a_gain_that_comes_late_is_seen():
    """The first bit of a group may save nothing, and the second all."""
    table = torch.tensor([[8.0, 8.0, 0.0], [3.0, 2.0, 1.0]])
    assert allocate_bits([table], [torch.tensor([1, 1])], 2)[0].tolist() == [2, 0]


@pytest.mark.parametrize("mean, least", [(0.5, 0), (1, 0), (1.5, 1), (2, 1), (2.5, 2), (3, 2), (8, 7)])
def test_least_bits(mean, least):
    assert least_bits(mean) == least
