"""Inputs of convolutions as rows, what the weight of a convolution is multiplied by at each position of its output.

And the gradient of each sample without them, where that is faster.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def conv_rows(
    x: Tensor,
    *,
    kernel: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Unfold inputs x [N, C, *positions] to [groups, rows, C / groups * kernel], a row for each sample and position.

    Args:
        x: the inputs.
        kernel, stride, dilation: one number for each spatial dimension.
        padding: zeros before and after, for each spatial dimension.
        groups: of channels.
    """
    x = F.pad(x, [amount for both in reversed(padding) for amount in both])
    spatial = len(kernel)
    for dim in range(spatial):
        reach = dilation[dim] * (kernel[dim] - 1) + 1
        x = x.unfold(2 + dim, reach, stride[dim])[..., :: dilation[dim]]
    x = x.unflatten(1, (groups, -1))  # [N, g, C / g, *positions, *kernel]
    positions = range(3, 3 + spatial)
    kernels = range(3 + spatial, 3 + 2 * spatial)
    # Written column by column, in which neighbours in the input stay neighbours: several times faster than by rows.
    return x.permute(1, 2, *kernels, 0, *positions).flatten(1, 1 + spatial).flatten(2).mT


def conv_transpose_rows(
    x: Tensor,
    *,
    kernel: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """Unfold the inputs of a transposed convolution, see `conv_rows`.

    It is the convolution, with stride 1 and the kernel reversed, of the inputs with stride - 1 zeros between them.
    """
    spatial = len(kernel)
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    apart: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    spread[apart] = x
    around = [
        (d * (k - 1) - before, d * (k - 1) - after + extra)
        for k, d, (before, after), extra in zip(kernel, dilation, padding, output_padding, strict=True)
    ]
    rows = conv_rows(spread, kernel=kernel, groups=groups, stride=(1,) * spatial, padding=around, dilation=dilation)
    reversed_kernel = rows.unflatten(2, (-1, *kernel)).flip(*range(3, 3 + spatial))
    return reversed_kernel.flatten(2)


def conv_gradients(
    x: Tensor,
    gradient: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor | None:
    """Compute the gradient of the weight of a convolution without groups for each sample, [N, out, C * kernel].

    One convolution with a group for each sample spares the unfolded inputs. None where rows are the faster way, which
    was measured on a CPU: with fewer positions than channels, or on a GPU.

    Args:
        x: inputs [N, C, *positions].
        gradient: by the outputs, [N, out, *positions].
        kernel, stride, padding, dilation: see `conv_rows`.
    """
    samples, channels = x.shape[:2]
    if x.device.type != "cpu" or math.prod(gradient.shape[2:]) < channels or not samples:
        return None
    x = F.pad(x, [amount for both in reversed(padding) for amount in both])
    out, dims = gradient.shape[1], len(kernel)
    found = torch.ops.aten.convolution_backward(
        gradient.reshape(1, samples * out, *gradient.shape[2:]),
        x.reshape(1, samples * channels, *x.shape[2:]),
        x.new_empty(samples * out, channels, *kernel),
        None,
        list(stride),
        [0] * dims,
        list(dilation),
        False,
        [0] * dims,
        samples,
        [False, True, False],
    )[1]
    return found.reshape(samples, out, -1)
