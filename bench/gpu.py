"""Everything that only a machine with a GPU can show, by one command: `make gpu`, or `python bench/gpu.py`.

Builds the CUDA part in place, compares every kernel with float64, runs the tests that need a GPU (CUDA graphs and other
streams among them), runs small problems under compute-sanitizer, and measures. Needs no network, but a Python that has
torch with CUDA and what the extras [test,bench] name, setuptools, cmake and ninja; nvcc and compute-sanitizer on the
PATH or in /usr/local/cuda/bin.

What each step printed is in FOLDER/STEP.log; the last thing printed is a table, also written to
bench/results/gpu_DEVICE.json, whose "check" holds every error and its budget. Exit status 1 where a step failed, or a
kernel could not run at all.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
RESULTS = ROOT / "bench" / "results"
MOST_SECONDS = 480.0  # for all steps together
SMALL = 30_000  # elements of all arguments of a call, where a sanitizer watches it


@dataclass
class Step:
    """One command, and how it ended."""

    name: str
    command: list[str]
    most_seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    result: str = "not run"
    seconds: float = 0.0

    def run(self, folder: Path, deadline: float) -> None:
        """Run it, unless its program is missing or no time is left; its output goes to a file."""
        if shutil.which(self.command[0]) is None:
            self.result = f"not run: there is no {self.command[0]}"
            return
        start = time.monotonic()
        limit = min(self.most_seconds, deadline - start)
        if limit <= 0:
            self.result = "not run: the time was up"
            return
        log = folder / f"{self.name}.log"
        print(f"{self.name}: {' '.join(self.command)}", flush=True)
        with log.open("w") as output:
            try:
                process = subprocess.Popen(
                    self.command,
                    cwd=ROOT,
                    env=os.environ | self.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                status = process.wait(limit)
                self.result = "ok" if status == 0 else f"FAILED with status {status}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
                process.wait()
                self.result = f"FAILED: not done after {limit:.0f} s"
        self.seconds = time.monotonic() - start
        text = log.read_text(errors="replace")
        if "Device not supported" in text and "sanitizer" in self.name:
            self.result = "not run: compute-sanitizer does not support this device"
        print("\n".join(f"    {line}" for line in text.splitlines()[-8 if self.result == "ok" else -60 :]), flush=True)


def steps(folder: Path, results: Path) -> list[Step]:
    """What is done, in this order."""
    python = sys.executable
    cli = [python, "-m", "fishleg_ext.cli"]
    install = ["pip", "install", "--editable", ".", "--no-build-isolation", "--no-deps"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    memcheck = ["memcheck", "--report-api-errors", "no"]  # torch and Triton may try calls that fail
    small = [python, str(Path(__file__).resolve()), "--small-calls"]
    # Each tensor is an allocation of its own, so that accesses beyond it are seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("build", [python, "-m", *install], 180, {"FISHLEG_EXT_CUDA": "1"}),
        Step("info", [*cli, "info"], 60),
        Step("check", [*cli, "check", "--json", str(folder / "check.json")], 120),
        Step("tests", [python, "-m", "pytest", "-m", "gpu or triton or cuda", "-rs"], 150),
        Step("sanitizer-memcheck", [*sanitizer, *memcheck, *small], 90, uncached),
        Step("sanitizer-racecheck", [*sanitizer, "racecheck", *small], 120, uncached),
        Step("bench", [*cli, "bench", "--results", str(results)], 300),
    ]


def small_calls() -> int:
    """Run the kernels on small problems, for a sanitizer to watch; returns how many calls there were."""
    import torch

    from fishleg_ext.ops.dispatch import OPS
    from fishleg_ext.testing import cases, check

    calls = 0
    for op in OPS.values():
        for impl in op.kernels:
            if op.unavailable(impl) is not None:
                continue
            for case in cases.CASES[op.name](cases.Inputs(torch.float32, check.device_of(impl), 0)):
                if case.numel <= SMALL and op.supports(impl, *case.args, **case.kwargs)[0]:
                    op.launcher(impl)(*case.args, **case.kwargs)
                    calls += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{calls} calls")
    return calls


def main() -> int:
    """Run all steps; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-results", help="of the steps' output")
    parser.add_argument("--without-gpu", action="store_true", help="go on where torch sees no GPU, to try this command")
    parser.add_argument("--small-calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.small_calls:
        return 0 if small_calls() else 1
    try:
        import torch
    except ImportError as error:
        sys.exit(f"{sys.executable} has no torch ({error}); name another Python: make gpu PYTHON=...")
    if not torch.cuda.is_available() and not arguments.without_gpu:
        sys.exit(f"torch {torch.__version__} of {sys.executable} sees no GPU; name another Python: make gpu PYTHON=...")

    # cmake and ninja may lie beside this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"])
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + MOST_SECONDS
    results = RESULTS if torch.cuda.is_available() else folder
    done = steps(folder, results)
    for step in done:
        step.run(folder, deadline)
        if step.name == "check" and step.result == "ok" and (why := missing(folder / "check.json")):
            step.result = f"FAILED: these kernels cannot run here: {why}"
        if step.name == "build" and step.result != "ok":
            break

    print(f"\n{'step':<22}{'seconds':>8}  result")
    for step in done:
        print(f"{step.name:<22}{step.seconds:>8.1f}  {step.result}")
    print(f"wrote {write_summary(done, folder, results)}")
    return 1 if any(step.result.startswith("FAILED") for step in done) else 0


def missing(checked: Path) -> str | None:
    """Which kernels `fishleg-ext check` could not run, or None where all have run."""
    rows = json.loads(checked.read_text()) if checked.exists() else []
    ran = {(row["impl"], row["op"]) for row in rows if row["cases"]}  # in one dtype at least
    idle = {(row["impl"], row["op"]): row["reason"] for row in rows if (row["impl"], row["op"]) not in ran}
    names = [f"{impl} of {op}: {reason}" for (impl, op), reason in idle.items()]
    return "; ".join(names) if names or not rows else None


def write_summary(done: list[Step], folder: Path, results: Path) -> Path:
    """Steps, checks and, from a new process that finds what has just been built, versions; as JSON."""
    summary = {"steps": [asdict(step) for step in done]}
    if (checked := folder / "check.json").exists():
        summary["check"] = json.loads(checked.read_text())
    command = [sys.executable, "-m", "fishleg_ext.bench.harness"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        summary["environment"] = json.loads(asked.stdout)
    target = results / f"gpu_{summary.get('environment', {}).get('slug', 'unknown')}.json"
    target.write_text(json.dumps(summary, indent=1) + "\n")
    return target


if __name__ == "__main__":
    sys.exit(main())
