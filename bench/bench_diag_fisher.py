"""fisher_diag_update_ against _foreach calls, which are what PyTorch's Adam makes.

Bytes of the floor: mean and gradient are read and the mean is written, 12 for each float32 weight.
"""

import math

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.bench import harness, networks

pytestmark = pytest.mark.benchmark(timer=harness.synchronised)
NETWORKS = {"ResNet-50": networks.resnet50, "BERT-base": networks.bert_base}
if harness.DEVICE.type == "cpu":
    NETWORKS = {"ResNet-20": networks.resnet20}
BETA = 0.99


def per_tensor(fisher, grads):
    """Two calls a tensor."""
    for average, grad in zip(fisher, grads, strict=True):
        average.mul_(BETA).addcmul_(grad, grad, value=1 - BETA)


def foreach(fisher, grads):
    """Two calls."""
    torch._foreach_mul_(fisher, BETA)
    torch._foreach_addcmul_(fisher, grads, grads, value=1 - BETA)


BASELINES = {"mul_ and addcmul_ per tensor": per_tensor, "_foreach_mul_ and _foreach_addcmul_": foreach}
IMPLEMENTATIONS = [*BASELINES, "torch.compile of _foreach calls", "fishleg_ext reference", "fishleg_ext triton"]
IMPLEMENTATIONS += ["fishleg_ext triton, CUDA graph"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("network", NETWORKS)
def bench_fisher_diag_update(measure, network, implementation):
    """All weights of a network, float32."""
    harness.skip_unless_available("fisher_diag_update_", implementation)
    if "compile" in implementation and harness.DEVICE.type == "cpu":
        pytest.skip("compiled for a GPU only")
    shapes = NETWORKS[network]()
    numel = sum(map(math.prod, shapes))
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    new = lambda: [torch.rand(shape, device=harness.DEVICE, generator=generator) for shape in shapes]
    buffers = [(new(), new()) for _ in range(harness.copies(8 * numel))]

    if implementation.startswith("fishleg_ext"):
        impl = implementation.removesuffix(", CUDA graph").split()[1]
        update = lambda fisher, grads: ops.fisher_diag_update_(fisher, grads, BETA, impl=impl)
    else:
        update = torch.compile(foreach) if "compile" in implementation else BASELINES[implementation]

    def gate():
        """Against float64."""
        fisher, grads = buffers[0]
        expected = [BETA * f.double() + (1 - BETA) * g.double() ** 2 for f, g in zip(fisher, grads, strict=True)]
        calls[0]()
        error = max(float(((f - e).abs() / e.abs().max()).max()) for f, e in zip(fisher, expected, strict=True))
        return error, 4 * torch.finfo(torch.float32).eps

    calls = [lambda fisher=fisher, grads=grads: update(fisher, grads) for fisher, grads in buffers]
    if "graph" in implementation:
        calls = [harness.captured(call)[0].replay for call in calls]
    case = f"{network}, {numel} weights in {len(shapes)} tensors, float32"
    measure("fisher_diag_update_", case, implementation, calls, harness.Work(12 * numel, 3 * numel), gate)
