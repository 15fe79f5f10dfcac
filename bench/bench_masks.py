"""apply_masks_ against what training loops do: multiply every weight tensor by its mask.

Bytes of the floor: a bit per weight is read and, at sparsities at which hardly any sector of 32 bytes keeps all of its
weights, each weight is written once. Multiplying reads weight and mask as well: 9 bytes per float32 weight with bool
masks, 12 with float masks.
"""

import math

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.bench import harness, networks

pytestmark = pytest.mark.benchmark(timer=harness.synchronised)
SPARSITY = 0.9
NETWORKS = {"ResNet-50": networks.resnet50, "BERT-base": networks.bert_base}
if harness.DEVICE.type == "cpu":
    NETWORKS = {"ResNet-20": networks.resnet20, "ResNet-50": networks.resnet50}

MULTIPLY = {
    "mul_ per tensor, bool masks": lambda weights, masks: [w.mul_(m) for w, m in zip(weights, masks, strict=True)],
    "_foreach_mul_, bool masks": lambda weights, masks: torch._foreach_mul_(weights, masks),
}
IMPLEMENTATIONS = [
    *MULTIPLY,
    *(name.replace("bool", "float") for name in MULTIPLY),
    "torch.compile of _foreach_mul_, bool masks",
    "fishleg_ext reference",
    "fishleg_ext triton",
    "fishleg_ext triton, CUDA graph",
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("network", NETWORKS)
def bench_apply_masks(measure, network, implementation):
    """All weights of a network, float32, 90 % pruned."""
    harness.skip_unless_available("apply_masks_", implementation)
    if "compile" in implementation and harness.DEVICE.type == "cpu":
        pytest.skip("compiled for a GPU only")
    shapes = NETWORKS[network]()
    numel = sum(map(math.prod, shapes))
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    new = lambda shape: torch.rand(shape, device=harness.DEVICE, generator=generator)
    masks = [new(shape) >= SPARSITY for shape in shapes]
    buffers = [[new(shape) for shape in shapes] for _ in range(harness.copies(4 * numel))]

    if implementation.startswith("fishleg_ext"):
        packed = [ops.pack_mask(mask) for mask in masks]
        impl = "triton" if "triton" in implementation else "reference"
        apply = lambda weights: ops.apply_masks_(weights, packed, impl=impl)
    else:
        given = [mask.float() for mask in masks] if "float" in implementation else masks
        multiply = MULTIPLY[implementation.removeprefix("torch.compile of ").replace("float", "bool")]
        multiply = torch.compile(multiply) if "compile" in implementation else multiply
        apply = lambda weights: multiply(weights, given)
    calls = [lambda weights=weights: apply(weights) for weights in buffers]
    if "graph" in implementation:
        calls = [harness.captured(call)[0].replay for call in calls]

    def gate():
        """Nothing but the pruned changes, and that to zero."""
        expected = [weight * mask for weight, mask in zip(buffers[0], masks, strict=True)]
        if "graph" in implementation:
            for weight, mask in zip(buffers[0], masks, strict=True):
                weight.masked_fill_(~mask, 7.0)  # captured, it has run before
        calls[0]()
        equal = all(torch.equal(got, want) for got, want in zip(buffers[0], expected, strict=True))
        return 0.0 if equal else math.inf, 0.0

    case = f"{network}, {numel} weights in {len(shapes)} tensors, float32, {SPARSITY:.0%} pruned"
    measure("apply_masks_", case, implementation, calls, harness.Work(numel // 8 + 4 * numel), gate)
