"""What several test files share."""

from collections.abc import Callable

import pytest
import torch
from tabulate import tabulate
from torch import Tensor

from fishleg_ext.cases import random_spd
from fishleg_ext.ops.dispatch import OPS


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def fisher(generator: torch.Generator) -> Callable[..., Tensor]:
    """Random Fisher blocks [K, B, B] in float64 with eigenvalues from 1 / condition to 1."""

    def make(num_blocks: int, size: int, condition: float = 1e3) -> Tensor:
        return random_spd(num_blocks, size, condition, generator) / condition

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say why."""
    reasons = {"gpu": None if torch.cuda.is_available() else "needs a GPU, and torch sees none"}
    reasons |= {impl: OPS[name].unavailable(impl) for name in OPS for impl in OPS[name].kernels}
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


_TABLES = pytest.StashKey[dict[str, list[dict]]]()


@pytest.fixture
def record_table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a row to a table, by its title, that is printed after all tests."""
    tables = request.config.stash.setdefault(_TABLES, {})
    return lambda title, **row: tables.setdefault(title, []).append(row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, rows in config.stash.get(_TABLES, {}).items():
        terminalreporter.section(title)
        distinct = list({str(row): row for row in rows}.values())
        terminalreporter.write_line(tabulate(distinct, headers="keys"))
