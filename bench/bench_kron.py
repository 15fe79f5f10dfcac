"""Kronecker-factored inverses times the weights of a network, Q x = scale * (P (scale * x) M) for every layer.

Bytes of the floor: x and scale are read and Q x is written, 12 a weight, and both factors are read; where P is diagonal
("diagonal row factor") it is a vector. FLOP: 2 o + 2 i a weight, or 2 i. Small layers are launches, not arithmetic: the
usual code needs four for each of them.

Scores: the diagonal of Q and w^2 / (2 diag) of it, as the single-weight rule has them; 12 bytes a weight if it were one
kernel (w, scale and score), 28 as ops of their own.
"""

import math

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.bench import harness, networks
from fishleg_ext.testing import cases

pytestmark = pytest.mark.benchmark(timer=harness.synchronised)
ON_GPU = harness.DEVICE.type == "cuda"
NETWORKS = {"ResNet-20": networks.resnet20}
if ON_GPU:
    NETWORKS |= {"ResNet-50": networks.resnet50, "BERT-base": networks.bert_base}


def chain(x, row, col, scale):
    """Multiply as the formula is written."""
    product = row @ (scale * x) if row.dim() == 2 else row[:, None] * (scale * x)
    return scale * (product @ col)


def multi_dot(x, row, col, scale):
    """The cheaper order of the two products is found."""
    return scale * torch.linalg.multi_dot([row, scale * x, col])


def einsum(x, row, col, scale):
    """One contraction."""
    if row.dim() == 1:
        return scale * torch.einsum("o,oj,ji->oi", row, scale * x, col)
    return scale * torch.einsum("op,pj,ji->oi", row, scale * x, col)


def each(function):
    """Layer by layer."""
    return lambda *lists: [function(*one) for one in zip(*lists, strict=True)]


PRODUCTS = {
    "torch.matmul chain": each(chain),
    "torch.linalg.multi_dot": each(multi_dot),
    "torch.einsum": each(einsum),
    "torch.compile of the chain": each(torch.compile(chain, dynamic=True)),  # one graph for layers of all sizes
    "fishleg_ext reference": lambda *lists: ops.foreach_kron_mul(*lists, impl="reference"),
    "fishleg_ext triton, layer by layer": each(lambda *one: ops.kron_mul(*one, impl="triton")),
    "fishleg_ext triton": lambda *lists: ops.foreach_kron_mul(*lists, impl="triton"),
}


def matrices(network):
    """(o, i) of each layer."""
    return [(shape[0], math.prod(shape[1:])) for shape in NETWORKS[network]()]


def layers(shapes, row_diagonal):
    """x, P, M and scale of each; distinct layers of one shape have the same numbers."""
    new = cases.Inputs(torch.float32, harness.DEVICE, seed=0)
    sizes = {n for shape in shapes for n in shape}
    # Positive definite, and made in no time: a diagonal, and a vector's outer product.
    factors = {n: (v := new.normal(n, 1)) @ v.mT / n + new.positive(n).diag() for n in sizes}
    first = {shape: (new.normal(*shape), new.positive(*shape)) for shape in set(shapes)}
    rows = [factors[o].diagonal().clone() if row_diagonal else factors[o].clone() for o, _ in shapes]
    cols = [factors[i].clone() for _, i in shapes]
    return [first[s][0].clone() for s in shapes], rows, cols, [first[s][1].clone() for s in shapes]


@pytest.mark.parametrize("implementation", PRODUCTS)
@pytest.mark.parametrize("rows", ["diagonal", "dense"])
@pytest.mark.parametrize("network", NETWORKS)
def bench_kron_mul(measure, network, rows, implementation):
    """All layers."""
    harness.skip_unless_available("foreach_kron_mul", implementation)
    if "compile" in implementation and not ON_GPU:
        pytest.skip("compiled for a GPU only")
    if "multi_dot" in implementation and rows == "diagonal":
        pytest.skip("multi_dot would take the diagonal for a dense matrix")
    shapes, row_diagonal = matrices(network), rows == "diagonal"
    given = layers(shapes, row_diagonal)
    run = PRODUCTS[implementation]
    numel = sum(o * i for o, i in shapes)
    read = sum((o if row_diagonal else o * o) + i * i for o, i in shapes)
    buffers = [given] + [layers(shapes, row_diagonal) for _ in range(harness.copies(4 * (2 * numel + read)) - 1)]

    def gate():
        """The first layer of each shape against float64, as far from it as a sum of so many products may be."""
        worst = 0.0
        results = run(*given)
        for index in {shape: index for index, shape in reversed(list(enumerate(shapes)))}.values():
            expected = chain(*(part[index].double() for part in given))
            worst = max(worst, float((results[index] - expected).abs().max() / expected.abs().max()))
        return worst, 32 * torch.finfo(torch.float32).eps

    work = harness.Work(12 * numel + 4 * read, sum(2 * o * i * (i if row_diagonal else o + i) for o, i in shapes))
    case = f"{network}, {numel} weights in {len(shapes)} layers, rows {rows}, float32"
    measure("foreach_kron_mul", case, implementation, [lambda b=b: run(*b) for b in buffers], work, gate)


def score(weight, row, col, scale):
    """Score by ops, one after the other."""
    return ops.obs_score(weight, ops.kron_diag(row, col, scale))


def plain_score(weight, row, col, scale):
    """Score in plain PyTorch."""
    diagonal = scale.square() * torch.outer(row.diagonal(), col.diagonal())
    return weight.square() / (2 * diagonal)


SCORES = {
    "torch": plain_score,
    "torch.compile": torch.compile(plain_score, dynamic=True),
    "fishleg_ext reference": score,
}


@pytest.mark.parametrize("implementation", SCORES)
@pytest.mark.parametrize("network", NETWORKS)
def bench_kron_diag(measure, network, implementation):
    """The scores of all weights."""
    if "compile" in implementation and not ON_GPU:
        pytest.skip("compiled for a GPU only")
    shapes = matrices(network)
    given = layers(shapes, row_diagonal=False)
    run = each(SCORES[implementation])
    numel = sum(o * i for o, i in shapes)
    buffers = [given] + [layers(shapes, False) for _ in range(harness.copies(8 * numel) - 1)]

    def gate():
        expected = plain_score(*(part[0].double() for part in given))
        error = (run(*given)[0] - expected).abs().max() / expected.abs().max()
        return float(error), 8 * torch.finfo(torch.float32).eps

    case = f"{network}, {numel} weights in {len(shapes)} layers, scored, float32"
    measure("kron_diag", case, implementation, [lambda b=b: run(*b) for b in buffers], harness.Work(12 * numel), gate)
