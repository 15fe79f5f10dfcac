"""The memory that pruning takes, measured: what the README says, and not more than max_memory."""

import json
import os
import subprocess
import sys

import pytest

MIB = 2**20
MEASURE = """
import gc, json, sys
from pathlib import Path
import torch
from torch import nn
import fishleg_ext

def mib(field):
    return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) / 1024

torch.set_num_threads(1)
torch.manual_seed(0)
options = {"sparsity": 0.5, "num_grads": 64, "progress": False} | json.loads(sys.argv[1])
net = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(384, 384), nn.ReLU())], nn.Linear(384, 10))
data = [(torch.randn(64, 384), torch.randint(0, 10, (64,)))]
fishleg_ext.prune(nn.Sequential(nn.Linear(384, 10)), data, **options | {"max_memory": None})  # what is loaded once
gc.collect()
before = mib("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")
assert fishleg_ext.prune(net, data, **options).sparsity == 0.5
print(mib("VmHWM:") - before)
"""
WEIGHTS = 3 * 384**2 + 10 * 384
# Weights before the call, moved, and what selection sorts by: costs, ranks and orders.
SELECTION = 60 * WEIGHTS / MIB
WORKSPACE = 64  # of the references on a CPU
CHUNK = 256
SLACK = 32  # that allocators hold

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
    ),
]


def peak(**options):
    """MiB beside those before the call."""
    command = [sys.executable, "-c", MEASURE, json.dumps(options)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_without_a_bound_it_is_gram_matrices_a_chunk_and_one_layers_inverses():
    gram, inverses = WEIGHTS * 128 * 4 / MIB, 384**2 * 128 * 4 / MIB
    assert gram < peak(curvature="block") < gram + max(CHUNK, inverses + WORKSPACE) + SELECTION + SLACK


@pytest.mark.parametrize(
    "mib, options",
    [
        (320, {"curvature": "block"}),
        (224, {"curvature": "block"}),
        (240, {"curvature": "fishleg", "saliency": "simultaneous"}),
    ],
)
def test_a_bound_holds(mib, options, record_table):
    taken = peak(max_memory=mib * MIB, **options)
    record_table("peak memory, MiB", **options, max_memory=mib, taken=round(taken), rest=round(SELECTION + SLACK))
    assert taken < mib + SELECTION + SLACK
    # It holds the Gram matrices of a layer at least; FishLeg, which must have room for gradients multiplied out, learns
    # from their factors here.
    assert taken > 384**2 * 128 * 4 / MIB or options["curvature"] == "fishleg"
