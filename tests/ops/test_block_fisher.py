"""block_gram_, block_inverse, woodbury_update_."""

import pytest
import torch
from oracles import cholesky_inverse

from fishleg_ext import ops

SHAPES = [(5, 3, 7), (1, 1, 1), (64, 2, 33), (0, 2, 4), (3, 0, 4)]


@pytest.mark.parametrize("m, k, b", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_is_the_sum_of_outer_products(m, k, b, dtype, generator):
    grads = torch.randn(m, k, b, dtype=torch.float64, generator=generator)
    start = torch.randn(k, b, b, dtype=torch.float64, generator=generator)
    gram = start.to(dtype, copy=True)
    ops.block_gram_(gram, grads.to(dtype), 0.5)
    expected = start + 0.5 * torch.einsum("ski,skj->kij", grads, grads)
    tolerance = 2 * torch.finfo(dtype).eps * (m + 2) * 16  # |g_i g_j| < 16 here
    torch.testing.assert_close(gram.double(), expected, rtol=0, atol=tolerance)


def test_gram_streams(generator):
    grads = torch.randn(10, 2, 5, dtype=torch.float64, generator=generator)
    whole, parts = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    ops.block_gram_(whole, grads)
    for part in grads.split(3):
        ops.block_gram_(parts, part)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_widens_narrow_gradients_before_it_multiplies(dtype, generator):
    grads = torch.randn(9, 2, 4, generator=generator).to(dtype)
    gram = torch.zeros(2, 4, 4)
    ops.block_gram_(gram, grads)
    expected = torch.einsum("ski,skj->kij", grads.double(), grads.double())
    torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-5)


def test_gram_accepts_views(generator):
    wide = torch.randn(4, 3, 10, generator=generator)
    gram = torch.zeros(3, 5, 10)[:, :, ::2]
    ops.block_gram_(gram, wide[..., ::2])
    torch.testing.assert_close(gram, torch.einsum("ski,skj->kij", wide[..., ::2], wide[..., ::2]))
    expanded = wide[:1, :, :5].expand(4, 3, 5)
    gram = torch.zeros(3, 5, 5)
    ops.block_gram_(gram, expanded)
    torch.testing.assert_close(gram, 4 * torch.einsum("ki,kj->kij", wide[0, :, :5], wide[0, :, :5]))


def test_gram_refuses_bad_input():
    good = torch.zeros(2, 3, 3)
    with pytest.raises(ValueError, match=r"expected grads of shape \[m, K, B\] = \[4, 2, 3\], got \[4, 2, 5\]"):
        ops.block_gram_(good, torch.zeros(4, 2, 5))
    with pytest.raises(ValueError, match=r"gram of shape \[K, B, B\] = \[2, 3, 3\], got \[2, 3, 4\]"):
        ops.block_gram_(torch.zeros(2, 3, 4), torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match="one memory cell per element"):
        ops.block_gram_(torch.zeros(1, 3, 3).expand(2, 3, 3), torch.zeros(4, 2, 3))
    with pytest.raises(TypeError, match="float32 or float64"):
        ops.block_gram_(good.bfloat16(), torch.zeros(4, 2, 3))
    with pytest.raises(TypeError, match="floating-point"):
        ops.block_gram_(good, torch.zeros(4, 2, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="dense"):
        ops.block_gram_(good, torch.zeros(4, 2, 3).to_sparse())
    with pytest.raises(ValueError, match="precision"):
        ops.block_gram_(good, torch.zeros(4, 2, 3), precision="fast")
    assert not good.any()


@pytest.mark.parametrize("k, b", [(3, 7), (1, 1), (2, 33), (0, 4), (5, 200)])
@pytest.mark.parametrize("condition", [1e1, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse(k, b, condition, dtype, fisher):
    matrix = fisher(k, b, condition)
    expected = cholesky_inverse(matrix + 1e-3 * torch.eye(b, dtype=torch.float64))
    inverse, info = ops.block_inverse(matrix.to(dtype), 1e-3)
    assert inverse.dtype == dtype
    assert info.dtype == torch.int32
    assert not info.any()
    assert torch.equal(inverse, inverse.mT)
    # Backward stable: the relative error is a small multiple of eps * cond, and cond <= 1.001 / 1e-3.
    error = (inverse.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (error <= 20 * torch.finfo(dtype).eps * min(condition, 1e3)).all()


def test_inverse_raises_damping_only_where_it_must():
    indefinite = torch.diag(torch.tensor([1.0, -0.05]))
    inverse, info = ops.block_inverse(torch.stack([torch.eye(2), indefinite]), 1e-3)
    assert info.tolist() == [0, 2]  # 1e-3 and 1e-2 do not lift -0.05 above zero, 1e-1 does
    torch.testing.assert_close(inverse[0], torch.eye(2) / 1.001)
    torch.testing.assert_close(inverse[1], torch.diag(1 / torch.tensor([1.1, 0.05])))


def test_inverse_of_a_singular_block_without_damping_starts_at_eps():
    singular = torch.ones(1, 2, 2, dtype=torch.float64)
    inverse, info = ops.block_inverse(singular, 0.0)
    assert info.item() >= 1
    assert inverse.isfinite().all()
    shift = torch.finfo(torch.float64).eps * 10.0 ** (info.item() - 1)
    torch.testing.assert_close(inverse.sum() * shift, torch.tensor(shift, dtype=torch.float64), rtol=0.5, atol=0)


def test_inverse_gives_up_with_nan_and_minus_one():
    matrix = torch.eye(2).repeat(5, 1, 1)
    matrix[1, 0, 1] = torch.nan
    matrix[2] = -1e30 * torch.eye(2)
    matrix[3, 0, 0] = torch.inf
    matrix[4] = 0
    inverse, info = ops.block_inverse(matrix, 0.0)
    assert info.tolist() == [0, -1, -1, -1, -1]
    assert inverse[1:].isnan().all()
    assert torch.equal(inverse[0], torch.eye(2))


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_inverse_refuses_bad_damping(damping):
    with pytest.raises(ValueError, match="damping"):
        ops.block_inverse(torch.eye(2)[None], damping)


def test_inverse_widens_half_precision():
    inverse, _ = ops.block_inverse(torch.eye(3, dtype=torch.bfloat16)[None], 1.0)
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse[0], torch.eye(3) / 2)


@pytest.mark.parametrize("m, k, b", [(20, 3, 7), (1, 1, 1), (0, 2, 4), (3, 0, 4), (40, 2, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_woodbury_recursion_reaches_the_inverse(m, k, b, dtype, generator):
    grads = torch.randn(m, k, b, dtype=torch.float64, generator=generator)
    inverse = torch.eye(b, dtype=dtype).div(1e-2).repeat(k, 1, 1)
    for part in grads.to(dtype).split(7):
        ops.woodbury_update_(inverse, part, max(1, m))
    gram = torch.einsum("ski,skj->kij", grads, grads) / max(1, m)
    expected = cholesky_inverse(gram + 1e-2 * torch.eye(b, dtype=torch.float64))
    tolerance = 1e4 * torch.finfo(dtype).eps  # cond(F) is about 1e3
    torch.testing.assert_close(inverse.double(), expected, rtol=tolerance, atol=100 * tolerance)


def test_woodbury_refuses_bad_input():
    with pytest.raises(ValueError, match="num_grads >= 1, got 0"):
        ops.woodbury_update_(torch.eye(2)[None].clone(), torch.ones(1, 1, 2), 0)
    with pytest.raises(ValueError, match="inverse with one memory cell"):
        ops.woodbury_update_(torch.eye(2)[None].expand(3, 2, 2), torch.ones(1, 3, 2), 1)


def test_inverses_of_several_batches_do_not_differ(fisher, monkeypatch):
    matrix = fisher(10, 6)
    matrix[4] = torch.ones(6, 6)  # singular, damped more
    expected = ops.block_inverse(matrix, 0.0)
    monkeypatch.setattr("fishleg_ext.reference.batches.CPU_BYTES", 3 * 6 * 6 * 8)
    torch.testing.assert_close(ops.block_inverse(matrix, 0.0), expected, rtol=1e-12, atol=0)
