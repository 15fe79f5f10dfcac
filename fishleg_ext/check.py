"""Compares every implementation of every op with the reference in float64, on this machine.

A case is one call. Its inputs are drawn in float64, rounded to the dtype under test, and given to the implementation as
they are and to the reference, the yardstick, in float64 on the CPU. So only what the implementation does is measured.

- Floating-point results: the error is max |got - expected| / max |expected|; NaN and inf must be in the same places.
  A kernel's budget is twice (the error of the reference in the same precision + one rounding of the result). The
  reference's own is 16 times (eps times the condition number + one rounding of the result).
- Booleans and integers, and all of a case marked exact: bitwise.
- obs_eliminate: where two costs are close, any order is right that is as cheap. So the order returned is replayed in
  float64 (`_elimination_error`): the costs must be those reported, and none may have been cheaper.

While an implementation runs, new memory is filled with NaN, so that what it leaves unwritten shows.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.dtypes import widened
from fishleg_ext.ops.dispatch import OPS, Op

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONDITIONS = (1e3, 1e5, 1e7)
WITHOUT_DTYPE = ("pack_mask", "unpack_mask")


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    condition: float = 1.0  # how much the problem magnifies rounding errors
    exact: bool = False  # every implementation gives the same bits


@dataclass
class Row:
    """What one implementation of one op did on all cases of one dtype."""

    op: str
    impl: str
    dtype: str
    cases: int = 0
    error: float = 0.0  # of the case that used most of its budget
    budget: float = 0.0
    failures: list[str] = field(default_factory=list)
    reason: str = ""  # why it ran on no case, or not on all

    def take(self, case: Case, error: float, budget: float) -> None:
        """Record the result of a case."""
        self.cases += 1
        if not error <= budget:
            self.failures.append(f"{case.name}: error {error:.2g}, budget {budget:.2g}")
        if self.cases == 1 or error * self.budget > self.error * budget:
            self.error, self.budget = error, budget


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
        basis = torch.randn(num_blocks, size, size, dtype=torch.float64, generator=self.generator)
        basis = torch.linalg.qr(basis).Q if num_blocks else basis
        spectrum = torch.logspace(0, float(torch.tensor(condition).log10()), size, dtype=torch.float64)
        matrix = basis * spectrum @ basis.mT
        return self.wide((matrix + matrix.mT) / 2)

    def cast(self, tensor: Tensor) -> Tensor:
        """To the dtype and device under test."""
        return tensor.to(self.device, self.dtype)

    def wide(self, tensor: Tensor) -> Tensor:
        """To float32, or to the dtype under test where that is wider: curvature is never kept in less."""
        return tensor.to(self.device, widened(self.dtype))


# The cases of each op


def _block_gram_(new: Inputs) -> Iterator[Case]:
    for m, k, b in [(1, 1, 1), (5, 3, 7), (33, 2, 50), (64, 2, 128), (0, 2, 3), (4, 0, 3)]:
        for alpha in (1.0, 1.0 / 1024):
            yield Case(f"m={m} K={k} B={b} alpha={alpha:g}", (new.spd(k, b, 10.0), new.normal(m, k, b), alpha))
    yield Case("expanded gradients", (new.spd(2, 5, 10.0), new.normal(1, 2, 5).expand(6, 2, 5)))
    yield Case("transposed gradients", (new.spd(3, 5, 10.0), new.normal(4, 5, 3).mT))


def _block_inverse(new: Inputs) -> Iterator[Case]:
    for condition in CONDITIONS:
        for k, b in [(3, 1), (3, 7), (2, 33), (2, 50), (1, 128)]:
            gram = new.spd(k, b, condition)
            yield Case(f"K={k} B={b} condition={condition:g}", (gram / gram.amax(), 0.0), {}, condition)
    yield Case("no blocks", (new.spd(0, 4, 1.0), 0.1))
    yield Case("zeros, damped", (new.wide(torch.zeros(2, 5, 5)), 0.5))
    broken = new.spd(3, 6, 10.0)
    broken[1, 2, 3] = torch.nan
    yield Case("NaN in one block", (broken, 0.1), {}, 10.0)


def _woodbury_update_(new: Inputs) -> Iterator[Case]:
    for m, k, b in [(1, 1, 1), (7, 3, 5), (40, 2, 33), (0, 1, 3), (3, 0, 3)]:
        eye = torch.eye(b, dtype=torch.float64).repeat(k, 1, 1)
        for damping in (1e-1, 1e-3):
            name = f"m={m} K={k} B={b} damping={damping:g}"
            yield Case(name, (new.wide(eye / damping), new.normal(m, k, b), max(1, m)), {}, 1 / damping)


def _fisher_diag_update_(new: Inputs) -> Iterator[Case]:
    for shapes in ([(1,), (33, 5), (0,), (4097,)], [(3, 2, 2)], []):
        fisher = [new.wide(torch.rand(shape, dtype=torch.float64, generator=new.generator)) for shape in shapes]
        for beta in (0.0, 0.9, 1.0):
            yield Case(f"{len(shapes)} tensors, beta={beta:g}", (fisher, [new.normal(*s) for s in shapes], beta))
    yield Case("transposed", ([new.wide(new.positive(5, 3)).mT], [new.normal(5, 3).mT], 0.5))


def _obs_score(new: Inputs) -> Iterator[Case]:
    for shape in [(), (1,), (3, 5), (4097,), (0,)]:
        yield Case(f"shape={list(shape)}", (new.normal(*shape), new.positive(*shape)))
    yield Case("transposed", (new.normal(4, 3).mT, new.positive(4, 3).mT))
    odd = new.cast(torch.tensor([0.0, 1.0, torch.nan, torch.inf, 2.0]))
    yield Case("NaN, inf, zeros", (odd, new.cast(torch.tensor([0.0, 0.0, 1.0, 1.0, torch.inf]))))


def _obs_eliminate(new: Inputs) -> Iterator[Case]:
    for condition in CONDITIONS:
        for k, b in [(3, 1), (3, 7), (4, 31), (2, 50), (2, 64), (1, 128), (1, 200)]:
            weight, inverse = new.normal(k, b), new.spd(k, b, condition)
            name = f"K={k} B={b} condition={condition:g}"
            yield Case(name, (weight, inverse, new.mask(k, b, density=1.1)), {}, condition)
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
    odd = new.cast(torch.tensor([[1.0, torch.nan, 2.0, torch.inf, -1.0, 0.5]]))
    variances = new.wide(torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0, torch.inf])))[None]
    yield Case("NaN, inf, variances not positive", (odd, variances, new.mask(1, 6, density=1.1)), exact=True)


def _obs_compensate(new: Inputs) -> Iterator[Case]:
    for condition in CONDITIONS:
        for k, b in [(3, 1), (3, 7), (2, 33), (2, 50), (1, 128)]:
            args = (new.normal(k, b), new.spd(k, b, condition), new.mask(k, b))
            yield Case(f"K={k} B={b} condition={condition:g}", args, {}, condition)
    weight, inverse = new.normal(4, 12), new.spd(4, 12, 1e3)
    for density in (-1.0, 1.1):
        yield Case(f"pruned with density {density:g}", (weight, inverse, new.mask(4, 12, density=density)), {}, 1e3)
    yield Case("inverse shared", (weight, inverse[:1].expand(4, 12, 12), new.mask(4, 12)), {}, 1e3)
    yield Case("transposed views", (new.normal(12, 4).mT, inverse.mT, new.mask(12, 4).mT), {}, 1e3)
    yield Case("no blocks", (new.normal(0, 4), new.spd(0, 4, 1.0), new.mask(0, 4)))


def _kron_mul(new: Inputs) -> Iterator[Case]:
    for *batch, o, i in [(1, 1), (3, 7), (33, 50), (2, 3, 16, 9), (0, 3, 4)]:
        factors = new.spd(1, o, 1e2)[0], new.spd(1, i, 1e2)[0]
        yield Case(f"shape={[*batch, o, i]}", (new.normal(*batch, o, i), *factors, new.positive(o, i)), {}, 10.0)
    views = (new.normal(1, 4, 3).mT.expand(5, 3, 4), new.spd(1, 3, 10.0)[0].mT, new.spd(1, 4, 10.0)[0])
    yield Case("views", (*views, new.positive(4, 3).mT), {}, 10.0)


def _kron_diag(new: Inputs) -> Iterator[Case]:
    for o, i in [(1, 1), (3, 7), (33, 50), (0, 4)]:
        factors = new.spd(1, o, 1e2)[0], new.spd(1, i, 1e2)[0]
        yield Case(f"shape={[o, i]}", (*factors, new.positive(o, i)))
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
    odd = new.cast(torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, torch.nan, 1.0]))
    for count in range(8):
        yield Case(f"NaN and inf, {count} of 7", ([odd], count))


def _nm_mask(new: Inputs) -> Iterator[Case]:
    for n, m, dim in [(2, 4, -1), (1, 4, 0), (4, 8, 1), (0, 2, 0), (3, 3, -1)]:
        yield Case(f"{n}:{m} along {dim}", (new.normal(24, 24), n, m, dim))
    yield Case("ties", (new.cast(torch.arange(48) % 3).reshape(4, 12), 2, 4))
    odd = new.cast(torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf, torch.nan, torch.nan, 0.0, -0.0]))
    yield Case("NaN and inf", (odd, 2, 4))
    yield Case("empty", (new.normal(0, 4), 2, 4))
    yield Case("transposed", (new.normal(8, 12).mT, 2, 4))


_MASK_SHAPES = [(1,), (7,), (8,), (9,), (3, 5), (0,), (), (4096,), (4097,), (3, 5000)]


def _pack_mask(new: Inputs) -> Iterator[Case]:
    for shape in _MASK_SHAPES:
        yield Case(f"shape={list(shape)}", (new.mask(*shape),))
    yield Case("transposed", (new.mask(9, 5).mT,))


def _unpack_mask(new: Inputs) -> Iterator[Case]:
    for shape in _MASK_SHAPES:
        packed = OPS["pack_mask"].reference(new.mask(*shape))
        yield Case(f"shape={list(shape)}", (packed, list(shape)))


def _apply_masks_(new: Inputs) -> Iterator[Case]:
    pack = OPS["pack_mask"].reference
    tensors = [new.normal(*shape) for shape in _MASK_SHAPES]
    for density in (0.5, -1.0, 1.1):
        masks = [pack(new.mask(*shape, density=density)) for shape in _MASK_SHAPES]
        yield Case(f"{len(tensors)} tensors, density {density:g}", (tensors, masks))
    odd = new.cast(torch.tensor([torch.nan, torch.inf, -0.0, torch.nan, -torch.inf]))
    yield Case("NaN and inf", ([odd], [pack(new.cast(torch.tensor([0, 0, 0, 1, 1])).bool())]))
    mixed = [new.normal(33), new.normal(10).double(), new.normal(9).half(), new.normal(17).bfloat16()]
    yield Case("several dtypes", (mixed, [pack(new.mask(len(t))) for t in mixed]))
    # A tensor in the midst of memory that must stay as it is, at an address with no alignment but its own.
    inside = new.normal(5000)[3:4900]
    yield Case("inside of a larger tensor", ([inside], [pack(new.mask(len(inside)))]))
    yield Case("transposed", ([new.normal(9, 5).mT], [pack(new.mask(5, 9))]))
    yield Case("nothing", ([], []))


CASES: dict[str, Callable[[Inputs], Iterator[Case]]] = {
    "block_gram_": _block_gram_,
    "block_inverse": _block_inverse,
    "woodbury_update_": _woodbury_update_,
    "fisher_diag_update_": _fisher_diag_update_,
    "obs_score": _obs_score,
    "obs_eliminate": _obs_eliminate,
    "obs_compensate": _obs_compensate,
    "kron_mul": _kron_mul,
    "kron_diag": _kron_diag,
    "keep_mask": _keep_mask,
    "nm_mask": _nm_mask,
    "pack_mask": _pack_mask,
    "unpack_mask": _unpack_mask,
    "apply_masks_": _apply_masks_,
}


# Running them


def check(
    names: Iterable[str] | None = None,
    impls: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    seed: int = 0,
) -> Iterator[Row]:
    """Check implementations of ops on this machine, one row for each op, implementation and dtype.

    Args:
        names: of ops; None is all.
        impls: of "reference", "triton", "cuda"; None is the reference and the kernels that the op has.
        dtypes: of weights and gradients; curvature is never narrower than float32.
        seed: of the inputs.

    Yields:
        rows; one without cases and dtype where an implementation cannot run here at all.

    Raises:
        ValueError: there is no op of that name.
    """
    names = list(OPS) if names is None else list(names)
    for name in names:
        if name not in OPS:
            raise ValueError(f"there is no op {name!r}; there are {', '.join(OPS)}")
    for name in names:
        for impl in impls or ("reference", *OPS[name].kernels):
            reason = OPS[name].unavailable(impl)
            if reason is not None:
                yield Row(name, impl, "", reason=reason)
                continue
            for dtype in dtypes[:1] if name in WITHOUT_DTYPE else dtypes:
                yield check_dtype(OPS[name], impl, dtype, seed)


def check_dtype(op: Op, impl: str, dtype: torch.dtype, seed: int = 0) -> Row:
    """Run one implementation on all cases of one dtype."""
    row = Row(op.name, impl, "bool" if op.name in WITHOUT_DTYPE else str(dtype).removeprefix("torch."))
    for case in CASES[op.name](Inputs(dtype, device_of(impl), seed)):
        supported, reason = op.supports(impl, *case.args, **case.kwargs)
        if not supported:
            row.reason = row.reason or reason
            continue
        row.take(case, *error_and_budget(op, None if impl == "reference" else op.launcher(impl), case))
    return row


def device_of(impl: str) -> torch.device:
    """Where an implementation is checked: on the GPU if there is one, but interpreted kernels on the CPU."""
    if impl == "triton":
        from fishleg_ext.kernels import INTERPRETED

        if INTERPRETED:
            return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def error_and_budget(op: Op, launcher: Callable[..., Any] | None, case: Case) -> tuple[float, float]:
    """How far a kernel, or where None is given the reference, is from float64 in a case, and how far it may be."""
    expected = outcome(op, op.reference, _double(case.args), case.kwargs)
    error_of = _elimination_error if op.name == "obs_eliminate" and not case.exact else _error
    got = outcome(op, launcher or op.reference, case.args, case.kwargs)
    error = error_of(case, got, expected)
    floating = [result.dtype for result in got if result.is_floating_point()]
    if case.exact or not floating or op.name == "apply_masks_":
        return error, 0.0
    rounding = max(torch.finfo(dtype).eps for dtype in floating)
    magnified = case.condition * max(torch.finfo(widened(dtype)).eps for dtype in floating)
    if launcher is None:
        return error, 16 * (magnified + rounding)
    if op.name == "obs_eliminate":  # another order is another sequence of roundings
        rounding = magnified
    reference = error_of(case, outcome(op, op.reference, case.args, case.kwargs), expected)
    return error, 2 * (reference + rounding)


def outcome(op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an implementation returns, after the memory that it may write to: a copy, of all around its targets, too."""
    names = [argument.name for argument in torch._C.parse_schema(op.schema).arguments]
    written: list[Tensor] = []
    own = tuple(_copy(arg, written) if name in op.mutates else arg for name, arg in zip(names, args, strict=False))
    with torch.no_grad(), _nan_in_new_memory():
        returned = function(*own, **kwargs)
    results = returned if isinstance(returned, (list, tuple)) else [] if returned is None else [returned]
    return [*written, *results]


def _copy(arg: Any, whole: list[Tensor]) -> Any:
    """A copy of a tensor, or of the tensors of a list, inside copies of all their memory, which go to `whole`."""
    if isinstance(arg, list):
        return [_copy(tensor, whole) for tensor in arg]
    storage = arg.new_empty(0).set_(arg.untyped_storage()) if arg.numel() else arg
    memory = storage.flatten().clone()
    whole.append(memory)
    return memory.as_strided(arg.shape, arg.stride(), arg.storage_offset()) if arg.numel() else memory.view(arg.shape)


def _double(args: Any) -> Any:
    """The same arguments on the CPU, floating-point ones in float64, with their memory around them."""
    if isinstance(args, (list, tuple)):
        return type(args)(_double(arg) for arg in args)
    if not isinstance(args, Tensor):
        return args
    memory: list[Tensor] = []
    view = _copy(args, memory)
    cpu = memory[0].to("cpu", torch.float64) if args.is_floating_point() else memory[0].cpu()
    return cpu.as_strided(view.shape, view.stride(), view.storage_offset()) if view.numel() else cpu.view(view.shape)


@contextlib.contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Let torch.empty fill its memory with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _error(case: Case, got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of all results; inf where something differs that must not."""
    worst = 0.0
    for mine, right in zip(got, expected, strict=True):
        mine = mine.cpu()
        if mine.shape != right.shape:
            return torch.inf
        if not mine.is_floating_point():
            if not torch.equal(mine, right):
                return torch.inf
            continue
        mine, finite = mine.double(), right.isfinite()
        if not torch.equal(mine[~finite].nan_to_num(7.0), right[~finite].nan_to_num(7.0)):
            return torch.inf
        if finite.any():
            difference = (mine[finite] - right[finite]).abs().max()
            scale = right[finite].abs().max()
            worst = max(worst, float(difference / scale) if difference > 0 else float(difference))
            if difference != difference:
                return torch.inf
    return worst


def _elimination_error(case: Case, got: list[Tensor], expected: list[Tensor]) -> float:
    """Replay the order of an elimination in float64.

    The error is the largest of |cost reported - cost replayed|, of what a cheaper choice would have saved, and of what
    `stop` was overstepped or missed by, each over (the cost replayed + 1/1000 of the block's highest finite cost).
    """
    rank, cost = (result.cpu() for result in got)
    weight, inverse, alive = (_double(arg) for arg in case.args)
    group, n, m = (case.kwargs.get(name, default) for name, default in (("group", 1), ("n", 0), ("m", 0)))
    stop = torch.inf if (given := case.kwargs.get("stop")) is None else given
    k, size = weight.shape
    reached = alive & (rank != size)
    count = reached.sum(1, keepdim=True)
    numbers = torch.where(reached, rank, torch.arange(size) + size).sort(1).values
    in_order = (numbers == torch.arange(size)) | (torch.arange(size) >= count)
    if not (in_order.all() and ((rank == -1) == ~alive).all() and (cost.isfinite() == reached).all()):
        return torch.inf  # not an order at all
    if k == 0:
        return 0.0

    inverse = inverse.expand(k, size, size).clone()
    if case.kwargs.get("dead_first"):
        for index in range(size):
            _condition(inverse, torch.where(alive[:, index], 0.0, 1.0), torch.full((k,), index))
    inverse.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), 0)
    weight = torch.where(alive, weight, 0)
    cost = torch.where(reached, cost.double(), 0)
    small = 1e-3 * cost.max(1).values.clamp(min=torch.finfo(torch.float64).tiny)
    pending, blocks, worst = alive.clone(), torch.arange(k), 0.0
    replayed = torch.zeros(k, dtype=torch.int64)
    while True:
        joint = _group_costs(weight, inverse, pending, group, n, m)
        best = joint.min(1).values
        going = replayed < count[:, 0]
        scale = small + torch.where(best.isfinite(), best, 0)
        missed = ~going & best.isfinite() & (best <= stop)  # it could have gone on: by how much below `stop`?
        if missed.any():
            worst = max(worst, float(((stop - best) / scale)[missed].max()))
        if not going.any():
            return worst
        first = (rank == replayed[:, None]).int().argmax(1)
        chosen = first // group
        members = (pending & (torch.arange(size) // group == chosen[:, None])) & going[:, None]
        last = torch.where(members, rank, -1).max(1).values
        if (going & (last != replayed + members.sum(1) - 1)).any():
            return torch.inf  # a group that does not go as one
        spent = joint[blocks, chosen]
        reported = torch.where(members, cost, 0).sum(1)
        for mistake in ((spent - reported).abs(), spent - best, (spent - stop).clamp(min=0)):
            worst = max(worst, float(torch.where(going, mistake / (small + spent), 0).nan_to_num(torch.inf).max()))
        for offset in range(group):
            index = chosen * group + offset
            valid = members[blocks, index]
            column = inverse[blocks, :, index]
            variance = column[blocks, index]
            factor = torch.where(valid, weight[blocks, index] / variance, 0)
            weight -= torch.where(valid[:, None], column * factor[:, None], 0)
            _condition(inverse, valid.double(), index)
            pending[blocks[valid], index[valid]] = False
        replayed += members.sum(1)


def _condition(inverse: Tensor, valid: Tensor, index: Tensor) -> None:
    """Eliminate weight `index` from blocks [K, B, B], in place, where `valid` is 1."""
    blocks = torch.arange(len(inverse))
    column = inverse[blocks, :, index]
    variance = column[blocks, index]
    usable = (valid > 0) & (variance > 0)
    column = torch.where(usable[:, None], column / torch.where(usable, variance, 1).sqrt()[:, None], 0)
    inverse -= column[:, :, None] * column[:, None, :]


def _group_costs(weight: Tensor, inverse: Tensor, pending: Tensor, group: int, n: int, m: int) -> Tensor:
    """The joint cost of each group of each block, [K, B / group]; inf where there is nothing, or nothing allowed."""
    if m:
        tuples = pending.unflatten(1, (-1, m))
        pending = (tuples & (tuples.sum(2, keepdim=True) > n)).flatten(1)
    tiles = inverse.unflatten(2, (-1, group)).unflatten(1, (-1, group)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    mine = pending.unflatten(1, (-1, group))
    both = mine[..., None] & mine[..., None, :]
    factor, failed = torch.linalg.cholesky_ex(torch.where(both, tiles, torch.eye(group, dtype=tiles.dtype)))
    values = torch.where(mine, weight.unflatten(1, (-1, group)), 0)[..., None]
    joint = 0.5 * torch.linalg.solve_triangular(factor, values, upper=False).square().sum((-2, -1))
    return torch.where(mine.any(2) & (failed == 0) & joint.isfinite(), joint, torch.inf)
