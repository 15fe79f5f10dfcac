"""CUDA C++ kernels, run on the host: right to float64, within bounds, ordered by their barriers.

A kernel needs no more than a driver in cuda_on_host/ named after its private op: everything here finds it by itself.
"""

import contextlib
import itertools
import re

import host
import pytest
import torch

from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing import cases, check

REASON = host.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HEADERS = sorted(host.CSRC.glob("*.cuh"))
BARRIERS = [barrier for header in HEADERS for barrier in host.barriers(header)]
MOST_IN_PANELS = 100_000  # elements of all arguments: 512 threads for each block take their time on the host
# The order in which threads run is drawn from these seeds.
SEEDS = ("0", "1")


def op_of(driver):
    """The op whose launcher calls the private op that a driver stands for: NAME_out, or NAME_..._out."""
    return OPS[max((name for name in OPS if driver.stem.startswith(name.rstrip("_"))), key=len)]


@pytest.fixture
def supported(monkeypatch):
    """The cases that the kernel of a driver takes."""

    def get(driver, dtype):
        op = op_of(driver)
        module = op.module("cuda")
        monkeypatch.setattr(module, "supports_device", lambda tensor: (True, ""))
        in_panels = driver.stem == "obs_eliminate_panel_out"
        if in_panels:  # they are for large blocks, and tried on small ones
            in_registers = module.largest_to_eliminate
            # Half a weight: what is left after gathering goes in panels, too, until nothing is.
            monkeypatch.setattr(module, "largest_to_eliminate", lambda *of: min(0.5, in_registers(*of)))
            monkeypatch.setattr(module, "PANEL", 16)
        for case in cases.CASES[op.name](cases.Inputs(dtype, torch.device("cpu"), 0)):
            if in_panels and case.numel > MOST_IN_PANELS:
                continue
            if op.name == "obs_eliminate":
                of = torch.promote_types(dtype, torch.float32), case.kwargs.get("group", 1)
                if in_panels == (case.args[0].shape[-1] <= module.largest_to_eliminate(*of)):
                    continue
            if getattr(module, f"supports_{op.name}")(*case.args, **case.kwargs)[0]:
                yield case

    return get


def drivers_of(header):
    return [driver for driver in host.DRIVERS if header in host.included(driver)]


def test_every_kernel_has_a_driver():
    assert host.DRIVERS
    for header in HEADERS:
        text = "".join(driver.read_text() for driver in drivers_of(header))
        for kernel in host.kernels(header):
            assert kernel in text, f"no driver in {host.HOST} runs {kernel} of {header.name}"
        # None that the patterns by which all this finds kernels and barriers would miss.
        assert header.read_text().count("__global__") == len(host.kernels(header))
        assert header.read_text().count("__sync") == len(host.barriers(header))
    assert not any("__global__" in source.read_text() for source in host.CSRC.glob("*.cu"))
    for driver in host.DRIVERS:
        assert "cuda" in op_of(driver).kernels


SMALL = 10_000  # elements of all arguments: several warps, all of a kernel's options
DTYPES = torch.float32, torch.float64, torch.bfloat16
# Gradients are read as they are stored; all else is float32 or float64 by then.
STORED = [(driver, torch.float16) for driver in host.DRIVERS if "gradients.h" in driver.read_text()]


def keeps_its_budget(driver, problems, dtype, folder):
    """All cases of `fishleg-ext check`, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    op = op_of(driver)
    launcher = op.launcher("cuda")
    row = check.Row(op.name, "cuda", str(dtype))
    with host.on_host(driver.stem, host.build(driver, sanitize="address,undefined"), folder) as printed:
        for case in problems:
            row.record(case, *check.compare_to_float64(op, launcher, case))
    assert not row.failures
    assert row.cases > 3
    assert len(printed) > row.cases / 2  # all but empty ones
    assert not any(printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "driver, dtype",
    [*itertools.product(host.DRIVERS, DTYPES), *STORED],
    ids=lambda value: getattr(value, "stem", str(value)),
)
def test_kernels_keep_their_error_budget_and_their_bounds(driver, dtype, tmp_path, supported):
    keeps_its_budget(driver, supported(driver, dtype), dtype, tmp_path)


@pytest.mark.parametrize("driver", host.DRIVERS, ids=lambda driver: driver.stem)
def test_kernels_do_so_on_small_problems(driver, tmp_path, supported):
    small = (case for case in supported(driver, torch.float32) if case.numel <= SMALL)
    keeps_its_budget(driver, small, torch.float32, tmp_path)


def reports_of(driver, program, folder, problems):
    """What ThreadSanitizer says of small problems, one after the other: a report for each that has a race."""
    op = op_of(driver)
    with host.on_host(driver.stem, program, folder) as printed:
        for case in problems:
            if case.numel <= SMALL and case.condition <= 1e3:
                try:
                    op.launcher("cuda")(*case.args, **case.kwargs)
                except NotImplementedError:  # a kernel that the driver is not for
                    raise
                except RuntimeError:
                    yield printed[-1]
        assert len(printed) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("driver", host.DRIVERS, ids=lambda driver: driver.stem)
def test_kernels_are_free_of_races(driver, seed, tmp_path, monkeypatch, supported):
    monkeypatch.setenv("CUDA_ON_HOST_SEED", seed)
    problems = supported(driver, torch.float32)
    assert list(reports_of(driver, host.build(driver, sanitize="thread"), tmp_path, problems)) == []


@pytest.mark.slow
@pytest.mark.parametrize("barrier", BARRIERS, ids=str)
def test_every_barrier_is_needed(barrier, tmp_path, record_table, supported):
    """Without any one of them ThreadSanitizer reports a race: the tool sees, and the kernel has none too many."""
    (tmp_path / "csrc").mkdir()
    for header in HEADERS:  # all of them, as they include what lies beside them
        (tmp_path / "csrc" / header.name).write_text(header.read_text())
    (tmp_path / "csrc" / barrier.file.name).write_text(barrier.deleted())
    kernel = barrier.kernel() or ""
    found = None
    for driver in drivers_of(barrier.file):
        if kernel in driver.read_text() and found is None:
            program = host.build(driver, sanitize="thread", csrc=tmp_path / "csrc")
            with contextlib.closing(reports_of(driver, program, tmp_path, supported(driver, torch.float32))) as reports:
                races = (re.search(r"ThreadSanitizer: data race.*?(\w+\.cuh:\d+)", report, re.S) for report in reports)
                found = next(filter(None, races), None)
    assert found is not None
    record_table(
        "barriers: each deleted in turn",
        barrier=barrier.name,
        place=f"{barrier.file.relative_to(host.ROOT)}:{barrier.line}",
        reported_by=f"ThreadSanitizer: data race at {found[1]}",
    )


# The tool itself


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
@pytest.mark.parametrize("name", ["exchange", "collective", "bounds"])
def test_the_host_runs_kernels_as_a_gpu_does(name, sanitize):
    done = host.execute(host.build(host.SELFTEST, sanitize=sanitize), name)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["shared", "global"])
def test_the_host_sees_accesses_out_of_bounds(name):
    done = host.execute(host.build(host.SELFTEST, sanitize="address,undefined"), name)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert re.search(r"bounds_kernel.*selftest.cuh:\d+", done.stderr)


def test_the_host_sees_a_barrier_that_some_never_reach():
    done = host.execute(host.build(host.SELFTEST, sanitize="thread"), "deadlock")
    assert done.returncode == 3
    assert "deadlock" in done.stderr


@pytest.mark.parametrize("barrier", host.barriers(host.HOST / "selftest.cuh")[:2], ids=str)
def test_the_host_sees_a_deleted_barrier(barrier, tmp_path):
    (tmp_path / "selftest.cuh").write_text(barrier.deleted())
    (tmp_path / host.SELFTEST.name).write_text(host.SELFTEST.read_text())
    program = host.build(tmp_path / host.SELFTEST.name, sanitize="thread", csrc=tmp_path)
    assert "ThreadSanitizer: data race" in host.execute(program, "exchange").stderr


# The launcher in Python


def test_a_shared_inverse_reaches_the_kernel_once():
    given = []
    library = torch.library.Library("fishleg_ext_cuda", "IMPL")
    library.impl("obs_eliminate_out", lambda *args: given.append([a.shape for a in args[:3]]), "CPU")
    weight, alive = torch.ones(5, 3, dtype=torch.bfloat16), torch.ones(5, 3, dtype=torch.bool)
    for inverse in (torch.eye(3)[None], torch.eye(3).expand(5, 3, 3), torch.eye(3).repeat(5, 1, 1)):
        OPS["obs_eliminate"].launcher("cuda")(weight, inverse, alive)
    library._destroy()
    assert given == [[(5, 3), (count, 3, 3), (5, 3)] for count in (1, 1, 5)]


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 192), (torch.bfloat16, 192), (torch.float64, 176)])
def test_blocks_are_supported_up_to_what_registers_hold(dtype, largest, monkeypatch):
    from fishleg_ext.cuda import block_fisher, obs

    for module in (obs, block_fisher):
        monkeypatch.setattr(module, "supports_device", lambda tensor: (True, ""))
    meta = lambda *shape, dtype=dtype: torch.empty(*shape, device="meta", dtype=dtype)
    calls = {
        obs.supports_obs_compensate: lambda b: (meta(40, b), meta(40, b, b), meta(40, b, dtype=torch.bool)),
        block_fisher.supports_block_inverse: lambda b: (meta(40, b, b), 0.1),
    }
    wide = torch.promote_types(dtype, torch.float32)
    for supports in (block_fisher.supports_block_gram_, block_fisher.supports_woodbury_update_):
        calls[supports] = lambda b: (meta(40, b, b, dtype=wide), meta(9, 40, b), 1)
    for supports, arguments in calls.items():
        assert [b for b in range(1, 300) if supports(*arguments(b))[0]] == list(range(1, largest + 1))
        assert f"up to {largest} weights in {wide}, not {largest + 1}" in supports(*arguments(largest + 1))[1]
    in_registers = [obs.largest_to_eliminate(wide, group) for group in (1, 4, 2, 8)]
    assert in_registers == [largest, 128 if wide == torch.float64 else largest, 0, 0]


def test_what_kernels_do_not_support_is_explained(monkeypatch):
    from fishleg_ext.cuda import block_fisher, obs

    for module in (obs, block_fisher):
        monkeypatch.setattr(module, "supports_device", lambda tensor: (True, ""))
    blocks, vectors, mask = torch.ones(4, 8, 8), torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool)
    assert obs.supports_obs_eliminate(vectors, blocks, mask, group=2) == (
        False,
        "its CUDA C++ kernel removes single weights or groups of 4, not groups of 2",
    )
    assert obs.supports_obs_eliminate(vectors, blocks, mask, group=4)[0]
    few = "its CUDA C++ kernel is for many blocks, not for 4 blocks of 100 gradients"
    assert block_fisher.supports_block_gram_(blocks, torch.ones(100, 4, 8)) == (False, few)
    assert block_fisher.supports_block_gram_(blocks, torch.ones(9, 4, 8))[0]
    apart = torch.ones(4, 8, 9)[..., :8]
    contiguous = (False, "its CUDA C++ kernel takes contiguous blocks")
    assert block_fisher.supports_woodbury_update_(apart, torch.ones(9, 4, 8), 9) == contiguous
    assert block_fisher.supports_block_gram_(apart, torch.ones(9, 4, 8)) == contiguous


@pytest.mark.parametrize(
    "wide, given, read",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_gradients_reach_the_kernel_as_they_are_where_it_reads_them(wide, given, read):
    seen = []
    library = torch.library.Library("fishleg_ext_cuda", "IMPL")
    library.impl("block_gram_out", lambda grads, alpha, gram: seen.append((grads.dtype, grads.stride())), "CPU")
    grads = torch.ones(5, 3, 4, dtype=given).transpose(0, 1)
    OPS["block_gram_"].launcher("cuda")(torch.zeros(5, 4, 4, dtype=wide), grads)
    library._destroy()
    assert seen == [(read, grads.stride())]
