"""Hard inputs for every op: odd sizes, single weights, nothing at all, views, ties, zeros, dead weights, NaN and inf,
matrices that are nearly singular. `fishleg-ext check` and the tests of the kernels run on them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.reference.masks import pack_mask
from fishleg_ext.reference.quantize import chunk_ranks, offsets_of

CONDITIONS = (1e3, 1e5, 1e7)
# Blocks of one weight, around a warp, those of the literature, around what kernels hold, larger than that.
SIZES = (1, 7, 16, 31, 32, 50, 64, 96, 128, 192, 200, 224, 300)
MANY = 600  # blocks: more than a GPU has multiprocessors


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    condition: float = 1.0  # how much the problem magnifies rounding errors
    exact: bool = False  # every implementation gives the same bits

    @property
    def numel(self) -> int:
        """Elements of all its tensors."""
        tensors = [item for arg in self.args for item in (arg if isinstance(arg, list) else [arg])]
        return sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))


class Inputs:
    """Draws the inputs of cases."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, in the dtype under test."""
        return self.cast(torch.randn(shape, dtype=torch.float64, generator=self.generator))

    def positive(self, *shape: int) -> Tensor:
        """Uniform in [0.1, 1.1)."""
        return self.cast(torch.rand(shape, dtype=torch.float64, generator=self.generator) + 0.1)

    def mask(self, *shape: int, density: float = 0.5) -> Tensor:
        """True with probability `density`."""
        return (torch.rand(shape, generator=self.generator) < density).to(self.device)

    def spd(self, num_blocks: int, size: int, condition: float) -> Tensor:
        """Symmetric positive definite blocks [K, B, B], in the dtype under test, float32 at least."""
        return self.wide(random_spd(num_blocks, size, condition, self.generator))

    def cast(self, tensor: Tensor) -> Tensor:
        """To the dtype and device under test."""
        return tensor.to(self.device, self.dtype)

    def wide(self, tensor: Tensor) -> Tensor:
        """To float32, or to the dtype under test where that is wider: curvature is never kept in less."""
        return tensor.to(self.device, widened(self.dtype))


def _sized() -> Iterator[tuple[int, int, float]]:
    """K, B and a condition number: every size, some of them at every condition, and many blocks."""
    for index, size in enumerate(SIZES):
        yield 3 if size < 100 else 1, size, CONDITIONS[index % 3]
    for size in (7, 50, 64, 128):
        for condition in CONDITIONS:
            yield 2, size, condition
    yield MANY, 32, 1e3


def random_spd(num_blocks: int, size: int, condition: float, generator: torch.Generator) -> Tensor:
    """Symmetric blocks [K, B, B] in float64 with eigenvalues from 1 to `condition`."""
    basis = torch.randn(num_blocks, size, size, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(basis).Q if num_blocks else basis
    spectrum = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    matrix = basis * spectrum @ basis.mT
    return (matrix + matrix.mT) / 2


# The cases of each op


def _block_gram_(new: Inputs) -> Iterator[Case]:
    for m, k, b in [(1, 1, 1), (33, 2, 50), (64, 2, 128), (40, 33, 7), (0, 2, 3), (4, 0, 3), (3, MANY, 32)]:
        for alpha in (1.0, 1.0 / 1024):
            name = f"m={m} K={k} B={b} alpha={alpha:g}"
            yield Case(name, (new.spd(k, b, 10.0), new.normal(m, k, b), alpha), {}, 1.0 + m)  # roundings of m terms
    for size in SIZES:
        yield Case(f"m=19 K=3 B={size}", (new.spd(3, size, 10.0), new.normal(19, 3, size), 0.5), {}, 20.0)
    yield Case("expanded gradients", (new.spd(2, 5, 10.0), new.normal(1, 2, 5).expand(6, 2, 5)))
    yield Case("transposed gradients", (new.spd(3, 5, 10.0), new.normal(4, 5, 3).mT))


def _block_inverse(new: Inputs) -> Iterator[Case]:
    for k, b, condition in _sized():
        gram = new.spd(k, b, condition)
        yield Case(f"K={k} B={b} condition={condition:g}", (gram / gram.amax(), 0.0), {}, condition)
    yield Case("no blocks", (new.spd(0, 4, 1.0), 0.1))
    yield Case("zeros, damped", (new.wide(torch.zeros(2, 5, 5)), 0.5))
    broken = new.spd(3, 6, 10.0)
    broken[1, 2, 3] = broken[1, 3, 2] = torch.nan
    yield Case("NaN in one block", (broken, 0.1), {}, 10.0)
    for name, i, j in (("inf on a diagonal", 0, 0), ("inf off a diagonal", 4, 1)):
        broken = new.spd(3, 6, 10.0)
        broken[1, i, j] = broken[1, j, i] = torch.inf
        yield Case(name, (broken, 0.1), {}, 10.0)
    low_rank = new.wide(torch.ones(2, 6, 6))
    yield Case("singular, damped", (low_rank, 0.25), {}, 25.0)


def _woodbury_update_(new: Inputs) -> Iterator[Case]:
    sizes = [(6, 1, size) for size in SIZES]
    for m, k, b in [(1, 1, 1), (7, 3, 5), (40, 2, 33), (0, 1, 3), (3, 0, 3), (2, MANY, 32), *sizes]:
        eye = torch.eye(b, dtype=torch.float64).repeat(k, 1, 1)
        for damping in (1e-1, 1e-3):
            grads = new.normal(m, k, b)
            trace = float(grads.double().square().sum((0, 2)).max()) / max(1, m) if k else 0.0
            name = f"m={m} K={k} B={b} damping={damping:g}"
            yield Case(name, (new.wide(eye / damping), grads, max(1, m)), {}, 1 + trace / damping)


def _fisher_diag_update_(new: Inputs) -> Iterator[Case]:
    for shapes in ([(1,), (33, 5), (0,), (4097,)], [(3, 2, 2)], []):
        fisher = [new.wide(torch.rand(shape, dtype=torch.float64, generator=new.generator)) for shape in shapes]
        for beta in (0.0, 0.9, 1.0):
            yield Case(f"{len(shapes)} tensors, beta={beta:g}", (fisher, [new.normal(*s) for s in shapes], beta))
    yield Case("transposed", ([new.wide(new.positive(5, 3)).mT], [new.normal(5, 3).mT], 0.5))
    mixed = [new.normal(33).float(), new.normal(5000).half(), new.normal(17).bfloat16()]
    yield Case("several dtypes of gradients", ([new.wide(new.positive(len(g))) for g in mixed], mixed, 0.25))
    inside = new.wide(new.positive(5000))[3:4900]
    yield Case("inside of a larger tensor", ([inside], [new.normal(len(inside))], 0.75))
    odd = new.cast(torch.tensor([torch.nan, torch.inf, 0.0, 1.0]))
    yield Case("NaN and inf", ([new.wide(torch.ones(4))], [odd], 0.5))


def _obs_score(new: Inputs) -> Iterator[Case]:
    for shape in [(), (1,), (3, 5), (4097,), (0,)]:
        yield Case(f"shape={list(shape)}", (new.normal(*shape), new.positive(*shape)))
    yield Case("transposed", (new.normal(4, 3).mT, new.positive(4, 3).mT))
    odd = new.cast(torch.tensor([0.0, 1.0, torch.nan, torch.inf, 2.0]))
    yield Case("NaN, inf, zeros", (odd, new.cast(torch.tensor([0.0, 0.0, 1.0, 1.0, torch.inf]))))


def _obs_eliminate(new: Inputs) -> Iterator[Case]:
    for k, b, condition in _sized():
        weight, inverse = new.normal(k, b), new.spd(k, b, condition)
        name = f"K={k} B={b} condition={condition:g}"
        yield Case(name, (weight, inverse, new.mask(k, b, density=1.1)), {}, condition)
    for b in (8, 28, 56, 64, 100, 128, 176, 192, 300):
        for k in (3, MANY) if b in (28, 64) else (3,):
            args = new.normal(k, b), new.spd(k, b, 1e3), new.mask(k, b, density=0.9)
            yield Case(f"group=4 K={k} B={b}", args, {"group": 4}, 1e3)
    rows, shared = new.normal(5, 300), new.spd(1, 300, 1e3)
    for group in (1, 4):
        args = rows, shared, new.mask(5, 300, density=0.8)
        yield Case(f"large inverse shared, group={group}", args, {"dead_first": True, "group": group}, 1e3)
    weight, inverse, alive = new.normal(5, 24), new.spd(5, 24, 1e3), new.mask(5, 24, density=0.7)
    for options in (
        {},
        {"dead_first": True},
        {"stop": 1e-3},
        {"stop": -1.0},
        {"n": 2, "m": 4},
        {"n": 1, "m": 3, "dead_first": True, "stop": 1e-2},
        {"n": 0, "m": 8},
        {"group": 4},
        {"group": 4, "dead_first": True},
        {"group": 4, "stop": 1e-1},
        {"group": 3, "dead_first": True, "stop": 1e-2},
    ):
        name = " ".join(f"{option}={value}" for option, value in options.items())
        yield Case(f"dead weights {name}", (weight, inverse, alive), options, 1e3)
    dirty = inverse.clone()
    dirty.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), torch.nan)
    yield Case("NaN where dead", (weight.masked_fill(~alive, torch.nan), dirty, alive), {}, 1e3)
    yield Case("inverse expanded", (weight, inverse[:1].expand(5, 24, 24), alive), {"dead_first": True}, 1e3)
    yield Case("inverse shared", (weight, inverse[:1], alive), {"dead_first": True}, 1e3)
    yield Case("transposed views", (new.normal(24, 5).mT, inverse.mT, new.mask(24, 5).mT), {}, 1e3)
    wide = new.spd(5, 32, 1e3)[:, :24, :24]
    yield Case("cut from larger blocks", (weight, wide, alive), {}, 1e3)
    yield Case("no blocks", (new.normal(0, 4), new.spd(0, 4, 1.0), new.mask(0, 4)))
    yield Case("nothing alive", (weight, inverse, new.mask(5, 24, density=-1.0)), exact=True)
    for b in (6, 40, 65):
        eye = new.wide(torch.eye(b))[None]
        every = new.mask(3, b, density=1.1)
        yield Case(f"ties, B={b}", (new.cast(torch.ones(3, b)), eye, every), exact=True)
        steps = new.cast(torch.arange(b) % 5 - 2.0).expand(3, b)
        yield Case(f"ties and zeros, B={b}", (steps, 0.5 * eye, every), {"stop": 1.0}, exact=True)
        if b % 4 == 0:
            yield Case(f"ties and zeros, group=4 B={b}", (steps, 0.5 * eye, every), {"group": 4}, exact=True)
    odd = new.cast(torch.tensor([[1.0, torch.nan, 2.0, torch.inf, -1.0, 0.5]]))
    variances = new.wide(torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0, torch.inf])))[None]
    yield Case("NaN, inf, variances not positive", (odd, variances, new.mask(1, 6, density=1.1)), exact=True)


def _obs_compensate(new: Inputs) -> Iterator[Case]:
    for k, b, condition in _sized():
        args = (new.normal(k, b), new.spd(k, b, condition), new.mask(k, b))
        yield Case(f"K={k} B={b} condition={condition:g}", args, {}, condition)
    weight, inverse = new.normal(4, 12), new.spd(4, 12, 1e3)
    for density in (-1.0, 1.1):
        yield Case(f"pruned with density {density:g}", (weight, inverse, new.mask(4, 12, density=density)), {}, 1e3)
    yield Case("inverse shared", (weight, inverse[:1].expand(4, 12, 12), new.mask(4, 12)), {}, 1e3)
    infinite = inverse.clone()
    infinite[1, 2, 2] = torch.inf
    yield Case("inf on a diagonal", (weight, infinite, new.mask(4, 12, density=1.1)), {}, 1e3)
    some = new.mask(4, 12, density=1.1)
    some[:, 7:] = False
    yield Case("inf on a diagonal, some pruned", (weight, infinite, some), {}, 1e3)
    partly = inverse.clone()
    partly[:, 3], partly[:, :, 3] = 0, 0
    yield Case("a variance of zero", (weight, partly, new.mask(4, 12)), {}, 1e3)
    yield Case("transposed views", (new.normal(12, 4).mT, inverse.mT, new.mask(12, 4).mT), {}, 1e3)
    yield Case("no blocks", (new.normal(0, 4), new.spd(0, 4, 1.0), new.mask(0, 4)))


def _obs_quantize(new: Inputs) -> Iterator[Case]:
    def codebook(blocks: int, segments: int, codes: int) -> Tensor:
        return new.cast(1.5 * new.normal(blocks, segments, codes).double()).sort(2).values

    for k, b, condition in [(1, 1, 1e3), (3, 7, 1e3), (2, 16, 1e5), (3, 33, 1e3), (2, 64, 1e5), (1, 200, 1e3)]:
        for order in ("cheapest", "given"):
            args = new.normal(k, b), new.spd(k, b, condition), new.mask(k, b, density=1.1), codebook(1, 1, 4)
            yield Case(f"K={k} B={b} condition={condition:g} {order}", args, {"order": order}, condition)
    weight, inverse, alive = new.normal(5, 24), new.spd(5, 24, 1e3), new.mask(5, 24, density=0.7)
    for name, codes in (("rows", codebook(5, 1, 3)), ("segments", codebook(1, 4, 2)), ("both", codebook(5, 6, 5))):
        for order in ("cheapest", "given"):
            yield Case(f"{name} {order}", (weight, inverse, alive, codes), {"order": order}, 1e3)
    padded = codebook(5, 2, 4)
    padded[1, 0, 2:], padded[3, 1, 1:] = torch.inf, torch.inf
    for options in (
        {},
        {"dead_first": True},
        {"order": "given"},
        {"num_free": 2, "dead_first": True},
        {"num_free": 2, "order": "given"},
        {"num_free": 4},
    ):
        name = " ".join(f"{option}={value}" for option, value in options.items())
        yield Case(f"fewer codes {name}", (weight, inverse, alive, padded), options, 1e3)
    dirty = inverse.clone()
    dirty.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), torch.nan)
    yield Case("NaN where dead", (weight.masked_fill(~alive, torch.nan), dirty, alive, padded), {}, 1e3)
    shared = inverse[:1].expand(5, 24, 24)
    yield Case("inverse expanded", (weight, shared, alive, codebook(1, 1, 4)), {"dead_first": True}, 1e3)
    args = new.normal(24, 5).mT, inverse.mT, new.mask(24, 5).mT, codebook(1, 1, 4)
    yield Case("transposed views", args, {}, 1e3)
    yield Case("no blocks", (new.normal(0, 4), new.spd(0, 4, 1.0), new.mask(0, 4), codebook(1, 1, 2)))
    yield Case("nothing alive", (weight, inverse, new.mask(5, 24, density=-1.0), codebook(1, 1, 2)), exact=True)
    eye = new.wide(torch.eye(8))[None]
    steps = new.cast(torch.arange(8) - 4.0).expand(3, 8) / 2
    whole = new.cast(torch.tensor([-1.0, 0.0, 1.0, torch.inf]))[None, None]
    for order in ("cheapest", "given"):
        yield Case(f"ties {order}", (steps, eye, new.mask(3, 8, density=1.1), whole), {"order": order}, exact=True)
    odd = new.cast(torch.tensor([[1.0, 0.375, 2.0, -1.0, 0.5, 0.25]]))
    variances = new.wide(torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0, 2.0])))[None]
    yield Case("variances not positive", (odd, variances, new.mask(1, 6, density=1.1), whole), exact=True)


def _kron_mul(new: Inputs) -> Iterator[Case]:
    for *batch, o, i in [(1, 1), (3, 7), (33, 50), (2, 3, 16, 9), (0, 3, 4)]:
        factors = new.spd(1, o, 1e2)[0], new.spd(1, i, 1e2)[0]
        yield Case(f"shape={[*batch, o, i]}", (new.normal(*batch, o, i), *factors, new.positive(o, i)), {}, 10.0)
    for shape in [(33, 50), (2, 16, 9)]:
        row, col = new.positive(shape[-2]), new.spd(1, shape[-1], 1e2)[0]
        yield Case(
            f"diagonal row factor, shape={[*shape]}",
            (new.normal(*shape), row, col, new.positive(*shape[-2:])),
            {},
            10.0,
        )
        yield Case(f"diagonal row factor, not scaled, shape={[*shape]}", (new.normal(*shape), row, col), {}, 10.0)
    yield Case("not scaled", (new.normal(7, 5), new.spd(1, 7, 1e2)[0], new.spd(1, 5, 1e2)[0]), {}, 10.0)
    views = (new.normal(1, 4, 3).mT.expand(5, 3, 4), new.spd(1, 3, 10.0)[0].mT, new.spd(1, 4, 10.0)[0])
    yield Case("views", (*views, new.positive(4, 3).mT), {}, 10.0)


def _foreach_kron_mul(new: Inputs) -> Iterator[Case]:
    shapes = [(33, 50), (2, 16, 8), (1, 1), (0, 4), (4, 65)]
    rows = [new.spd(1, shape[-2], 1e2)[0] for shape in shapes]
    cols = [new.spd(1, shape[-1], 1e2)[0] for shape in shapes]
    x, scales = [new.normal(*shape) for shape in shapes], [new.positive(*shape[-2:]) for shape in shapes]
    yield Case("several", (x, rows, cols, scales), {}, 10.0)
    some_diagonal = [row.diagonal() if index % 2 else row for index, row in enumerate(rows)]
    yield Case(
        "some diagonal row factors, some not scaled",
        (x, some_diagonal, cols, [*scales[:2], None, None, None]),
        {},
        10.0,
    )
    halves = [row.bfloat16().diagonal() for row in rows], [col.bfloat16() for col in cols]
    yield Case("narrow factors", (x, *halves, scales), {}, 10.0)
    yield Case("none", ([], [], [], []))


def _kron_diag(new: Inputs) -> Iterator[Case]:
    for o, i in [(1, 1), (3, 7), (33, 50), (0, 4)]:
        factors = new.spd(1, o, 1e2)[0], new.spd(1, i, 1e2)[0]
        yield Case(f"shape={[o, i]}", (*factors, new.positive(o, i)))
    yield Case("diagonal row factor, not scaled", (new.positive(3), new.spd(1, 4, 10.0)[0]))
    yield Case("views", (new.spd(1, 3, 10.0)[0].mT, new.spd(1, 4, 10.0)[0], new.positive(4, 3).mT))


def _keep_mask(new: Inputs) -> Iterator[Case]:
    for shapes in ([(1,)], [(33, 5), (0,), (4097,)], []):
        scores = [new.normal(*shape) for shape in shapes]
        total = sum(score.numel() for score in scores)
        for count in sorted({0, total // 3, total}):
            yield Case(f"{count} of {total}", (scores, count))
    tied = [new.cast(torch.arange(100) % 3), new.cast(torch.arange(50) % 2).reshape(5, 10).mT]
    for count in (1, 49, 60, 100):
        yield Case(f"ties, {count} of 150", (tied, count))
    several = [new.cast(torch.arange(30 + i) % 3 - 1) for i in range(9)]  # tensors that share the ties
    for count in (0, 30, 150, 200, 306):
        yield Case(f"ties over several tensors, {count} of 306", (several, count))
    many = [new.cast(torch.randint(0, 4, (7,), generator=new.generator)) for _ in range(130)]
    yield Case("ties over many tensors, 400 of 910", (many, 400))
    alike = new.cast(torch.randint(0, 3, (20_000,), generator=new.generator))
    yield Case("ties, 9000 of 20000", ([alike], 9000))
    odd = new.cast(torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, torch.nan, 1.0]))
    for count in (1, 3, 4, 6):
        yield Case(f"NaN and inf, {count} of 7", ([odd], count))
    yield Case("NaN of either sign, 1 of 3", ([new.cast(torch.tensor([torch.nan, -torch.nan, torch.inf]))], 1))


def _nm_mask(new: Inputs) -> Iterator[Case]:
    for n, m, dim in [(2, 4, -1), (1, 4, 0), (4, 8, 1), (0, 2, 0), (3, 3, -1)]:
        yield Case(f"{n}:{m} along {dim}", (new.normal(24, 24), n, m, dim))
    yield Case("ties", (new.cast(torch.arange(48) % 3).reshape(4, 12), 2, 4))
    odd = new.cast(torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf, torch.nan, torch.nan, 0.0, -0.0]))
    yield Case("NaN and inf", (odd, 2, 4))
    many = torch.where(torch.arange(256) % 3 == 0, -torch.nan, torch.arange(256.0))
    yield Case("NaN of negative sign", (new.cast(many), 100, 256))
    yield Case("empty", (new.normal(0, 4), 2, 4))
    yield Case("transposed", (new.normal(8, 12).mT, 2, 4))


_MASK_SHAPES = [(1,), (7,), (8,), (9,), (3, 5), (0,), (), (4096,), (4097,), (3, 5000)]


def _pack_mask(new: Inputs) -> Iterator[Case]:
    for shape in _MASK_SHAPES:
        yield Case(f"shape={list(shape)}", (new.mask(*shape),))
    yield Case("transposed", (new.mask(9, 5).mT,))


def _unpack_mask(new: Inputs) -> Iterator[Case]:
    for shape in _MASK_SHAPES:
        packed = pack_mask(new.mask(*shape))
        yield Case(f"shape={list(shape)}", (packed, list(shape)))


def _apply_masks_(new: Inputs) -> Iterator[Case]:
    tensors = [new.normal(*shape) for shape in _MASK_SHAPES]
    for density in (0.5, -1.0, 1.1):
        masks = [pack_mask(new.mask(*shape, density=density)) for shape in _MASK_SHAPES]
        yield Case(f"{len(tensors)} tensors, density {density:g}", (tensors, masks), exact=True)
    odd = new.cast(torch.tensor([torch.nan, torch.inf, -0.0, torch.nan, -torch.inf]))
    kept = torch.tensor([False, False, False, True, True], device=new.device)
    yield Case("NaN and inf", ([odd], [pack_mask(kept)]), exact=True)
    mixed = [new.normal(33), new.normal(10).double(), new.normal(9).half(), new.normal(17).bfloat16()]
    yield Case("several dtypes", (mixed, [pack_mask(new.mask(len(t))) for t in mixed]), exact=True)
    # A tensor in the midst of memory that must stay as it is, at an address with no alignment but its own.
    inside = new.normal(5000)[3:4900]
    yield Case("inside of a larger tensor", ([inside], [pack_mask(new.mask(len(inside)))]), exact=True)
    yield Case("transposed", ([new.normal(9, 5).mT], [pack_mask(new.mask(5, 9))]), exact=True)
    yield Case("nothing", ([], []), exact=True)


def _layouts(new: Inputs) -> Iterator[tuple[str, Tensor, Tensor, int, int, int, tuple[Tensor, Tensor] | tuple[()]]]:
    """Name, bits, offsets, bytes, weights, group size, and mask and ranks, of tensors cut into groups of codes."""
    sizes = [(1, 1), (7, 3), (64, 64), (65, 64), (1000, 25), (5000, 5000), (4097, 1500), (300, 1), (0, 4), (2048, 1024)]
    for numel, group_size in sizes:
        groups = -(-numel // group_size)
        for density in (None, 0.3) if numel else (None,):
            bits = torch.randint(0, 9, (groups,), generator=new.generator).to(new.device, torch.uint8)
            mask = None if density is None else new.mask(numel, density=density)
            offsets, num_bytes = offsets_of(bits, numel, group_size, mask)
            masks = () if mask is None else (pack_mask(mask), chunk_ranks(mask, group_size))
            name = f"n={numel} group_size={group_size}" + ("" if mask is None else f" density={density}")
            yield name, bits, offsets, num_bytes, numel, group_size, masks
    for width in range(9):
        bits = torch.full((3,), width, dtype=torch.uint8, device=new.device)
        yield f"{width} bits", bits, *offsets_of(bits, 100, 37), 100, 37, ()
    bits = torch.tensor([3, 5], dtype=torch.uint8, device=new.device)
    for density in (-1.0, 1.1):
        mask = new.mask(3001, density=density)
        layout = offsets_of(bits, 3001, 2000, mask)
        yield f"density={density:g}", bits, *layout, 3001, 2000, (pack_mask(mask), chunk_ranks(mask, 2000))


def _bytes(new: Inputs, count: int) -> Tensor:
    return torch.randint(0, 256, (count,), generator=new.generator).to(new.device, torch.uint8)


def _pack_codes(new: Inputs) -> Iterator[Case]:
    for name, bits, offsets, num_bytes, numel, group_size, masks in _layouts(new):
        yield Case(name, (_bytes(new, numel), bits, offsets, num_bytes, group_size, *masks))


def _unpack_codes(new: Inputs) -> Iterator[Case]:
    for name, bits, offsets, num_bytes, numel, group_size, masks in _layouts(new):
        yield Case(name, (_bytes(new, num_bytes), bits, offsets, numel, group_size, *masks))


def _dequantize_fixed_point(new: Inputs) -> Iterator[Case]:
    for name, bits, offsets, num_bytes, numel, group_size, masks in _layouts(new):
        for half in (False, True):
            args = _bytes(new, num_bytes), bits, offsets, new.normal(len(bits)), half, [numel], group_size, *masks
            yield Case(f"{name} half={half}", args)
    bits = torch.tensor([2, 3, 4], dtype=torch.uint8, device=new.device)
    scale = new.cast(torch.tensor([torch.nan, torch.inf, 1.0]))
    layout = offsets_of(bits, 24, 8)
    yield Case("NaN and inf", (_bytes(new, layout[1]), bits, layout[0], scale, True, [4, 6], 8))


def _dequantize_codebook(new: Inputs) -> Iterator[Case]:
    for name, bits, offsets, num_bytes, numel, group_size, masks in _layouts(new):
        sizes = 1 << bits.long()
        starts = sizes.cumsum(0) - sizes
        codebook = new.normal(int(sizes.sum()))
        args = _bytes(new, num_bytes), bits, offsets, codebook, starts, [numel], group_size, *masks
        yield Case(name, args, exact=True)
        if len(bits) > 1:  # a codebook of all groups, of whose end some codes are beyond
            args = *args[:3], new.normal(16), torch.zeros_like(starts), *args[5:]
            yield Case(f"{name} shared", args, exact=True)


def _assign_codes(new: Inputs) -> Iterator[Case]:
    for groups, size, codes in [
        (1, 1, 2),
        (3, 100, 4),
        (2, 5000, 16),
        (5, 33, 1),
        (1, 2049, 256),
        (2, 40, 17),
        (0, 4, 4),
    ]:
        boundaries = new.normal(groups, codes - 1).sort(1).values
        args = new.normal(groups, size), new.positive(groups, size), boundaries
        yield Case(f"G={groups} N={size} C={codes}", args, {}, 1.0 + size**0.5)
    padded = new.cast(torch.tensor([[-1.0, 0.0, torch.inf], [0.0, 1.0, 1.0]]))
    values = new.cast(torch.tensor([[-1.0, 0.0, 3.0, torch.inf, 0.5], [1.0, 2.0, 0.0, -1.0, -torch.inf]]))
    yield Case("ties, inf", (values, new.cast(torch.ones(2, 5)), padded))
    yield Case("NaN", (new.cast(torch.tensor([[torch.nan, 1.0]])), new.cast(torch.ones(1, 2)), padded[:1]))
    yield Case("nothing in a row", (new.normal(3, 0), new.normal(3, 0), new.normal(3, 3).sort(1).values))
    yield Case("transposed", (new.normal(6, 4).mT, new.positive(6, 4).mT, new.normal(4, 3).sort(1).values), {}, 4.0)


CASES: dict[str, Callable[[Inputs], Iterator[Case]]] = {
    "block_gram_": _block_gram_,
    "block_inverse": _block_inverse,
    "woodbury_update_": _woodbury_update_,
    "fisher_diag_update_": _fisher_diag_update_,
    "obs_score": _obs_score,
    "obs_eliminate": _obs_eliminate,
    "obs_compensate": _obs_compensate,
    "obs_quantize": _obs_quantize,
    "kron_mul": _kron_mul,
    "foreach_kron_mul": _foreach_kron_mul,
    "kron_diag": _kron_diag,
    "keep_mask": _keep_mask,
    "nm_mask": _nm_mask,
    "pack_mask": _pack_mask,
    "unpack_mask": _unpack_mask,
    "apply_masks_": _apply_masks_,
    "pack_codes": _pack_codes,
    "unpack_codes": _unpack_codes,
    "dequantize_fixed_point": _dequantize_fixed_point,
    "dequantize_codebook": _dequantize_codebook,
    "assign_codes": _assign_codes,
}
