"""From gradients to the inverses of Fisher blocks, and from Gram matrices to inverses.

The usual way, of WoodFisher and oBERT, is a rank-one update of every inverse for each gradient: 12 bytes of traffic per
entry of an inverse, m d B entries in all. Gram matrix and inverse: every gradient is read once, 4 m d bytes; the Gram
matrix is read and written for each chunk; half of its m d B products suffice. M-FAC's recursion forms no inverse but
the vectors H_s g_s, each from all before it: 4 m^2 d bytes.
"""

import math

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.bench import harness, networks
from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing import cases, check

pytestmark = pytest.mark.benchmark(timer=harness.synchronised)
SIZES = (50, 128, 192)
ON_GPU = harness.DEVICE.type == "cuda"
# On a CPU a tenth of ResNet-20, and fewer gradients; on a GPU a tenth of ResNet-50 to compare all that there is.
WEIGHTS, GRADIENTS = (2_500_000, 1024) if ON_GPU else (25_000, 256)
WHOLE_NETWORKS = [sum(map(math.prod, network())) for network in (networks.resnet50, networks.bert_base)]
CHUNK = 64
DAMPING = 1e-3


def undamped(grads):
    """The inverses before there are gradients."""
    _, num_blocks, size = grads.shape
    return torch.eye(size, device=grads.device).repeat(num_blocks, 1, 1) / DAMPING


def rank_one_updates(chunks):
    """WoodFisher's recursion as oBERT runs it: one batched rank-one update for each gradient."""
    inverse = undamped(chunks[0])
    for chunk in chunks:
        for grad in chunk:
            step = torch.bmm(inverse, grad[:, :, None])
            weight = GRADIENTS + torch.bmm(grad[:, None], step)
            inverse.baddbmm_(step, step.mT / weight, alpha=-1)
    return inverse


def vector_recursion(chunks):
    """M-FAC's recursion in every block: H_s g_s from those before it; at last the inverse, in one product."""
    grads = torch.cat(chunks).transpose(0, 1)  # [K, m, B]
    vectors = torch.empty_like(grads, memory_format=torch.contiguous_format)
    weights = grads.new_empty(*grads.shape[:2], 1)
    for s in range(GRADIENTS):
        grad, before = grads[:, s, :, None], vectors[:, :s]
        vector = grad / DAMPING - before.mT @ (before @ grad / weights[:, :s])  # [K, B, 1]
        vectors[:, s] = vector[..., 0]
        weights[:, s] = (GRADIENTS + grad.mT @ vector)[..., 0]
    return undamped(chunks[0]).baddbmm_(vectors.mT, vectors / weights, alpha=-1)


def gram_and_inverse(impl):
    """Chunk by chunk, as gradients come from a network."""

    def run(chunks):
        _, num_blocks, size = chunks[0].shape
        gram = torch.zeros(num_blocks, size, size, device=chunks[0].device)
        for chunk in chunks:
            ops.block_gram_(gram, chunk, 1 / GRADIENTS, impl=impl)
        return ops.block_inverse(gram, DAMPING, impl=impl)[0]

    return run


def woodbury(impl):
    """The recursion as an op, chunk by chunk."""

    def run(chunks):
        inverse = undamped(chunks[0])
        for chunk in chunks:
            ops.woodbury_update_(inverse, chunk, GRADIENTS, impl=impl)
        return inverse

    return run


FROM_GRADIENTS = {
    "rank-one updates in torch": rank_one_updates,
    "M-FAC's recursion in torch": vector_recursion,
    "fishleg_ext Gram and inverse, reference": gram_and_inverse("reference"),
    "fishleg_ext Gram and inverse, cuda": gram_and_inverse("cuda"),
    "fishleg_ext woodbury_update_, cuda": woodbury("cuda"),
}


@pytest.mark.parametrize("implementation", FROM_GRADIENTS)
@pytest.mark.parametrize("size", SIZES)
def bench_gradients_to_inverse(measure, size, implementation):
    """m gradients of all blocks."""
    compare_inverses(measure, WEIGHTS // size, size, implementation)


def compare_inverses(measure, num_blocks, size, implementation):
    """A chunk of gradients, read again and again for all m."""
    harness.skip_unless_available("block_inverse", implementation)
    new = cases.Inputs(torch.float32, harness.DEVICE, seed=0)
    run = FROM_GRADIENTS[implementation]
    few = new.normal(CHUNK, 61, size)  # blocks that differ; drawing more takes longer than timing them
    chunk = few.repeat(1, -(-num_blocks // 61), 1)[:, :num_blocks].contiguous()
    chunks = [chunk] * (GRADIENTS // CHUNK)

    def gate():
        """Compare some blocks with float64, by the condition number of what a call inverts."""
        part = chunk[:, :4].double()
        fisher = torch.einsum("mki,mkj->kij", part, part) / CHUNK + DAMPING * torch.eye(size, device=part.device)
        expected = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
        error = (run(chunks)[:4] - expected).abs().max() / expected.abs().max()
        condition = torch.linalg.cond(fisher).max()
        if "Gram" not in implementation:
            condition = 1 + fisher.diagonal(dim1=1, dim2=2).sum(1).max() / DAMPING
        return float(error), float(condition) * torch.finfo(torch.float32).eps

    numel = num_blocks * size
    work = harness.Work(4 * GRADIENTS * numel + 8 * numel * size, GRADIENTS * numel * size + numel * size**2)
    name = f"{GRADIENTS} gradients, {num_blocks} blocks of {size}, float32"
    measure("block_gram_", name, implementation, [lambda: run(chunks)], work, gate)


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
    harness.skip_unless_available("block_inverse", implementation)
    num_blocks = WEIGHTS // size
    new = cases.Inputs(torch.float32, harness.DEVICE, seed=0)
    grams = new.spd(61, size, 1e3).repeat(-(-num_blocks // 61), 1, 1)[:num_blocks].contiguous()
    invert = INVERSES[implementation]
    buffers = [grams.clone() for _ in range(harness.copies(grams.nbytes))]
    calls = [lambda gram=gram: invert(gram, DAMPING) for gram in buffers]

    def gate():
        """Compare some blocks of the very call that is timed with float64."""
        got = calls[0]()
        inverse = got[0] if isinstance(got, tuple) else got
        info = torch.zeros(8, dtype=torch.int32, device=inverse.device)
        case = cases.Case("", (grams[:8], DAMPING), condition=1e3)
        return check.compare_to_float64(OPS["block_inverse"], lambda *args: (inverse[:8].contiguous(), info), case)

    work = harness.Work(grams.nbytes * 3 // 2, num_blocks * size**3)
    measure("block_inverse", f"{num_blocks} blocks of {size}, float32", implementation, calls, work, gate)


@pytest.mark.skipif(not ON_GPU, reason="for the memory of a GPU")
@pytest.mark.parametrize("implementation", [name for name in FROM_GRADIENTS if "M-FAC" not in name])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", WHOLE_NETWORKS, ids=["ResNet-50", "BERT-base"])
def bench_whole_networks(measure, weights, size, implementation):
    """The same for a network's worth of blocks at once; rank-one updates of the largest would take minutes a call."""
    if "torch" in implementation and weights * size > 2e9:
        pytest.skip("takes too long")
    bytes_at_once = 4 * weights * (3 * size + CHUNK)
    if bytes_at_once > torch.cuda.mem_get_info(harness.DEVICE)[0]:
        pytest.skip(f"needs {bytes_at_once / 2**30:.0f} GiB")
    compare_inverses(measure, weights // size, size, implementation)
