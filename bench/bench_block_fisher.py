"""From gradients to the inverses of Fisher blocks, and from Gram matrices to inverses.

The usual way, of WoodFisher and oBERT, is a rank-one update of every inverse for each gradient: 12 bytes of traffic per
entry of an inverse, m d B entries in all. Gram matrix and inverse: every gradient is read once, 4 m d bytes; the Gram
matrix is read and written for each chunk; half of its m d B products suffice.
"""

import pytest
import torch

from fishleg_ext import cases, check, ops
from fishleg_ext.bench import harness
from fishleg_ext.ops.dispatch import OPS

pytestmark = pytest.mark.benchmark(timer=harness.synchronised)
SIZES = (50, 128, 192)
# On a GPU more blocks than run at once, many times over; on a CPU a tenth of ResNet-20, and fewer gradients.
WEIGHTS, GRADIENTS = (2_500_000, 1024) if harness.DEVICE.type == "cuda" else (25_000, 256)
CHUNK = 64
DAMPING = 1e-3


def recursion(grads):
    """WoodFisher's recursion as oBERT runs it: one batched rank-one update for each gradient."""
    m, num_blocks, size = grads.shape
    inverse = torch.eye(size, device=grads.device).repeat(num_blocks, 1, 1) / DAMPING
    for grad in grads:
        step = torch.bmm(inverse, grad[:, :, None])
        weight = m + torch.bmm(grad[:, None], step)
        inverse.baddbmm_(step, step.mT / weight, alpha=-1)
    return inverse


def gram_and_inverse(impl):
    """Chunk by chunk, as gradients come from a network."""

    def run(grads):
        m, num_blocks, size = grads.shape
        gram = torch.zeros(num_blocks, size, size, device=grads.device)
        for chunk in grads.split(CHUNK):
            ops.block_gram_(gram, chunk, 1 / m, impl=impl)
        return ops.block_inverse(gram, DAMPING, impl=impl)[0]

    return run


def woodbury(impl):
    """The recursion as an op, chunk by chunk."""

    def run(grads):
        m, num_blocks, size = grads.shape
        inverse = torch.eye(size, device=grads.device).repeat(num_blocks, 1, 1) / DAMPING
        for chunk in grads.split(CHUNK):
            ops.woodbury_update_(inverse, chunk, m, impl=impl)
        return inverse

    return run


FROM_GRADIENTS = {
    "rank-one updates in torch": recursion,
    "fishleg_ext Gram and inverse, reference": gram_and_inverse("reference"),
    "fishleg_ext Gram and inverse, cuda": gram_and_inverse("cuda"),
    "fishleg_ext woodbury_update_, cuda": woodbury("cuda"),
}


def skip_unless_available(implementation):
    """Kernels cannot be timed everywhere."""
    if "cuda" in implementation and (reason := harness.unavailable("block_inverse", "cuda")):
        pytest.skip(reason)


@pytest.mark.parametrize("implementation", FROM_GRADIENTS)
@pytest.mark.parametrize("size", SIZES)
def bench_gradients_to_inverse(measure, size, implementation):
    """m gradients of all blocks."""
    skip_unless_available(implementation)
    num_blocks = WEIGHTS // size
    new = cases.Inputs(torch.float32, harness.DEVICE, seed=0)
    run = FROM_GRADIENTS[implementation]
    few = new.normal(GRADIENTS, 61, size)  # blocks that differ; drawing more takes longer than timing them
    grads = few.repeat(1, -(-num_blocks // 61), 1)[:, :num_blocks].contiguous()

    def gate():
        """Some blocks against float64, by the condition number of what is inverted; of recursions that of a step."""
        part = grads[:, :4].double()
        fisher = torch.einsum("mki,mkj->kij", part, part) / GRADIENTS + DAMPING * torch.eye(size, device=grads.device)
        expected = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
        error = (run(grads)[:4] - expected).abs().max() / expected.abs().max()
        condition = torch.linalg.cond(fisher).max()
        if "Gram" not in implementation:
            condition = 1 + fisher.diagonal(dim1=1, dim2=2).sum(1).max() / DAMPING
        return float(error), float(condition) * torch.finfo(torch.float32).eps

    numel = num_blocks * size
    work = harness.Work(4 * GRADIENTS * numel + 8 * numel * size, GRADIENTS * numel * size + numel * size**2)
    name = f"{GRADIENTS} gradients, {num_blocks} blocks of {size}, float32"
    measure("block_gram_", name, implementation, [lambda: run(grads)], work, gate)


def batched_cholesky(gram, damping):
    """Factor and inverse by torch.linalg, without a check."""
    damped = gram + damping * torch.eye(gram.shape[1], device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0])


INVERSES = {
    "torch, batched Cholesky": batched_cholesky,
    "fishleg_ext reference": lambda *args: ops.block_inverse(*args, impl="reference"),
    "fishleg_ext cuda": lambda *args: ops.block_inverse(*args, impl="cuda"),
}


@pytest.mark.parametrize("implementation", INVERSES)
@pytest.mark.parametrize("size", SIZES)
def bench_block_inverse(measure, size, implementation):
    """Half of each Gram matrix is read and an inverse written; B^3 FLOP with symmetry."""
    skip_unless_available(implementation)
    num_blocks = WEIGHTS // size
    new = cases.Inputs(torch.float32, harness.DEVICE, seed=0)
    grams = new.spd(61, size, 1e3).repeat(-(-num_blocks // 61), 1, 1)[:num_blocks].contiguous()
    invert = INVERSES[implementation]
    buffers = [grams.clone() for _ in range(harness.copies(grams.nbytes))]
    calls = [lambda gram=gram: invert(gram, DAMPING) for gram in buffers]

    def gate():
        """Some blocks of the very call that is timed."""
        got = calls[0]()
        inverse = got[0] if isinstance(got, tuple) else got
        info = torch.zeros(8, dtype=torch.int32, device=inverse.device)
        case = cases.Case("", (grams[:8], DAMPING), condition=1e3)
        return check.error_and_budget(OPS["block_inverse"], lambda *args: (inverse[:8].contiguous(), info), case)

    work = harness.Work(grams.nbytes * 3 // 2, num_blocks * size**3)
    measure("block_inverse", f"{num_blocks} blocks of {size}, float32", implementation, calls, work, gate)
