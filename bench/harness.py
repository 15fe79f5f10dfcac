"""How an implementation is timed, and what is written down about it.

- The timer waits for the GPU. A round is several calls, one after the other, on buffers that are taken in turn; those
  that are written, or are most of what is read, are together larger than the last-level cache.
- Before anything is timed the result is compared with float64: no number without that.
- The floor of a call follows from its shapes: the bytes that it must move and the FLOP that it must do, at the rates at
  which this device copies memory and multiplies float32 matrices, measured in the same run.
"""

import functools
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fishleg_ext
from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing.check import device_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, WARMUP_ROUNDS = 20, 3
ROUND_SECONDS = 0.02  # at least, so that waiting for the GPU does not count
# For all rounds of a benchmark, once it is warm, and of what we are compared with, which may take seconds a call.
MOST_SECONDS, MOST_BASELINE_SECONDS = (2.0, 1.0) if DEVICE.type == "cuda" else (20.0, 4.0)


@dataclass(frozen=True)
class Work:
    """The work that one call must do, whoever does it."""

    bytes: int
    flop: int = 0


def synchronised() -> float:
    """Seconds, once the GPU has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def copies(bytes_of_one: int) -> int:
    """Count how many buffers of this size do not fit into the cache together."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if DEVICE.type == "cuda" else 2**25
    return 1 + cache // max(1, bytes_of_one)


def unavailable(op: str, impl: str) -> str | None:
    """Why a kernel cannot be timed here, or None if it can."""
    if (reason := OPS[op].unavailable(impl)) is not None:
        return reason
    return "interpreted kernels are not timed" if device_of(impl).type == "cpu" else None


def skip_unless_available(op: str, implementation: str) -> None:
    """Skip the benchmark where the implementation names a kernel of ours that cannot be timed here."""
    for impl in OPS[op].kernels:
        ours = implementation.startswith("fishleg_ext") and impl in implementation.replace(",", "").split()
        if ours and (reason := unavailable(op, impl)):
            pytest.skip(reason)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call, and what the call returned to it, after a first call outside the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def measure(
    benchmark: Any,
    file: Path,
    op: str,
    case: str,
    implementation: str,
    calls: Sequence[Callable[[], Any]],
    work: Work,
    gate: Callable[[], tuple[float, float]],
) -> None:
    """Check an implementation, time it and append a line to `file`.

    Args:
        benchmark: the fixture of pytest-benchmark.
        file: of JSON lines.
        op: its name.
        case: shapes and all else that the implementations have in common.
        implementation: what is timed.
        calls: the same call on one buffer after the other.
        work: of one call.
        gate: the error of the implementation against float64, and the largest allowed.
    """
    error, budget = gate()
    assert error <= budget, f"{op} {case} {implementation}: error {error:.2g}, budget {budget:.2g}; not timed"
    turn = itertools.cycle(calls)
    for _ in range(1 + len(calls)):
        next(turn)()
    start = synchronised()
    next(turn)()
    once = synchronised() - start
    iterations = max(1, round(ROUND_SECONDS / once))
    most = MOST_SECONDS if implementation.startswith("fishleg_ext") else MOST_BASELINE_SECONDS
    rounds = max(3, min(ROUNDS, round(most / (once * iterations))))
    warmup_rounds = WARMUP_ROUNDS if once < 1 else 0  # it has run at least three times by now
    benchmark.pedantic(lambda: next(turn)(), rounds=rounds, iterations=iterations, warmup_rounds=warmup_rounds)
    times = sorted(benchmark.stats.stats.data)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    median = statistics.median(times)
    line = {
        "op": op,
        "case": case,
        "implementation": implementation,
        "median_s": median,
        "p20_s": fifths[0],
        "p80_s": fifths[3],
        "rounds": rounds,
        "calls_per_round": iterations,
        "bytes": work.bytes,
        "flop": work.flop,
        "bytes_per_s": work.bytes / median,
        "flop_per_s": work.flop / median,
        "floor_s": floor(work),
        "error": error,
        "error_budget": budget,
        **environment(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def floor(work: Work) -> float:
    """Seconds to move these bytes, or do this arithmetic, at the rates of `rates`, whichever takes longer."""
    bandwidth, arithmetic = rates()
    return max(work.bytes / bandwidth, work.flop / arithmetic)


@functools.cache
def rates() -> tuple[float, float]:
    """Bytes per second of a copy, read and written, and FLOP per second of a float32 matrix product."""
    size = 2**28 if DEVICE.type == "cuda" else 2**25  # elements
    source = torch.ones(size, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    side = 8192 if DEVICE.type == "cuda" else 1024
    matrix = torch.ones(side, side, device=DEVICE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    arithmetic = 2 * side**3 / _fastest(lambda: matrix @ matrix)
    torch.set_float32_matmul_precision(before)
    return bandwidth, arithmetic


def _fastest(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(10):
        start = synchronised()
        call()
        times.append(synchronised() - start)
    return min(times)


@functools.cache
def environment() -> dict[str, Any]:
    """Describe where this is measured."""
    bandwidth, arithmetic = rates()
    return {
        "device": device_name(),
        "copy_bytes_per_s": bandwidth,
        "matmul_flop_per_s": arithmetic,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if find_spec("triton") else None,
        "fishleg_ext": fishleg_ext.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def device_name() -> str:
    """The GPU, or the processor."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


def device_slug() -> str:
    """The device's name, for the name of a file."""
    return "cpu" if DEVICE.type == "cpu" else "-".join(device_name().lower().split())


def _commit() -> str | None:
    """Commit of the checkout that is measured, marked if there is more than was committed."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(json.dumps({"slug": device_slug(), **environment()}))
