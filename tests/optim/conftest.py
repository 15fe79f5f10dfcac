"""Networks that every test of steps is run on."""

import pytest
import torch

from optim.problems import NETS


@pytest.fixture(params=NETS)
def problem(request, generator):
    torch.manual_seed(0)
    net, shape = NETS[request.param]()
    x = torch.randn(32, *shape, generator=generator).double()
    return net.double(), x, (x.flatten(1) @ torch.randn(x[0].numel(), 3, generator=generator).double()).argmax(1)
