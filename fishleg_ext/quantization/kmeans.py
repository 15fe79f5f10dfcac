"""Codebooks of least weighted distortion: k-means in one dimension, each row a group.

The distortion of codes c for weights w of importance h, the diagonal of the Fisher matrix, is 1/2 sum h (w - c)^2, the
loss that quantization adds to second order where errors do not correlate. Its best codebook is weighted k-means (Choi
et al., ICLR 2017, arXiv 1612.01543; Kim et al., SqueezeLLM, arXiv 2306.07629), which in one dimension is solved exactly
by dynamic programming over the sorted weights (Wang and Song, The R Journal 2011).
"""

import torch
from torch import Tensor

from fishleg_ext import ops

EXACT = 128  # most weights in a row for which the dynamic program takes each as it is
BINS = 128  # of longer rows
MEASURED = 4  # bits of codes, of which many bins lie in each
LLOYD_STEPS = 30
DP_BYTES = 2**27  # of its table, for as many rows as are solved at a time


def distortion(weight: Tensor, importance: Tensor, values: Tensor) -> Tensor:
    """Return 1/2 sum h (w - c)^2 over each row, in float64, [G].

    Args:
        weight: w, [G, N].
        importance: h, [G, N].
        values: c, [G, N], what each weight becomes.
    """
    return 0.5 * (importance.double() * (weight.double() - values.double()).square()).sum(1)


def exact_codebook(weight: Tensor, importance: Tensor, num_codes: int) -> Tensor:
    """Return the codebook of least distortion of each row, by dynamic programming: O(C N^2).

    Args:
        weight: [G, N], finite.
        importance: [G, N], finite, >= 0.
        num_codes: C >= 1.

    Returns:
        values [G, C] in float64, ascending, +inf beyond the number of different weights of positive importance.

    Examples:
        >>> exact_codebook(torch.tensor([[0.0, 1.0, 9.0, 11.0]]), torch.ones(1, 4), 2)
        tensor([[ 0.5000, 10.0000]], dtype=torch.float64)
    """
    return _in_parts(weight, importance, num_codes)[0]


def exact_distortions(weight: Tensor, importance: Tensor, num_codes: int) -> Tensor:
    """Return the least distortion of each row with 1 to `num_codes` codes, [G, num_codes] in float64; see above."""
    return _in_parts(weight, importance, num_codes)[1]


def _in_parts(weight: Tensor, importance: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Solve some rows at a time."""
    size = weight.shape[1]
    step = max(1, DP_BYTES // (8 * (size + 1) ** 2))
    starts = range(0, max(1, len(weight)), step)
    parts = [_solve(weight[i : i + step], importance[i : i + step], num_codes) for i in starts]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _solve(weight: Tensor, importance: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Return the best codebooks [G, C], and the distortions of the best ones with 1 to C codes, [G, C]."""
    groups, size = weight.shape
    used = max(1, min(num_codes, size))  # codes beyond one for each weight save nothing
    w, order = weight.double().sort(1)
    h = importance.double().gather(1, order)
    # About the mean of each row, so that differences of sums of squares lose little.
    center = (h * w).sum(1, keepdim=True) / h.sum(1, keepdim=True).clamp(min=1e-300)
    w = torch.where(h > 0, w - center, 0)
    sums = [torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (h, h * w, h * w * w)]  # each [G, N + 1]
    mass, first, second = (x[:, None, :] - x[:, :, None] for x in sums)  # of weights i to j - 1, [G, N + 1, N + 1]
    cost = second - torch.where(mass > 0, first.square() / mass.clamp(min=1e-300), 0)
    cost = torch.where(torch.ones_like(cost[0], dtype=torch.bool).triu(), cost.clamp(min=0), torch.inf)
    best = cost[:, 0]  # of the first j weights by one code, [G, N + 1]
    starts, least = [], [best[:, -1]]
    for _ in range(used - 1):
        best, start = (best[:, :, None] + cost).min(1)
        starts.append(start)
        least.append(best[:, -1])
    values = weight.new_full((groups, num_codes), torch.inf, dtype=torch.float64)
    end = torch.full((groups, 1), size, device=weight.device)
    for code in reversed(range(used)):
        begin = starts[code - 1].gather(1, end) if code else torch.zeros_like(end)
        mine, own = ((x.gather(1, end) - x.gather(1, begin))[:, 0] for x in sums[:2])
        values[:, code] = torch.where(mine > 0, own / mine.clamp(min=1e-300) + center[:, 0], torch.inf)
        end = begin
    least += [least[-1]] * (num_codes - used)
    return _without_repeats(values), 0.5 * torch.stack(least, dim=1)


def fit_codebook(weight: Tensor, importance: Tensor, num_codes: int, *, with_zero: bool | Tensor = False) -> Tensor:
    """Return a codebook of each row: the exact one of short rows; of others the exact one of BINS bins, then k-means.

    Args:
        weight: [G, N], finite.
        importance: [G, N], finite, >= 0; weights of importance 0 do not count.
        num_codes: C, 1 to 256.
        with_zero: whether zero must be a code, of all or of some rows [G].

    Returns:
        values [G, C] in float32, ascending, filled up with +inf.
    """
    if weight.shape[1] <= EXACT:
        values = exact_codebook(weight, importance, num_codes)
    else:
        values = exact_codebook(*_binned(weight, importance), num_codes)
    values = values.to(torch.float32)
    zero = torch.as_tensor(with_zero, device=weight.device).expand(len(weight))
    pinned = bool(zero.any())
    if pinned:
        values = _with_zero(values, zero)
    for _ in range(LLOYD_STEPS if weight.shape[1] > EXACT or pinned else 0):
        _, sums = ops.assign_codes(weight, importance, boundaries_of(values))
        means = torch.where(sums[..., 0] > 0, sums[..., 1] / sums[..., 0], values)
        means = torch.where(zero[:, None] & (values == 0), 0, means)
        if torch.equal(moved := means.to(torch.float32), values):
            break
        values = moved.sort(1).values
    return _without_repeats(values)


def distortions(weight: Tensor, importance: Tensor, most: int) -> Tensor:
    """Return the distortion of the best codebooks of 2^0 to 2^most codes, [G, most + 1] in float64.

    Rows of more than EXACT weights are measured by their bins, whose spread within no codes of intervals of bins
    remove, with up to MEASURED bits. Further bits take three quarters each, as they do where codes are many.
    """
    if weight.shape[1] <= EXACT:
        return exact_distortions(weight, importance, 1 << most)[:, [(1 << bits) - 1 for bits in range(most + 1)]]
    means, mass = _binned(weight, importance)
    total = (importance.double() * weight.double().square()).sum(1)
    spread = 0.5 * (total - (mass.double() * means.double().square()).sum(1)).clamp(min=0)
    measured = min(most, MEASURED)
    found = exact_distortions(means, mass, 1 << measured)[:, [(1 << bits) - 1 for bits in range(measured + 1)]]
    found = found + spread[:, None]
    further = [found[:, -1:] / 4**bits for bits in range(1, most - measured + 1)]
    return torch.cat([found, *further], dim=1)


def boundaries_of(values: Tensor) -> Tensor:
    """Return the midpoints between neighbouring codes, [G, C - 1]; +inf where there are no more codes."""
    return (values[:, :-1] + values[:, 1:]) / 2


def _binned(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sums of BINS bins of each row, with about as many weights in each half of the bins.

    Half of the bins are of equal width and half hold equally many weights of positive importance, so that neither tails
    nor the middle are coarse.
    """
    counted = importance > 0
    low = torch.where(counted, weight, torch.inf).amin(1, keepdim=True)
    high = torch.where(counted, weight, -torch.inf).amax(1, keepdim=True)
    half = BINS // 2
    even = torch.linspace(0, 1, half + 1, device=weight.device, dtype=torch.float32)[1:]
    widths = low + (high - low) * even
    ordered = torch.where(counted, weight, torch.inf).sort(1).values
    count = counted.sum(1, keepdim=True)
    ranks = (even * count).long().clamp(max=count.clamp(min=1) - 1)
    edges = torch.cat([widths.to(weight.dtype), ordered.gather(1, ranks)], 1).sort(1).values
    edges = edges[:, : BINS - 1].contiguous().nan_to_num(torch.inf)
    used = torch.where(counted, importance, 0)
    sums = ops.assign_codes(torch.where(counted, weight, 0), used, edges)[1]
    means = torch.where(sums[..., 0] > 0, sums[..., 1] / sums[..., 0], 0)
    return means, sums[..., 0]


def _with_zero(values: Tensor, zero: Tensor) -> Tensor:
    """Make the code nearest to zero zero, or a further one where there is room, in the rows `zero`."""
    room = values.isinf().any(1)
    nearest = values.abs().argmin(1, keepdim=True)
    last = torch.full_like(nearest, values.shape[1] - 1)
    there = (values == 0).any(1)
    place = torch.where(room[:, None], last, nearest)
    changed = values.scatter(1, place, 0.0)
    return torch.where((zero & ~there)[:, None], changed, values).sort(1).values


def _without_repeats(values: Tensor) -> Tensor:
    """Fill up with +inf in the place of a value that is there already."""
    repeated = torch.zeros_like(values, dtype=torch.bool)
    repeated[:, 1:] = values[:, 1:] == values[:, :-1]
    return values.masked_fill(repeated, torch.inf).sort(1).values
