"""Fixed-point numbers: the step of each group of weights, of least weighted distortion.

A group of b bits has the levels -2^(b-1), ..., 2^(b-1) - 1 in steps of its scale, zero among them; the scale may be
negative, which turns the range around. Under a mask, where zero needs no code, levels lie half a step beside these:
+-1/2, +-3/2, ..., as many on either side.
"""

import torch
from torch import Tensor

from fishleg_ext.quantization.kmeans import distortion

CANDIDATES = 16  # steps that are tried, from a fraction of the largest weight on
REFINEMENTS = 6  # of the best step, in closed form for the codes that it gives
LEAST = 0.15  # the smallest step tried, over the one at which the largest weight has the outermost level


def codes_of(weight: Tensor, scale: Tensor, bits: Tensor | int, half: bool) -> Tensor:
    """Return the nearest code of each weight, [G, N]; of ties the even level, or with `half` the upper.

    Args:
        weight: [G, N].
        scale: [G].
        bits: [G], or of all groups.
        half: whether no level is zero.
    """
    middle, top = _range(bits, weight)
    inverse = torch.where(scale != 0, 1 / scale, 0)[:, None]
    level = weight * inverse
    level = level.floor() if half else level.round()
    return (level + middle).clamp(min=0).minimum(top)


def values_of(codes: Tensor, scale: Tensor, bits: Tensor | int, half: bool) -> Tensor:
    """Return what codes [G, N] stand for, as `ops.dequantize_fixed_point` computes it."""
    middle, _ = _range(bits, codes)
    return scale[:, None] * (codes - middle + (0.5 if half else 0.0))


def _range(bits: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
    count = 1 << torch.as_tensor(bits, device=like.device).long().reshape(-1, 1)
    return (count // 2).to(like.dtype), (count - 1).to(like.dtype)


def fit_scale(weight: Tensor, importance: Tensor, bits: int, half: bool) -> tuple[Tensor, Tensor]:
    """Find the scale of each group that minimises sum h (w - q)^2.

    Args:
        weight: w, [G, N], finite.
        importance: h, [G, N], finite, >= 0.
        bits: of all groups, 0 to 8.
        half: whether no level is zero.

    Returns:
        scale [G] in float32 and the distortion [G] in float64.
    """
    weight = weight.float()
    largest = torch.where(importance > 0, weight.abs(), 0).amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    outermost = max((1 << bits) / 2 - (0.5 if half else 0.0), 0.5)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf, dtype=torch.float64)

    def consider(scale: Tensor) -> Tensor:
        """Keep the scale in the groups where it is better, and return what is best for its codes."""
        nonlocal best, least
        codes = codes_of(weight, scale, bits, half)
        level = values_of(codes, torch.ones_like(scale), bits, half)
        found = distortion(weight, importance, scale[:, None] * level)
        best, least = torch.where(found < least, scale, best), torch.minimum(found, least)
        squares = (importance.double() * level.double().square()).sum(1)
        products = (importance.double() * (level * weight).double()).sum(1)
        return torch.where(squares > 0, products / squares, 0).to(scale.dtype)

    for sign in (1,) if half else (1, -1):
        for factor in torch.linspace(LEAST, 1.0, CANDIDATES if bits > 1 else 4).tolist():
            consider(sign * factor / outermost * largest)
    scale = best
    for _ in range(REFINEMENTS):
        scale = consider(scale)
    return best, least


def table_of(scale: Tensor, bits: Tensor, half: bool) -> Tensor:
    """Return the levels of each group, ascending, [G, 2^(most bits)], filled up with +inf."""
    count = 1 << int(bits.max()) if len(bits) else 1
    codes = torch.arange(count, device=scale.device, dtype=scale.dtype).expand(len(bits), -1)
    values = values_of(codes, scale, bits, half)
    return values.masked_fill(codes >= (1 << bits.long())[:, None], torch.inf).sort(1).values
