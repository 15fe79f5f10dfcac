"""A small network and its data."""

import pytest
import torch
from recorder import small_net


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def samples(generator):
    return torch.randn(21, 2, 4, 4, generator=generator), torch.randint(0, 3, (21,), generator=generator)
