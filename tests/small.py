"""A small network with its data, and pruning with settings for it."""

import copy

import torch
from oracles import usable
from torch import nn

import fishleg_ext


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def prune(net, data, *loss_fn, **options):
    models = {name: options[name] for name in ("curvature", "allocation") if name in options}
    defaults = usable(**models, num_grads=32, block_size=16, damping=1e-3, progress=False)
    return fishleg_ext.prune(net, data, *loss_fn, **(defaults | options))


def prunable(net):
    return {n: p for n, p in net.named_parameters() if p.dim() > 1}


def num_weights(net):
    return sum(p.numel() for p in prunable(net).values())


def snapshot(net):
    return (
        copy.deepcopy(net.state_dict()),
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:3] == after[1:3]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(before[4], after[4])
