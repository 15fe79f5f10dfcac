"""Running statistics of BatchNorm, recomputed."""

import copy

import pytest
import torch
from oracles import batches
from torch import nn

from fishleg_ext.observation.batchnorm import recalibrate_batchnorm


def test_recalibrated_statistics_are_those_of_the_data(net, generator):
    """Whatever the batches: 300 samples in batches of 100 are forwarded as 128, 128 and 44, and weighted so."""
    x = torch.randn(300, 2, 4, 4, generator=generator)
    net.train()
    net[1].momentum = 0.3
    flags = [m.training for m in net.modules()]
    assert recalibrate_batchnorm(net, batches(x, x, 100)) == 300
    features = net[0](x)
    torch.testing.assert_close(net[1].running_mean, features.mean((0, 2, 3)))
    variances = torch.stack([part.var((0, 2, 3)) for part in features.split(128)])
    shares = torch.tensor([128, 128, 44]) / 300
    torch.testing.assert_close(net[1].running_var, shares @ variances)
    assert [m.training for m in net.modules()] == flags
    assert net[1].momentum == 0.3


def test_a_single_sample_left_over_has_no_variance_and_is_left_out(generator):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.randn(129, 3, generator=generator)
    assert recalibrate_batchnorm(net, [(x, x)]) == 128
    torch.testing.assert_close(net[1].running_mean, net[0](x[:128]).mean(0))


def test_a_failed_recalibration_changes_nothing(net, samples):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="at least one sample"):
        recalibrate_batchnorm(net, [])
    with pytest.raises(TypeError):
        recalibrate_batchnorm(net, [*[samples] * 7, 3])  # the first chunk has been used by then
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net[1].momentum == 0.1
    assert recalibrate_batchnorm(nn.Linear(2, 2), []) == 0
