"""Scales of fixed-point numbers."""

import pytest
import torch

from fishleg_ext.quantization import fixed_point


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_scales_are_about_as_good_as_any(bits, half, generator):
    weight = torch.randn(6, 300, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 3.0])[:, None]
    importance = torch.rand(6, 300, generator=generator) ** 2
    scale, found = fixed_point.fit_scale(weight, importance, bits, half)
    codes = fixed_point.codes_of(weight, scale, bits, half)
    values = fixed_point.values_of(codes, scale, bits, half)
    torch.testing.assert_close(found, 0.5 * (importance.double() * (weight - values).double() ** 2).sum(1))
    assert codes.min() >= 0
    assert codes.max() < 1 << bits
    # Against many steps, and levels found by search rather than by rounding.
    levels = torch.arange(1 << bits) - (1 << bits) // 2 + (0.5 if half else 0.0)
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for step in torch.linspace(-1.1, 1.1, 401):
        grid = (step * weight.abs().amax(1) / max(1 << bits >> 1, 1) * 2)[:, None] * levels
        error = (weight[..., None] - grid[:, None]).abs().amin(2)
        best = torch.minimum(best, 0.5 * (importance.double() * error.double() ** 2).sum(1))
    # With as many levels as weights the error is a matter of luck, and the best of many steps has more of it.
    assert (found <= (1.05 if bits < 8 else 1.25) * best).all()


def test_zero_stays_zero(generator):
    weight = torch.where(torch.rand(5, 40, generator=generator) < 0.5, 0, torch.randn(5, 40, generator=generator))
    for bits in range(9):
        scale, _ = fixed_point.fit_scale(weight, torch.ones_like(weight), bits, False)
        values = fixed_point.values_of(fixed_point.codes_of(weight, scale, bits, False), scale, bits, False)
        assert not values[weight == 0].any()


def test_groups_of_zeros_and_none(generator):
    scale, found = fixed_point.fit_scale(torch.zeros(2, 5), torch.ones(2, 5), 3, True)
    assert scale.tolist() == [0.0, 0.0]
    assert found.tolist() == [0.0, 0.0]
    assert fixed_point.fit_scale(torch.empty(0, 5), torch.empty(0, 5), 3, True)[0].shape == (0,)
    assert fixed_point.fit_scale(torch.empty(3, 0), torch.empty(3, 0), 3, True)[0].tolist() == [0.0] * 3


def test_tables_hold_all_levels_in_order():
    bits = torch.tensor([2, 1, 0], dtype=torch.uint8)
    table = fixed_point.table_of(torch.tensor([-1.0, 2.0, 3.0]), bits, False)
    assert table.tolist() == [[-1.0, 0.0, 1.0, 2.0], [-2.0, 0.0, torch.inf, torch.inf], [0.0] + 3 * [torch.inf]]
