"""What several test files share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def fisher(generator: torch.Generator) -> Callable[..., Tensor]:
    """Random Fisher blocks [K, B, B] in float64 with eigenvalues from 1 / condition to 1."""

    def make(num_blocks: int, size: int, condition: float = 1e3) -> Tensor:
        normal = torch.randn(num_blocks, size, size, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(normal).Q
        spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
        matrix = basis * spectrum @ basis.mT
        return (matrix + matrix.mT) / 2

    return make
