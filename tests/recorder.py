"""An observer that keeps what it is given, and a small network to observe."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.types import Observation


@dataclass
class Recorder:
    observes: frozenset = frozenset({"gradients"})
    seen: list[Observation] = field(default_factory=list)

    def update(self, observation):
        self.seen.append(observation)

    def gradients(self, name):
        return torch.cat([o.gradients[name] for o in self.seen])

    def inputs(self, name):
        """Rows [n, fan_in], or [groups, n, fan_in]."""
        return self._rows("inputs", name)

    def output_gradients(self, name):
        """Rows [n, fan_out], or [groups, n, fan_out / groups]."""
        return self._rows("output_gradients", name)

    def _rows(self, what, name):
        rows = torch.cat([getattr(o, what)[name].rows for o in self.seen if name in getattr(o, what)], dim=1)
        return rows if len(rows) > 1 else rows[0]


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def weights_of(net):
    return {n: p for n, p in net.named_parameters() if n in ("0.weight", "5.weight")}


def recorded(net, data, **options):
    """What `observe` hands over for the cross entropy of a small net."""
    recorder = Recorder()
    observe(net, data, F.cross_entropy, recorder, weights_of(net), **options)
    return recorder


def expected_gradients(net, inputs, targets, group, loss_fn=F.cross_entropy):
    net = copy.deepcopy(net).eval()
    rows = {n: [] for n in weights_of(net)}
    whole = len(inputs) - len(inputs) % group  # what is left over is not used
    for x, y in zip(inputs[:whole].split(group), targets[:whole].split(group), strict=True):
        grads = torch.autograd.grad(loss_fn(net(x), y), list(weights_of(net).values()))
        for name, grad in zip(rows, grads, strict=True):
            rows[name].append(grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}
