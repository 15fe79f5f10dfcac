"""Compares every implementation of every op with the reference in float64, on this machine.

A case is one call. Its inputs are drawn in float64, rounded to the dtype under test, and given to the implementation as
they are and to the reference in float64 on the CPU. So only what the implementation does is measured.

- Floating-point results: the error is max |got - expected| / max |expected|; NaN and inf must be in the same places.
  A kernel's budget is twice (the error of the reference in the same precision + one rounding of the result). Where the
  problem has a condition number, another order of the same operations is another sequence of roundings, and to that
  one comes a tenth of eps times that number, which is about what errors of the reference come to; all of it in
  woodbury_update_, which subtracts numbers so much larger than their difference. The reference's own budget is eps
  times the condition number, no more than 1/2, + 16 roundings of the result.
- Booleans and integers, and all of a case marked exact: bitwise. A kernel called twice must give the same bits.
- obs_eliminate: where two costs are close, any order is right that is as cheap. So the order returned is replayed in
  float64 (`_elimination_error`): the costs must be those reported, and none may have been cheaper.
- obs_quantize: where two codes are as near, either is right, and what follows is another. So the costs reported must be
  those of the move that was made, by the Fisher matrix in float64, and in all not much above those of the reference.

While an implementation runs, new memory is filled with NaN, so that what it leaves unwritten shows.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.ops.dispatch import OPS, Op
from fishleg_ext.reference.obs import eliminate_, group_costs
from fishleg_ext.testing.cases import CASES, Case, Inputs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WITHOUT_DTYPE = ("pack_mask", "unpack_mask", "pack_codes", "unpack_codes")


@dataclass
class Row:
    """The record of one implementation of one op on all cases of one dtype."""

    op: str
    impl: str
    dtype: str
    cases: int = 0
    error: float = 0.0  # of the case that used most of its budget
    budget: float = 0.0
    failures: list[str] = field(default_factory=list)
    reason: str = ""  # why it ran on no case, or not on all

    def record(self, case: Case, error: float, budget: float) -> None:
        """Record the result of a case."""
        self.cases += 1
        if not error <= budget:
            self.failures.append(f"{case.name}: error {error:.2g}, budget {budget:.2g}")
        if self.cases == 1 or _used(error, budget) > _used(self.error, self.budget):
            self.error, self.budget = error, budget


def _used(error: float, budget: float) -> float:
    """The share of its budget that an error is."""
    return error / budget if budget else error


def check(
    names: Iterable[str] | None = None,
    impls: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    seed: int = 0,
) -> Iterator[Row]:
    """Check implementations of ops on this machine, one row for each op, implementation and dtype.

    Args:
        names: of ops, or of families of ops; None is all.
        impls: of "reference", "triton", "cuda"; None is the reference and the kernels that the op has.
        dtypes: of weights and gradients; curvature is never narrower than float32.
        seed: of the inputs.

    Yields:
        rows; one without cases and dtype where an implementation cannot run here at all.

    Raises:
        ValueError: there is no op or family of that name.
    """
    for name in ops_named(names):
        for impl in impls or ("reference", *OPS[name].kernels):
            reason = OPS[name].unavailable(impl)
            if reason is not None:
                yield Row(name, impl, "", reason=reason)
                continue
            for dtype in dtypes[:1] if name in WITHOUT_DTYPE else dtypes:
                yield check_dtype(OPS[name], impl, dtype, seed)


def ops_named(names: Iterable[str] | None) -> list[str]:
    """Names of ops and families -> of ops; None is all.

    Raises:
        ValueError: there is no op or family of that name.
    """
    if names is None:
        return list(OPS)
    found: list[str] = []
    for name in names:
        members = [op.name for op in OPS.values() if name in (op.name, op.family)]
        if not members:
            raise ValueError(f"there is no op {name!r}; there are {', '.join(OPS)}")
        found += [member for member in members if member not in found]
    return found


def check_dtype(op: Op, impl: str, dtype: torch.dtype, seed: int = 0) -> Row:
    """Run one implementation on all cases of one dtype."""
    row = Row(op.name, impl, "bool" if op.name in WITHOUT_DTYPE else str(dtype).removeprefix("torch."))
    case = None
    try:
        for case in CASES[op.name](Inputs(dtype, device_of(impl), seed)):
            supported, reason = op.supports(impl, *case.args, **case.kwargs)
            if supported:
                row.record(case, *compare_to_float64(op, None if impl == "reference" else op.launcher(impl), case))
            else:
                row.reason = row.reason or reason
    except Exception as error:  # whatever a kernel may end with; what follows on a GPU may then fail for that reason
        row.failures.append(f"{case.name if case else 'inputs'}: {type(error).__name__}: {error}")
    return row


def device_of(impl: str) -> torch.device:
    """Where an implementation is checked: on the GPU if there is one, but interpreted kernels on the CPU."""
    if impl == "triton":
        from fishleg_ext.kernels import INTERPRETED

        if INTERPRETED:
            return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare_to_float64(op: Op, launcher: Callable[..., Any] | None, case: Case) -> tuple[float, float]:
    """How far a kernel, or where None is given the reference, is from float64 in a case, and how far it may be."""
    error_of: Callable[[list[Tensor]], float]
    if op.name == "obs_eliminate" and not case.exact:
        error_of = functools.partial(_elimination_error, case)
    elif op.name == "obs_quantize" and not case.exact:
        expected = run_case(op, op.reference, _double(case.args), case.kwargs)
        error_of = functools.partial(_quantization_error, case, expected[1].sum())
    else:
        error_of = functools.partial(_error, run_case(op, op.reference, _double(case.args), case.kwargs))
    got = run_case(op, launcher or op.reference, case.args, case.kwargs)
    error = error_of(got)
    if launcher is not None:  # the same call gives the same bits
        again = run_case(op, launcher, case.args, case.kwargs)
        if not all(map(_same_bits, got, again)):
            return torch.inf, 0.0
    floating = [result.dtype for result in got if result.is_floating_point()]
    if case.exact or not floating:
        return error, 0.0
    rounding = max(torch.finfo(dtype).eps for dtype in floating)
    magnified = case.condition * max(torch.finfo(widened(dtype)).eps for dtype in floating)
    if launcher is None:
        return error, min(magnified, 0.5) + 16 * rounding
    if case.condition > 1:
        # An elimination in float64 is replayed by the reference's own steps in float64, whose error, up to eps times
        # the condition number, is then in the comparison and not in `reference`.
        replayed = op.name == "obs_eliminate" and torch.float64 in floating
        rounding += magnified if op.name == "woodbury_update_" or replayed else magnified / 10
    reference = error_of(run_case(op, op.reference, case.args, case.kwargs))
    return error, 2 * (reference + rounding)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal, those of NaN, too."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def run_case(op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the memory that an implementation may write to, a copy with all around its targets, and its results."""
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


def _error(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest relative error of all results; inf where something differs that must not."""
    worst = 0.0
    for right, mine in zip(expected, got, strict=True):
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
        if torch.equal(mine[finite], right[finite]):
            continue
        error = (mine[finite] - right[finite]).abs().max() / right[finite].abs().max()
        worst = max(worst, float(error.nan_to_num(torch.inf)))
    return worst


def _elimination_error(case: Case, got: list[Tensor]) -> float:
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
    if not (_numbered(rank, reached) and ((rank == -1) == ~alive).all() and (cost.isfinite() == reached).all()):
        return torch.inf  # not an order at all
    if k == 0:
        return 0.0

    inverse = inverse.expand(k, size, size).clone()
    if case.kwargs.get("dead_first"):
        for index in range(size):
            eliminate_(torch.zeros_like(weight), inverse, torch.full((k,), index), ~alive[:, index])
    inverse.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), 0)
    weight = torch.where(alive, weight, 0)
    cost = torch.where(reached, cost.double(), 0)
    small = 1e-3 * cost.max(1).values.clamp(min=torch.finfo(torch.float64).tiny)
    pending, blocks, worst = alive.clone(), torch.arange(k), 0.0
    count, replayed = reached.sum(1), torch.zeros(k, dtype=torch.int64)
    while True:
        joint = group_costs(weight, inverse, pending, group, n, m)
        best = joint.min(1).values
        going = replayed < count
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
            eliminate_(weight, inverse, index, valid)
            pending[blocks[valid], index[valid]] = False
        replayed += members.sum(1)


# By how much the costs of all blocks of a case may exceed the reference's where other codes were as near.
DETOUR = 0.05


def _quantization_error(case: Case, reference_cost: Tensor, got: list[Tensor]) -> float:
    """Compare costs with those of the move, 1/2 dw^T F dw, in float64; inf where a weight is not what its code says.

    The error is the largest of |costs reported - cost of the move| of a block, over (that + 1/1000 of the most
    expensive block), or what all cost more than the reference in float64, beyond DETOUR.
    """
    code, cost, moved = (result.cpu() for result in got)
    weight, inverse, alive, codebook = (_double(arg) for arg in case.args)
    k, size = weight.shape
    if k == 0:
        return 0.0
    num_free, in_order = case.kwargs.get("num_free", 0), case.kwargs.get("order") == "given"
    free = torch.arange(size) >= size - num_free
    coded = alive & ~free
    values = codebook.expand(k, -1, -1).repeat_interleave((size - num_free) // codebook.shape[1], dim=1)
    values = torch.nn.functional.pad(values, (0, 0, 0, num_free))
    values = values.to(moved.dtype).gather(2, code.long()[..., None])[..., 0]
    expected = torch.where(coded, values, torch.where(free, moved, 0))
    if not (torch.equal(moved, expected) and not code[~coded].any() and not cost[free.expand(k, -1)].any()):
        return torch.inf
    moving = torch.ones_like(coded) if in_order else coded | free
    both = moving[:, :, None] & moving[:, None, :]
    inverse = inverse.expand(k, size, size)
    if case.kwargs.get("dead_first"):
        precision = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
        precision = torch.where(both, precision, 0)
    else:
        block = torch.where(both, inverse, torch.eye(size, dtype=torch.float64))
        precision = torch.where(both, torch.cholesky_inverse(torch.linalg.cholesky(block)), 0)
    step = torch.where(moving, moved.double() - weight, 0)
    true = (step[:, None] @ precision @ step[..., None])[:, 0, 0] / 2
    mistake = (cost.double().sum(1) - true).abs() / (true + 1e-3 * true.max()).clamp(min=1e-300)
    detour = float(true.sum() / reference_cost.clamp(min=1e-300)) - 1 - DETOUR
    return max(float(mistake.nan_to_num(torch.inf).max()), detour)


def _numbered(rank: Tensor, reached: Tensor) -> bool:
    """Whether the ranks of those reached are 0, 1, 2, ... in each block."""
    numbers = torch.arange(rank.shape[1])
    ranks = torch.where(reached, rank, len(numbers)).sort(1).values
    return bool(((ranks == numbers) | (numbers >= reached.sum(1, keepdim=True))).all())
