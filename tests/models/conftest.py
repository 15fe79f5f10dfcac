"""Data of a small classifier."""

import pytest
import torch


@pytest.fixture
def data(generator):
    return torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator)
