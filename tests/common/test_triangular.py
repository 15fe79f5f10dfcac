"""Factors of inverses."""

import pytest
import torch

from fishleg_ext.common.triangular import inverse_factor


@pytest.mark.parametrize("size", [1, 2, 7, 128, 129, 300, 515])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_multiply_to_the_inverse(size, dtype, generator):
    x = torch.randn(2, 2 * size, size, dtype=torch.float64, generator=generator)
    matrix = x.mT @ x / (2 * size) + 0.1 * torch.eye(size)
    factor, factored = inverse_factor(matrix.to(dtype))
    assert factored.all()
    assert factor.dtype == dtype
    assert torch.equal(factor, factor.triu())
    expected = torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(factor.double().mT @ factor.double() @ matrix, expected, rtol=0, atol=tolerance)


def test_what_is_not_positive_definite_is_told():
    _, factored = inverse_factor(torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 1.0]))]))
    assert factored.tolist() == [True, False]
