"""fisher_diag_update_."""

import pytest
import torch

from fishleg_ext import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_a_running_mean_of_squares(dtype, grad_dtype, generator):
    shapes = [(3, 5), (), (0, 2), (7,)]
    fisher = [torch.rand(shape, generator=generator).to(dtype) for shape in shapes]
    grads = [torch.randn(shape, generator=generator).to(grad_dtype) for shape in shapes]
    expected = [0.9 * f.double() + 0.1 * g.to(dtype).double() ** 2 for f, g in zip(fisher, grads, strict=True)]
    ops.fisher_diag_update_(fisher, grads, 0.9)
    for got, want in zip(fisher, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)


def test_equals_adams_second_moment(generator):
    weight = torch.nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.Adam([weight], betas=(0.9, 0.99))
    fisher = torch.zeros(6)
    for _ in range(4):
        weight.grad = torch.randn(6, generator=generator)
        optimizer.step()
        ops.fisher_diag_update_([fisher], [weight.grad], 0.99)
    torch.testing.assert_close(fisher, optimizer.state[weight]["exp_avg_sq"])


def test_writes_through_views(generator):
    base = torch.zeros(4, 6)
    grad = torch.randn(3, 4, generator=generator)
    ops.fisher_diag_update_([base[:, ::2].mT], [grad], 0.0)
    torch.testing.assert_close(base[:, ::2].mT, grad**2)
    assert not base[:, 1::2].any()


def test_empty_lists_are_fine():
    ops.fisher_diag_update_([], [], 0.5)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="as many grads as fisher, 1, got 0"):
        ops.fisher_diag_update_([torch.zeros(2)], [], 0.5)
    with pytest.raises(ValueError, match=r"grads\[0\].*\[2\], got \[3\]"):
        ops.fisher_diag_update_([torch.zeros(2)], [torch.zeros(3)], 0.5)
    with pytest.raises(ValueError, match="beta"):
        ops.fisher_diag_update_([torch.zeros(2)], [torch.zeros(2)], 1.5)
    with pytest.raises(TypeError, match=r"fisher\[0\] in float32"):
        ops.fisher_diag_update_([torch.zeros(2).half()], [torch.zeros(2)], 0.5)
