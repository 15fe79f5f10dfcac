"""The CPU kernels in C++, for each instruction set that this machine has, watched by sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fishleg_ext import cpu, ops

ROOT = Path(__file__).parents[2]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"],
}
SOURCES = ["block_fisher", "obs"]
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]  # as torch calls them


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("instruction_set", FLAGS)
def test_cases_under_sanitizers(tmp_path, instruction_set):
    """Against the definition in long double; reads and writes between two arrays of the workspace are reported."""
    program = tmp_path / "cases"
    sources = [ROOT / "tests" / "cpu_kernels" / "main.cpp", *(ROOT / "csrc" / f"cpu_{s}.cpp" for s in SOURCES)]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-math-errno"]
    build = ["g++", "-std=c++17", "-O1", "-g", *sanitize, *FLAGS[instruction_set], "-I", ROOT / "csrc", "-Wno-psabi"]
    build += [f"-DFISHLEG_EXT_INSTRUCTION_SET={instruction_set}", *sources, "-o", program]
    subprocess.run(build, check=True)
    have = torch.backends.cpu.get_cpu_capability()
    if have in CAPABILITIES and CAPABILITIES.index(have) < list(FLAGS).index(instruction_set):
        pytest.skip(f"this machine has {have} alone")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.stdout == "all passed\n", done.stdout + done.stderr


@pytest.mark.skipif(cpu.not_loaded() is not None, reason=str(cpu.not_loaded()))
def test_threads_share_the_blocks(threads):
    """Whatever the number of threads, the same digits: each block is worked on by one."""
    torch.manual_seed(0)
    x = torch.randn(7, 40, 20)
    inverse = torch.linalg.inv(x.mT @ x + torch.eye(20))
    weight, alive = torch.randn(7, 20), torch.rand(7, 20) < 0.8
    results = []
    for number in (1, 2, 5):
        threads(number)
        rank, cost = ops.obs_eliminate(weight, inverse, alive, dead_first=True)
        results.append((rank, cost, ops.obs_compensate(weight, inverse, ~alive)))
    expected = ops.obs_eliminate(weight, inverse, alive, dead_first=True, impl="reference")
    assert torch.equal(results[0][0], expected[0])
    torch.testing.assert_close(results[0][1], expected[1])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def without_cpp(monkeypatch):
    monkeypatch.setattr(cpu, "not_loaded", lambda: "not built")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_without_cpp_the_same(shared, share, without_cpp):
    """Batched PyTorch takes its place; through the pruned, or through the kept, the joint update is one."""
    torch.manual_seed(0)
    x = torch.randn(1 if shared else 30, 120, 60, dtype=torch.float64)
    inverse = torch.linalg.inv(x.mT @ x / 120 + 0.1 * torch.eye(60))
    weight, pruned = torch.randn(30, 60, dtype=torch.float64), torch.rand(30, 60) < share
    pruned[0], pruned[1] = True, False
    moved = ops.obs_compensate(weight, inverse, pruned, impl="cpu")
    for w, h, p, m in zip(weight, inverse.expand(30, -1, -1), pruned, moved, strict=True):
        step = h[:, p] @ torch.linalg.solve(h[p][:, p], w[p])
        torch.testing.assert_close(m, torch.where(p, 0, w - step))
    rank, cost = ops.obs_eliminate(weight, inverse, ~pruned, dead_first=True, impl="cpu")
    expected_rank, expected_cost = ops.obs_eliminate(weight, inverse, ~pruned, dead_first=True, impl="reference")
    assert torch.equal(rank, expected_rank)
    torch.testing.assert_close(cost, expected_cost)
