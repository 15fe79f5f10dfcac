"""keep_mask against what is usual: one threshold from kthvalue, topk or a sort of all scores, and a comparison.

Bytes of the floor: a threshold cannot be known before every score has been read, and the masks cannot be written before
it is known: two readings of 4 bytes and a byte of mask. The threshold of the baselines prunes its ties, too, so that
their counts are exact only where there are none.
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
    NETWORKS = {"ResNet-20": networks.resnet20}

THRESHOLDS = {
    "torch.kthvalue of all scores": lambda scores, count: scores.kthvalue(count).values,
    "torch.topk of all scores": lambda scores, count: scores.topk(count, largest=False).values[-1],
    "torch.sort of all scores": lambda scores, count: scores.sort().values[count - 1],
}
IMPLEMENTATIONS = [*THRESHOLDS, "fishleg_ext reference", "fishleg_ext cuda"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("network", NETWORKS)
def bench_keep_mask(measure, network, implementation):
    """All scores of a network, float32, 90 % pruned."""
    harness.skip_unless_available("keep_mask", implementation)
    shapes = NETWORKS[network]()
    numel = sum(map(math.prod, shapes))
    count = round(SPARSITY * numel)
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    # Squares, as costs are, of many orders of magnitude; all different, or the baselines could not be exact.
    ranks = torch.randperm(numel, device=harness.DEVICE, generator=generator).double()
    every = torch.exp(16 * (ranks + 1) / numel - 8).float().split(list(map(math.prod, shapes)))
    scores = [part.reshape(shape).clone() for part, shape in zip(every, shapes, strict=True)]
    buffers = [[score.clone() for score in scores] for _ in range(harness.copies(4 * numel))]

    if implementation.startswith("fishleg_ext"):
        impl = implementation.split()[1]
        select = lambda given: ops.keep_mask(given, count, impl=impl)
    else:
        threshold_of = THRESHOLDS[implementation]

        def select(given):
            threshold = threshold_of(torch.cat([score.reshape(-1) for score in given]), count)
            return [score > threshold for score in given]

    def gate():
        """Nothing is kept that is lower than what is pruned; of ties in float32 either may go."""
        masks = select(buffers[0])
        kept = torch.cat([score[mask] for score, mask in zip(scores, masks, strict=True)])
        pruned = torch.cat([score[~mask] for score, mask in zip(scores, masks, strict=True)])
        right = len(pruned) == count or (not implementation.startswith("fishleg_ext") and len(pruned) > count)
        return 0.0 if right and kept.min() >= pruned.max() else math.inf, 0.0

    calls = [lambda given=given: select(given) for given in buffers]
    case = f"{network}, {numel} scores in {len(shapes)} tensors, float32, {SPARSITY:.0%} pruned"
    measure("keep_mask", case, implementation, calls, harness.Work(9 * numel), gate)
