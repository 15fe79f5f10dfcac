"""kron_mul, kron_diag."""

import pytest
import torch

from fishleg_ext import ops
from tests.oracles import kronecker_matrix


def factors(o, i, dtype, generator):
    make = lambda n: torch.randn(n, n + 2, dtype=torch.float64, generator=generator)
    row, col = make(o), make(i)
    scale = torch.rand(o, i, dtype=torch.float64, generator=generator)
    return tuple(t.to(dtype) for t in (row @ row.mT, col @ col.mT, scale))


@pytest.mark.parametrize("o, i", [(3, 5), (1, 1), (7, 2), (0, 3)])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_product_with_the_dense_matrix(o, i, lead, dtype, apart, scaled, generator):
    row, col, scale = factors(o, i, dtype, generator)
    x = torch.randn(*lead, o, i, dtype=torch.float64, generator=generator).to(dtype)
    if apart:
        row = row.diagonal()
    if not scaled:
        scale = None
    dense = kronecker_matrix(row.double(), col.double(), None if scale is None else scale.double())
    expected = (x.double().reshape(*lead, o * i) @ dense).reshape(x.shape)
    got = ops.kron_mul(x, row, col, scale)
    assert got.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * (1 + dense.abs().sum().item()))
    torch.testing.assert_close(
        ops.kron_diag(row, col, scale).double(),
        dense.diagonal().reshape(o, i),
        rtol=tolerance,
        atol=0,
    )


def test_zero_scale_masks_weights_out(generator):
    row, col, scale = factors(3, 4, torch.float64, generator)
    mask = torch.rand(3, 4, generator=generator) < 0.5
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    got = ops.kron_mul(x, row, col, scale * mask)
    assert not got[~mask].any()
    torch.testing.assert_close(got, ops.kron_mul(x * mask, row, col, scale) * mask)


def test_views_and_mixed_dtypes(generator):
    row, col, scale = factors(3, 4, torch.float32, generator)
    x = torch.randn(4, 2, 3, generator=generator).permute(1, 2, 0)
    torch.testing.assert_close(ops.kron_mul(x, row.mT, col, scale), ops.kron_mul(x.contiguous(), row, col, scale))
    assert ops.kron_mul(x.double(), row, col, scale).dtype == torch.float32
    assert ops.kron_diag(row.bfloat16(), col.bfloat16(), scale.bfloat16()).dtype == torch.float32


def test_refuses_bad_input():
    eye, scale = torch.eye(3), torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"row_factor of shape \[o, o\] = \[3, 3\], got \[2, 2\]"):
        ops.kron_diag(torch.eye(2), eye, scale)
    with pytest.raises(ValueError, match=r"row_factor of shape \[o\] = \[3\], got \[2\]"):
        ops.kron_mul(scale, torch.ones(2), eye, scale)
    with pytest.raises(ValueError, match=r"expected row_factor of shape \[o, o\] or \[o\], got \[1, 3, 3\]"):
        ops.kron_mul(scale, eye[None], eye)
    with pytest.raises(ValueError, match=r"row_factor of shape \[o, o\] = \[2, 2\], got \[2, 3\]"):
        ops.kron_diag(eye[:2], eye)
    with pytest.raises(ValueError, match=r"col_factor of shape \[i, i\] = \[3, 3\], got \[2, 2\]"):
        ops.kron_diag(eye, torch.eye(2), scale)
    with pytest.raises(ValueError, match=r"expected x of shape \[..., o, i\] = \[..., 3, 3\], got \[3, 2\]"):
        ops.kron_mul(torch.ones(3, 2), eye, eye, scale)
