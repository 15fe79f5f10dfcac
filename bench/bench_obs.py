"""obs_eliminate and obs_compensate against batched torch.

Bytes: the inverse is read once. FLOP: H -= u u^T over what is left, 2/3 B^3 on the whole of H, 1/3 B^3 with symmetry.
"""

import functools
import math

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.bench import harness
from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing import cases, check

pytestmark = pytest.mark.benchmark(timer=harness.synchronised)
SIZES = (32, 50, 128, 192)
# On a GPU more blocks than run at once, many times over; on a CPU a tenth of ResNet-20.
WEIGHTS = 2_500_000 if harness.DEVICE.type == "cuda" else 25_000


def batched_torch(weight, inverse, alive):
    """Exact greedy elimination as OBC and CAP describe it: every step updates the inverses of all blocks."""
    weight, inverse, alive = weight.clone(), inverse.clone(), alive.clone()
    num_blocks, size = weight.shape
    rank = torch.full((num_blocks, size), -1, dtype=torch.int32, device=weight.device)
    costs = torch.full_like(weight, math.inf)
    for step in range(size):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        cost, chosen = torch.where(alive, weight.square() / (2 * diagonal), math.inf).min(1, keepdim=True)
        rank.scatter_(1, chosen, step)
        costs.scatter_(1, chosen, cost)
        alive.scatter_(1, chosen, False)
        column = inverse.gather(2, chosen[:, :, None].expand(-1, size, -1))[..., 0]
        variance = column.gather(1, chosen)
        weight -= column * (weight.gather(1, chosen) / variance)
        inverse.baddbmm_(column[:, :, None], (column / variance)[:, None], alpha=-1)
    return rank, costs


IMPLEMENTATIONS = {
    "batched torch": batched_torch,
    "fishleg_ext reference": functools.partial(ops.obs_eliminate, impl="reference"),
    "fishleg_ext cuda": functools.partial(ops.obs_eliminate, impl="cuda"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [144, 576])
def bench_rows_that_share_an_inverse(measure, size, implementation):
    """The rows of a layer of ResNet-20, as OBC eliminates them; batched torch gives each a copy of the inverse."""
    harness.skip_unless_available("obs_eliminate", implementation)
    rows = size // 9
    new = cases.Inputs(torch.float32, harness.DEVICE, seed=0)
    weight, alive, inverse = new.normal(rows, size), new.mask(rows, size, density=1.1), new.spd(1, size, 1e3)
    given = inverse.expand(rows, size, size) if implementation == "batched torch" else inverse
    call = lambda: IMPLEMENTATIONS[implementation](weight, given, alive)

    def gate():
        rank, cost = (result[:4] for result in call())
        case = cases.Case("", (weight[:4], inverse, alive[:4]), condition=1e3)
        return check.compare_to_float64(OPS["obs_eliminate"], lambda *args: (rank, cost), case)

    work = harness.Work(inverse.nbytes + 13 * rows * size, rows * size**3 // 3)
    measure("obs_eliminate", f"{rows} rows of {size} with one inverse", implementation, [call], work, gate)


def blocks(size):
    """Weights, inverses of which 61 differ (drawing more takes longer than timing them), all alive."""
    num_blocks = WEIGHTS // size
    new = cases.Inputs(torch.float32, harness.DEVICE, seed=0)
    inverse = new.spd(61, size, 1e3).repeat(-(-num_blocks // 61), 1, 1)[:num_blocks].contiguous()
    return new.normal(num_blocks, size), inverse, new.mask(num_blocks, size, density=1.1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size, group", [*((size, 1) for size in SIZES), (128, 4)])
def bench_obs_eliminate(measure, size, group, implementation):
    """Blocks of well-conditioned inverses, to the last weight; batched torch removes single weights."""
    options = {} if group == 1 else {"group": group}
    if options and implementation == "batched torch":
        pytest.skip("single weights only")
    harness.skip_unless_available("obs_eliminate", implementation)
    weight, inverse, alive = blocks(size)
    buffers = [(weight.clone(), inverse.clone(), alive) for _ in range(harness.copies(inverse.nbytes))]
    eliminate = IMPLEMENTATIONS[implementation]
    calls = [lambda args=args: eliminate(*args, **options) for args in buffers]

    def gate():
        """Compare some blocks of the very call that is timed with float64."""
        some = slice(None, None, max(1, len(weight) // 16))
        rank, cost = calls[0]()
        case = cases.Case("", tuple(arg[some].clone() for arg in buffers[0]), options, condition=1e3)
        return check.compare_to_float64(OPS["obs_eliminate"], lambda *args, **options: (rank[some], cost[some]), case)

    work = harness.Work(inverse.nbytes + 13 * weight.numel(), weight.numel() * size**2 // 3)
    groups = f"groups of {group}, " if options else ""
    measure("obs_eliminate", f"{len(weight)} blocks of {size}, {groups}float32", implementation, calls, work, gate)


def solve(weight, inverse, pruned):
    """Torch alone: the identity where nothing is pruned, one LU solve a block."""
    both = pruned[:, :, None] & pruned[:, None, :]
    system = torch.where(both, inverse, torch.eye(weight.shape[1], device=weight.device))
    multiplier = torch.linalg.solve(system, torch.where(pruned, weight, 0))
    return torch.where(pruned, 0, weight - (inverse @ multiplier[..., None])[..., 0])


COMPENSATIONS = {
    "torch, batched solve": solve,
    "fishleg_ext reference": functools.partial(ops.obs_compensate, impl="reference"),
    "fishleg_ext cuda": functools.partial(ops.obs_compensate, impl="cuda"),
}


@pytest.mark.parametrize("implementation", COMPENSATIONS)
@pytest.mark.parametrize("size", SIZES)
def bench_obs_compensate(measure, size, implementation):
    """Half of the weights of each block at once. Half of H is read; S steps over half of it, S weights being pruned."""
    harness.skip_unless_available("obs_compensate", implementation)
    args = blocks(size)
    args = (*args[:2], cases.Inputs(torch.float32, harness.DEVICE, seed=1).mask(*args[0].shape, density=0.5))
    buffers = [tuple(arg.clone() for arg in args) for _ in range(harness.copies(args[1].nbytes))]
    compensate = COMPENSATIONS[implementation]
    calls = [lambda args=args: compensate(*args) for args in buffers]

    def gate():
        """Compare some blocks of the very call that is timed with float64."""
        some = slice(None, None, max(1, len(args[0]) // 16))
        moved = calls[0]()
        case = cases.Case("", tuple(arg[some].clone() for arg in args), condition=1e3)
        return check.compare_to_float64(OPS["obs_compensate"], lambda *args: moved[some], case)

    work = harness.Work(args[1].nbytes // 2 + 9 * args[0].numel(), args[0].numel() * size**2 // 2)
    measure("obs_compensate", f"{len(args[0])} blocks of {size}, float32", implementation, calls, work, gate)
