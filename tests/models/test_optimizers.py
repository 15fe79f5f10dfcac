"""Optimizers that are wrapped, and pruners that are pickled."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from fishleg_ext import Pruner
from models.functions import (
    Net,
)


class Wrapper(torch.optim.Optimizer):
    """Is no optimizer but in name, and steps the one inside, as accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value):
        pass

    def step(self):
        self.optimizer.step()


def keeps_zeros(model, pruner, optimizer, data):
    pruner.estimate([data], F.cross_entropy)
    masks = pruner.prune_to(0.5).masks
    for _ in range(3):
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
        assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    pruner.finalize()
    optimizer.step()
    assert any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_a_wrapped_optimizer_keeps_zeros(data):
    model = Net()
    pruner, optimizer = Pruner(model, num_grads=24, progress=False), Wrapper(torch.optim.SGD(model.parameters(), 0.1))
    pruner.attach(optimizer)
    keeps_zeros(model, pruner, optimizer, data)
    optimizer.optimizer = None
    with pytest.raises((TypeError, AttributeError)):
        pruner.attach(optimizer)


def test_accelerate(data):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = Net()
    pruner = Pruner(model, num_grads=24, progress=False)
    prepared, optimizer = accelerate.Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    pruner.attach(optimizer)
    keeps_zeros(prepared, pruner, optimizer, data)


def test_a_pruner_is_pickled_while_it_is_attached(data):
    model = Net()
    pruner, optimizer = Pruner(model, num_grads=24, progress=False), torch.optim.SGD(model.parameters(), 0.1)
    pruner.attach(optimizer)
    again = pickle.loads(pickle.dumps(pruner))
    other = torch.optim.SGD(again.model.parameters(), 0.1)
    again.attach(other)
    keeps_zeros(again.model, again, other, data)
