"""kron_mul, kron_diag."""

import pytest
import torch
from oracles import kronecker_matrix

from fishleg_ext import ops
from fishleg_ext.testing.check import device_of


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


def test_many_at_once(generator):
    shapes = [(3, 5), (2, 4, 4), (0, 3), (1, 7)]
    parts = [factors(*shape[-2:], torch.float32, generator) for shape in shapes]
    rows, cols, scales = ([part[k] for part in parts] for k in range(3))
    rows[1], scales[3] = rows[1].diagonal(), None
    x = [torch.randn(shape, generator=generator) for shape in shapes]
    for index, got in enumerate(ops.foreach_kron_mul(x, rows, cols, scales)):
        torch.testing.assert_close(got, ops.kron_mul(x[index], rows[index], cols[index], scales[index]))
    with pytest.raises(ValueError, match="as many col_factor as x, 4, got 3"):
        ops.foreach_kron_mul(x, rows, cols[:3], scales)
    with pytest.raises(ValueError, match=r"of parameter 1: expected x of shape \[..., o, i\] = \[..., 4, 4\], got"):
        ops.foreach_kron_mul([x[0], x[0], *x[2:]], rows, cols, scales)
    with pytest.raises(TypeError, match="of parameter 3: expected x of a floating-point dtype, got torch.int64"):
        ops.foreach_kron_mul([*x[:3], x[3].long()], rows, cols, scales)
    assert ops.foreach_kron_mul([], [], [], []) == []


@pytest.mark.triton
class TestTritonLaunches:
    """Layers share launches, tiles and all."""

    @pytest.fixture
    def launches(self, monkeypatch):
        from fishleg_ext.kernels import kron

        seen = []
        for name in ("row_product_kernel", "col_product_kernel"):
            kernel = getattr(kron, name)

            def launch(_, grid, name=name, kernel=kernel):
                seen.append((name, *grid))
                return kernel[grid]

            monkeypatch.setattr(kron, name, type("Counted", (), {"__getitem__": launch})())
        return seen

    def test_one_launch_for_all_layers_that_are_alike(self, launches, generator):
        device = device_of("triton")
        shapes = [(8, 12), (3, 100, 72), (2, 4, 4)]
        parts = [[t.to(device) for t in factors(*shape[-2:], torch.float32, generator)] for shape in shapes]
        x = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        rows, cols, scales = ([part[k] for part in parts] for k in range(3))
        ops.foreach_kron_mul(x, rows, cols, scales, impl="triton")
        # Tiles of 64 x 64: each [100, 72] has four, all 300 rows of it ten.
        assert launches == [("row_product_kernel", 1 + 3 * 4 + 2), ("col_product_kernel", 1 + 10 + 1)]
        launches.clear()
        apart = [row.diagonal() for row in rows]
        got = ops.foreach_kron_mul(x, apart, cols, [None] * 3, impl="triton")
        assert launches == [("col_product_kernel", 12)]
        for index, result in enumerate(got):
            expected = ops.kron_mul(x[index].double(), apart[index].double(), cols[index].double())
            assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
        launches.clear()
        odd = factors(5, 7, torch.float32, generator)
        more = [[*part, one.to(device)] for part, one in zip((rows, cols, scales), odd, strict=True)]
        ops.foreach_kron_mul([*x, torch.ones(5, 7, device=device)], *more, impl="triton")
        assert len(launches) == 4  # what is not aligned has its own

    def test_what_it_does_not_take_is_refused_with_the_reason(self):
        device = device_of("triton")
        eye = torch.eye(2, device=device)
        with pytest.raises(NotImplementedError, match="computes in float32"):
            ops.kron_mul(eye, eye.double(), eye, impl="triton")
        wide = torch.empty(0, 50_000, device=device)
        from fishleg_ext.kernels import kron

        supported, reason = kron.supports_kron_mul(wide, eye, eye)
        assert not supported
        assert "at most 46340 rows and columns, got [0, 50000]" in reason
