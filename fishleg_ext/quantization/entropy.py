"""Entropy coding: a uniform grid whose codes have few bits on average, and Huffman's code as zlib has it.

For codes of fixed length k-means is best; where their frequencies count it is a uniform grid with the weighted mean of
each interval as its value (Choi et al., ICLR 2017, arXiv 1612.01543). Steps of two tensors of mean importance h are
best where h step^2 is the same in both: finer where there is more information.
"""

import itertools
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.ops.quantize import MAX_BITS, offsets_of
from fishleg_ext.quantization.allocation import least_bits

LEVELS = 255  # of a grid, odd, so that there is one in the middle
BISECTIONS = 40
TIE = 1e-6  # bits between codes that are as frequent
ESCAPE = 255  # so many pruned weights, and another number to come


def entropy(codes: Tensor) -> float:
    """Return the entropy of the frequencies of codes, in bits for each.

    Examples:
        >>> entropy(torch.tensor([0, 0, 1, 2]))
        1.5
    """
    return mean_entropy([counts_of(codes)])


def counts_of(codes: Tensor, num_codes: int = 0) -> Tensor:
    """Return how many there are of each code, int64 [C], C = num_codes at least."""
    return torch.bincount(codes.reshape(-1).long(), minlength=num_codes)


def mean_entropy(counts: Iterable[Tensor]) -> float:
    """Return the bits of a code, on average over all, where each tensor's are coded by frequencies of their own.

    Args:
        counts: of each tensor, how many there are of each code, [C].
    """
    bits, total = 0.0, 0
    for count in counts:
        number = int(count.sum())
        bits += number * float(torch.special.entr(count.double() / max(1, number)).sum()) / math.log(2)
        total += number
    return bits / max(1, total)


class Book(NamedTuple):
    """The codebook of one tensor.

    Attributes:
        values: float32 [C], ascending.
        boundaries: float32 [C - 1], between the weights of neighbouring codes.
    """

    values: Tensor
    boundaries: Tensor

    def codes(self, weight: Tensor) -> Tensor:
        """Return the code of each weight."""
        return torch.bucketize(weight.float(), self.boundaries)


def uniform_codebooks(
    weights: Mapping[str, Tensor],
    importances: Mapping[str, Tensor],
    bits: float,
    *,
    with_zero: Collection[str] = (),
    nearest: bool = False,
) -> dict[str, Book]:
    """Return a codebook for each tensor, of the finest grid found whose codes have an entropy of at most `bits`.

    The entropy jumps where a grid has few intervals, and may stay well below `bits` there.

    Args:
        weights: name -> the weights that have codes, [n].
        importances: name -> [n].
        bits: of a code, on average over all tensors.
        with_zero: names of tensors in which zero is a code.
        nearest: codes are those of the nearest values, as elimination takes them. Else those of the interval of the
            grid that a weight lies in, or of the nearest value, whichever distorts less, as of grids about zero and
            beside it.

    Returns:
        name -> the weighted means of the intervals that have weights.
    """
    ways = itertools.product([True] if nearest else [False, True], [0.0] if with_zero else [0.0, 0.5])
    found = [_uniform(weights, importances, bits, with_zero, *way) for way in ways]
    # Beside zero there are two codes at least, whatever the step.
    within = [books for books in found if _rate(books, weights) <= bits]
    return min(within, key=lambda books: _distortion(books, weights, importances))


def _uniform(
    weights: Mapping[str, Tensor],
    importances: Mapping[str, Tensor],
    bits: float,
    with_zero: Collection[str],
    nearest: bool,
    shift: float,
) -> dict[str, Book]:
    mean = {name: float(h.double().mean().clamp(min=1e-300)) for name, h in importances.items() if h.numel()}
    largest = {name: float(weights[name].abs().max()) for name in mean}
    least = least_bits(bits)

    def book(name: str, step: float) -> Book:
        step = max(step, largest[name] / (LEVELS // 2), 1e-30)  # no finer than LEVELS reach
        return _book(weights[name], importances[name], step, name in with_zero, nearest, shift)

    def spent(name: str, step: float) -> float:
        return entropy(book(name, step).codes(weights[name]))

    def coarsest(name: str) -> float:
        """Return a step at which the codes of a tensor have no less entropy than they may have, if there is one."""
        low, high = largest[name] / LEVELS, 4 * largest[name]
        for _ in range(BISECTIONS // 2):
            step = (low * high) ** 0.5
            low, high = (step, high) if spent(name, step) >= least else (low, step)
        return low if least <= spent(name, low) <= bits else math.inf

    coarse = {name: coarsest(name) if least and largest[name] else math.inf for name in mean}

    def books(step: float) -> dict[str, Book]:
        return {name: book(name, min(step / mean[name] ** 0.5, coarse[name])) for name in mean}

    high = 4 * max([*(largest[name] * mean[name] ** 0.5 for name in mean), 1e-150])  # one code is left of each tensor
    low, best = 1e-9 * high, books(high)
    for _ in range(BISECTIONS):
        step = (low * high) ** 0.5
        tried = books(step)
        if _rate(tried, weights) <= bits:
            high, best = step, tried
        else:
            low = step
    none = {name: w.new_zeros(1, dtype=torch.float32) for name, w in weights.items() if name not in best}
    return {name: Book(none[name], none[name][:0]) if name in none else best[name] for name in weights}


def _book(weight: Tensor, importance: Tensor, step: float, with_zero: bool, nearest: bool, shift: float) -> Book:
    """Return the weighted means of the intervals of a grid, of those that have weights.

    Intervals lie about whole multiples of the step or, with a shift of 1/2, between them: then none has weights of both
    signs, which under a mask are far from zero.
    """
    middle = LEVELS // 2
    interval = (weight.double() / step - shift).round().clamp(-middle, middle).long() + middle
    h = importance.double()
    h = h + 1e-9 * h.mean() + 1e-300  # a mean even where nothing matters
    mass = h.new_zeros(LEVELS).index_add_(0, interval, h)
    sums = h.new_zeros(LEVELS).index_add_(0, interval, h * weight.double())
    used = (mass > 0).nonzero()[:, 0]
    values = sums[used] / mass[used]
    if with_zero:
        values[used == middle] = 0
    values = values.float()
    edges = ((used[:-1] - middle + 0.5 + shift) * step).float()
    return Book(values, (values[1:] + values[:-1]) / 2 if nearest else edges)


def _rate(books: Mapping[str, Book], weights: Mapping[str, Tensor]) -> float:
    """Return the entropy of a code, on average over all."""
    return mean_entropy(counts_of(book.codes(weights[name])) for name, book in books.items())


def _distortion(books: Mapping[str, Book], weights: Mapping[str, Tensor], importances: Mapping[str, Tensor]) -> float:
    total = 0.0
    for name, book in books.items():
        value = book.values[book.codes(weights[name])]
        total += float((importances[name].double() * (weights[name].double() - value.double()).square()).sum())
    return total


def boundaries_of_least_cost(values: Tensor, counts: Tensor, multiplier: float) -> Tensor:
    """Return what separates the weights w when each takes the code of least (w - c)^2 + multiplier * its bits.

    Entropy-constrained quantization (Chou, Lookabaugh and Gray, IEEE Transactions on Acoustics, Speech and Signal
    Processing 37, 1989): the bits are -log2 of the frequency. Of codes that are as frequent the first has a little
    fewer, so that with a multiplier large enough all weights take one code.

    Args:
        values: c, [C], ascending.
        counts: how many weights have each code, [C]; those of none count as one.
        multiplier: of the bits, >= 0, a squared weight.

    Returns:
        boundaries [C - 1], ascending. The interval of a code that is the best of no weight is empty.

    Examples:
        >>> boundaries_of_least_cost(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1, 2, 1]), 0.5)
        tensor([-0.7500,  0.7500])
    """
    c, frequency = values.double(), counts.double().clamp(min=1)
    place = torch.empty_like(c)
    place[counts.argsort(descending=True, stable=True)] = torch.arange(len(c), device=c.device, dtype=c.dtype)
    bits = TIE * place - (frequency / frequency.sum()).log2()
    intercept = c.square() + multiplier * bits
    # Above this weight the code of the column is better than that of the row, which lies below it.
    distance = 2 * (c[None] - c[:, None])
    better = (intercept[None] - intercept[:, None]) / distance
    # Of two codes of one value the cheaper is better everywhere.
    better = torch.where(distance == 0, torch.where(bits[None] < bits[:, None], -torch.inf, torch.inf), better)
    below = torch.ones_like(better, dtype=torch.bool).triu(1)
    start = better.masked_fill(~below, -torch.inf).amax(0)
    end = better.masked_fill(~below, torch.inf).amin(1)
    start = torch.where(start < end, start, torch.inf)
    return start.flip(0).cummin(0).values.flip(0)[1:].to(values.dtype)


def huffman(codes: Tensor) -> bytes:
    """Return codes uint8 [n] in zlib's Huffman code, without looking for repetitions."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(codes.cpu().contiguous().numpy().tobytes()) + packer.flush()


def from_huffman(content: bytes, count: int) -> Tensor:
    """Return the `count` codes, uint8.

    Raises:
        ValueError: there are others than so many.
    """
    reader = zlib.decompressobj(-15)
    try:
        found = reader.decompress(content, count + 1)
    except zlib.error as error:
        raise ValueError(f"codes cannot be read: {error}") from error
    if len(found) != count:
        raise ValueError(f"expected {count} codes, got {'more' if len(found) > count else len(found)}")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)


def gaps_of(mask: Tensor, escape: int = ESCAPE) -> Tensor:
    """Return how many pruned weights lie before each kept one, uint8; `escape` stands for as many and more to come.

    Examples:
        >>> gaps_of(torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 1]).bool(), 3)
        tensor([2, 0, 3, 1], dtype=torch.uint8)
    """
    place = mask.reshape(-1).nonzero()[:, 0]
    gaps = torch.diff(place, prepend=place.new_full((1,), -1)) - 1
    repeats = gaps // escape + 1
    gaps_out = torch.full((int(repeats.sum()),), escape, dtype=torch.uint8, device=mask.device)
    gaps_out[repeats.cumsum(0) - 1] = (gaps % escape).to(torch.uint8)
    return gaps_out


def from_gaps(gaps: Tensor, numel: int, escape: int = ESCAPE) -> Tensor:
    """Return the mask, bool [numel].

    Raises:
        ValueError: they go beyond the end.
    """
    is_last = gaps != escape
    place = (gaps.long() + is_last).cumsum(0)[is_last] - 1
    if len(place) and int(place[-1]) >= numel:
        raise ValueError(f"the mask goes beyond the {numel} weights there are")
    mask = torch.zeros(numel, dtype=torch.bool, device=gaps.device)
    mask[place] = True
    return mask


def best_escape(mask: Tensor, widths: Sequence[int] = range(2, 9)) -> tuple[int, Tensor]:
    """Return the width in bits at which the gaps of a mask, each of this width, are shortest, and these gaps."""
    found = {width: gaps_of(mask, (1 << width) - 1) for width in widths}
    width = min(found, key=lambda width: width * len(found[width]))
    return width, found[width]


def pack_uniform(codes: Tensor, width: int) -> Tensor:
    """Pack codes uint8 [n] of one width."""
    bits = torch.full((min(1, len(codes)),), width, dtype=torch.uint8, device=codes.device)
    offsets, num_bytes = _layout(bits, len(codes))
    return ops.pack_codes(codes, bits, offsets, num_bytes, max(1, len(codes)))


def unpack_uniform(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the `count` codes that `pack_uniform` packed; ValueError if there are others than so many."""
    if not 0 <= width <= MAX_BITS or packed.numel() != (width * count + 7) // 8:
        raise ValueError(f"expected {count} codes of {width} bits, got {packed.numel()} bytes")
    bits = torch.full((min(1, count),), width, dtype=torch.uint8, device=packed.device)
    return ops.unpack_codes(packed, bits, _layout(bits, count)[0], count, max(1, count))


def _layout(bits: Tensor, count: int) -> tuple[Tensor, int]:
    """Return offsets and bytes of one group."""
    return offsets_of(bits, count, max(1, count))
