"""What bench/gpu.sh asks Python: small problems for a sanitizer, kernels that could not run, and the summary."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).resolve().parent / "results"
SMALL = 30_000  # elements of all arguments of a call, where a sanitizer watches it


def seen() -> str | None:
    """Why torch sees no GPU, or None if it does."""
    import torch

    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} of {sys.executable} sees no GPU; name another Python: make gpu PYTHON=..."


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
            print(f"{impl} of {op.name}", flush=True)
            for case in cases.CASES[op.name](cases.Inputs(torch.float32, check.device_of(impl), 0)):
                if case.numel <= SMALL and op.supports(impl, *case.args, **case.kwargs)[0]:
                    op.launcher(impl)(*case.args, **case.kwargs)
                    calls += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return calls


def missing(checked: Path) -> str | None:
    """Which kernels `fishleg-ext check` could not run, or None where all have run."""
    from fishleg_ext.ops.dispatch import OPS

    rows = json.loads(checked.read_text()) if checked.exists() else []
    rows = [row for row in rows if row["impl"] in OPS[row["op"]].kernels]
    ran = {(row["impl"], row["op"]) for row in rows if row["cases"]}  # in one dtype at least
    idle = {(row["impl"], row["op"]): row["reason"] for row in rows if (row["impl"], row["op"]) not in ran}
    names = [f"{impl} of {op}: {reason}" for (impl, op), reason in idle.items()]
    return "; ".join(names) or (None if rows else f"{checked} has no results of kernels")


def write_summary(folder: Path, results: Path) -> tuple[Path, list[list[str]]]:
    """Write steps, checks and versions as JSON, over what an earlier run wrote of the same steps and checks.

    Returns:
        the file, and name, seconds and result of each step of this run.
    """
    from fishleg_ext.bench import harness

    steps = [line.split("\t") for line in (folder / "steps.txt").read_text().splitlines()]
    target = results / f"gpu_{harness.device_slug()}.json"
    before = json.loads(target.read_text()) if target.exists() else {"steps": [], "check": []}
    commit = {"commit": harness.environment()["commit"]}
    found = {step["name"]: step for step in before["steps"]}
    for name, seconds, result in steps:
        found[name] = {"name": name, "seconds": seconds, "result": result, "said": last_line(folder, name)} | commit
    checked = {_key(row): row for row in before["check"]}
    for file in sorted(folder.glob("check*.json")):
        checked |= {_key(row): row | commit for row in json.loads(file.read_text())}
    summary = {
        "steps": list(found.values()),
        "check": list(checked.values()),
        "environment": harness.environment(),
    }
    target.write_text(json.dumps(summary, indent=1) + "\n")
    return target, steps


def last_line(folder: Path, step: str) -> str:
    """Return the last line that a step printed, such as how many tests passed."""
    log = folder / f"{step}.log"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["impl"], row["dtype"]


def main() -> int:
    """Answer one question; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--seen", action="store_true", help="fail where torch sees no GPU")
    asked.add_argument("--small-calls", action="store_true", help="run the kernels on small problems")
    asked.add_argument("--missing", type=Path, metavar="CHECK.json", help="fail where a kernel could not run")
    asked.add_argument("--summary", type=Path, metavar="FOLDER", help="print the table of steps, and write it")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the summary")
    arguments = parser.parse_args()
    if arguments.seen or arguments.missing:
        why = seen() if arguments.seen else missing(arguments.missing)
        if why:
            print(why, file=sys.stderr)
        return 1 if why else 0
    if arguments.small_calls:
        calls = small_calls()
        print(f"{calls} calls")
        return 0 if calls else 1
    target, steps = write_summary(arguments.summary, arguments.results)
    print(tabulate(steps, headers=["step", "seconds", "result"]))
    print(f"wrote {target}")
    return 1 if any(result.startswith("FAILED") for *_, result in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
