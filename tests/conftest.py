"""What several test files share."""

import os
from collections.abc import Callable

import pytest
import torch
from oracles import batches
from small import make_net
from tabulate import tabulate
from torch import Tensor

from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing.cases import random_spd

if os.environ.pop("PYTEST_XDIST_WORKER", None):  # by which pytest-benchmark would know, and not run test_bench.py's
    os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def fisher(generator: torch.Generator) -> Callable[..., Tensor]:
    """Random Fisher blocks [K, B, B] in float64 with eigenvalues from 1 / condition to 1."""

    def make(num_blocks: int, size: int, condition: float = 1e3) -> Tensor:
        return random_spd(num_blocks, size, condition, generator) / condition

    return make


@pytest.fixture
def net():
    return make_net()


@pytest.fixture
def data(generator):
    x = torch.randn(48, 1, 6, 6, generator=generator)
    return batches(x, torch.randint(0, 3, (48,), generator=generator))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say why."""
    reasons = {"gpu": None if torch.cuda.is_available() else "needs a GPU, and torch sees none"}
    reasons |= {impl: OPS[name].unavailable(impl) for name in OPS for impl in OPS[name].kernels}
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


ROW = "row of a table"


@pytest.fixture
def record_table(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Add a row to a table, by its title, that is printed after all tests."""
    return lambda title, **row: record_property(ROW, (title, row))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tables: dict[str, list[dict]] = {}
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    reports.sort(key=lambda report: report.nodeid)  # workers end in any order
    for title, row in (value for report in reports for name, value in report.user_properties if name == ROW):
        tables.setdefault(title, []).append(row)
    for title, rows in tables.items():
        terminalreporter.section(title)
        distinct = list({str(row): row for row in rows}.values())
        terminalreporter.write_line(tabulate(distinct, headers="keys"))
