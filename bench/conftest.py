"""The fixture `measure` and the options of `fishleg-ext bench`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fishleg_ext.bench import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that says where the results go."""
    parser.addoption("--results", type=Path, required=True, help="folder of the JSON lines")


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: object) -> Callable[..., None]:
    """`harness.measure` for this benchmark; its results go to a file of its family and device."""
    folder: Path = request.config.getoption("--results")
    family = request.path.stem.removeprefix("bench_")
    file = folder / f"{family}_{harness.device_slug()}.jsonl"
    started = request.config.stash.setdefault(_STARTED, set())
    if file not in started:  # a run replaces the last
        started.add(file)
        file.unlink(missing_ok=True)
    return lambda *args, **kwargs: harness.measure(benchmark, file, *args, **kwargs)


_STARTED = pytest.StashKey[set[Path]]()
