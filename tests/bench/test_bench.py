"""The benchmarks: no number without a right result, tables from the files alone, and the command for GPU machines."""

import json
import math
import re
import subprocess
import sys
import time

import host
import pytest
import torch

from fishleg_ext.bench import gpu, harness, networks, report
from fishleg_ext.cli import main

BENCH = host.ROOT / "bench"


@pytest.fixture
def rates(monkeypatch):
    """A device of 1 GB/s and 1 GFLOP/s."""
    monkeypatch.setattr(harness, "rates", lambda: (1e9, 1e9))
    harness.environment.cache_clear()
    yield
    harness.environment.cache_clear()


def test_networks_have_the_weights_that_they_are_known_for():
    count = lambda shapes: sum(map(math.prod, shapes))
    assert count(networks.resnet20()) == 268_336
    assert len(networks.resnet50()) == 54
    assert count(networks.resnet50()) == 25_502_912
    assert count(networks.bert_base()) == 84_934_656


@pytest.mark.benchmark(timer=harness.synchronised)
def test_a_measurement_is_a_line_with_its_floor(benchmark, rates, tmp_path):
    taken = []
    calls = [lambda i=i: (taken.append(i), time.sleep(0.001)) for i in range(3)]
    work = harness.Work(bytes=10**6, flop=10**5)
    gate = lambda: (0.5, 1.0)
    harness.measure(benchmark, tmp_path / "new" / "x.jsonl", "an_op", "a case", "ours", calls, work, gate)
    (line,) = report.read([tmp_path / "new" / "x.jsonl"])
    assert 0.001 <= line["p20_s"] <= line["median_s"] <= line["p80_s"] < 0.1
    assert line["floor_s"] == pytest.approx(0.001)
    assert line["bytes_per_s"] == pytest.approx(1e6 / line["median_s"])
    assert line["flop_per_s"] == pytest.approx(1e5 / line["median_s"])
    assert {"device", "torch", "triton", "commit", "cuda", "error", "error_budget"} <= line.keys()
    assert taken[:6] == [0, 1, 2, 0, 1, 2]  # in turn


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
@pytest.mark.parametrize("error", [1.5, math.nan, math.inf])
def test_nothing_wrong_is_timed(benchmark, tmp_path, error):
    calls = [lambda: pytest.fail("timed")]
    with pytest.raises(AssertionError, match="an_op a case ours: error .*budget 1; not timed"):
        harness.measure(
            benchmark, tmp_path / "x", "an_op", "a case", "ours", calls, harness.Work(1), lambda: (error, 1.0)
        )
    assert not (tmp_path / "x").exists()


def test_the_floor_is_the_slower_of_bytes_and_arithmetic(rates):
    assert harness.floor(harness.Work(2 * 10**9, 10**9)) == 2
    assert harness.floor(harness.Work(10**9, 3 * 10**9)) == 3


def test_buffers_exceed_the_cache():
    assert harness.copies(2**40) == 1
    assert harness.copies(2**20) * 2**20 > 2**25


def lines():
    line = {"op": "an_op", "case": "a case", "device": "a device", "floor_s": 1e-3, "flop": 0, "flop_per_s": 0}
    times = {"the usual": (4e-3, 3e-3, 5e-3), "fishleg_ext": (2e-3, 1.5e-3, 2.5e-3)}
    return [
        line | {"implementation": name, "median_s": m, "p20_s": low, "p80_s": high, "bytes_per_s": 1e6 / m}
        for name, (m, low, high) in times.items()
    ]


def test_the_report_compares_with_the_first_and_with_the_floor():
    text = report.table(lines())
    assert "an_op: a case\na device, floor 1 ms" in text
    usual, ours = (line.split() for line in text.splitlines() if line.startswith(("the usual", "fishleg_ext")))
    assert usual[2:] == ["4", "ms", "3", "ms", "to", "5", "ms", "0.25", "4", "1"]
    assert ours[1:] == ["2", "ms", "1.5", "ms", "to", "2.5", "ms", "0.5", "2", "2"]


def test_the_report_draws(tmp_path):
    report.plot(lines(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_durations_have_units():
    assert [report.duration(s) for s in (2.0, 0.5, 12.34e-6, 3e-9)] == ["2 s", "500 ms", "12.3 us", "3 ns"]


def test_a_benchmark_runs_and_is_reported(tmp_path, capsys):
    command = [sys.executable, "-m", "pytest", "-c", BENCH / "pytest.ini", BENCH / "bench_obs.py", "-k", "32"]
    done = subprocess.run([*command, "--results", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert main(["bench", "obs", "--only-report", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "blocks of 32, float32" in out
    assert "batched torch" in out
    assert "fishleg_ext reference" in out


def test_the_command_refuses_what_it_does_not_know(tmp_path, capsys):
    assert main(["bench", "mask"]) == 2
    assert (
        "there is no benchmark of mask; there are block_fisher, diag_fisher, kron, masks, obs, quantize, select"
        in capsys.readouterr().err
    )
    assert main(["bench", "masks", "--only-report", "--results", str(tmp_path)]) == 2
    assert "there are no results of masks" in capsys.readouterr().err


# make gpu


@pytest.mark.triton
def test_small_calls_run_the_kernels():
    assert gpu.small_calls() >= 5


def test_the_summary_has_steps_checks_and_versions(tmp_path):
    (tmp_path / "check.json").write_text(
        '[{"op": "an_op", "impl": "cuda", "dtype": "", "cases": 0, "reason": "no GPU"}]'
    )
    (tmp_path / "steps.txt").write_text("build\t31\tok\ncheck\t2\tFAILED with status 1\n")
    target, steps = gpu.write_summary(tmp_path, tmp_path)
    summary = json.loads(target.read_text())
    assert summary["steps"][0] == {
        "name": "build",
        "seconds": "31",
        "result": "ok",
        "said": "",
        "commit": harness.environment()["commit"],
    }
    assert steps[1] == ["check", "2", "FAILED with status 1"]
    assert summary["check"][0]["reason"] == "no GPU"
    assert target.name == f"gpu_{harness.device_slug()}.json"
    assert summary["environment"]["torch"] == torch.__version__


def test_a_run_of_some_steps_leaves_what_others_said(tmp_path):
    row = {"op": "an_op", "impl": "cuda", "dtype": "float32", "cases": 3, "error": 1.0}
    (tmp_path / "check.json").write_text(json.dumps([row, row | {"dtype": "float64"}]))
    (tmp_path / "tests.log").write_text("...\n77 passed in 50 s\n\n")
    (tmp_path / "steps.txt").write_text("build\t31\tok\ntests\t50\tok\n")
    gpu.write_summary(tmp_path, tmp_path)
    (tmp_path / "check.json").write_text(json.dumps([row | {"error": 2.0}]))
    (tmp_path / "steps.txt").write_text("build\t40\tok\n")
    target, steps = gpu.write_summary(tmp_path, tmp_path)
    summary = json.loads(target.read_text())
    assert [step["name"] for step in summary["steps"]] == ["build", "tests"]
    assert [step["seconds"] for step in summary["steps"]] == ["40", "50"]
    assert summary["steps"][1]["said"] == "77 passed in 50 s"
    assert {(r["dtype"], r["error"]) for r in summary["check"]} == {("float32", 2.0), ("float64", 1.0)}
    assert steps == [["build", "40", "ok"]]


def test_kernels_that_could_not_run_are_named(tmp_path):
    (tmp_path / "check.json").write_text('[{"op": "keep_mask", "impl": "cuda", "cases": 0, "reason": "no GPU"}]')
    assert gpu.missing(tmp_path / "check.json") == "cuda of keep_mask: no GPU"
    assert "none.json has no results of kernels" in gpu.missing(tmp_path / "none.json")
    rows = [{"op": "keep_mask", "impl": "cuda", "cases": cases, "reason": "float64" * (not cases)} for cases in (3, 0)]
    (tmp_path / "check.json").write_text(json.dumps(rows))
    assert gpu.missing(tmp_path / "check.json") is None  # it ran in one dtype
    rows.append({"op": "obs_score", "impl": "cuda", "cases": 0, "reason": "no such kernel"})
    (tmp_path / "check.json").write_text(json.dumps(rows))
    assert gpu.missing(tmp_path / "check.json") is None


def test_without_a_gpu_the_command_says_so(tmp_path):
    environment = {
        "PATH": "/usr/bin:/bin",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
        "FOLDER": str(tmp_path),
    }
    done = subprocess.run([BENCH / "gpu.sh"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "sees no GPU; name another Python: make gpu PYTHON=..." in done.stderr


def test_every_family_of_benchmarks_is_run():
    families = re.search(r"for family in (.*); do", (BENCH / "gpu.sh").read_text())[1].split()
    assert sorted(families) == sorted(file.stem.removeprefix("bench_") for file in BENCH.glob("bench_*.py"))


def test_results_in_the_repository_passed_their_gate_and_make_a_table():
    lines = report.read((BENCH / "results").glob("*.jsonl"))
    assert all(line["error"] <= line["error_budget"] for line in lines)
    assert {"apply_masks_", "obs_eliminate"} <= {line["op"] for line in lines}
    assert report.table(lines).count("implementation") >= 2


def test_a_commit_is_named_whatever_results_have_changed(monkeypatch, tmp_path):
    if (host.ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", harness._commit())
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "bench" / "harness.py"))
    (tmp_path / "bench").mkdir()
    assert harness._commit() is None
