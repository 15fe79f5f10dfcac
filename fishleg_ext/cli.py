"""The command line: `fishleg-ext info | check | bench | demo | prune`."""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fishleg_ext
from fishleg_ext import checkpoint, cpu, cuda
from fishleg_ext.common.build import build_record
from fishleg_ext.config import PruneConfig
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.sparsity.masks import pack_masks


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where a check failed, 2 for wrong arguments or input."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"fishleg-ext: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fishleg-ext",
        description="Prune neural networks by second-order information, and check and time the kernels that do it. "
        "Quantization, training and what is more of the Python interface is not here: see the README.",
    )
    parser.add_argument("--version", action="version", version=fishleg_ext.__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, GPU, and which implementation each op has here")
    info.set_defaults(run=_info)

    check = commands.add_parser(
        "check",
        help="compare every implementation of every op with float64 on this machine",
        description="Compare every implementation of every op that runs here with the reference in float64, over odd "
        "shapes, views, ties, zeros, NaN, dead weights and condition numbers up to 1e7. Exit status 1 where one is "
        "further off than its budget, or nothing could be checked. With "
        "TRITON_INTERPRET=1 in the environment Triton kernels run on the CPU.",
    )
    check.add_argument("ops", nargs="*", metavar="OP", help="or a family, such as obs; default: all")
    check.add_argument(
        "--impl", action="append", choices=("reference", "triton", "cuda", "cpu"), help="default: all that there are"
    )
    check.add_argument("--seed", type=int, default=0, help="of the inputs")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file, too")
    check.set_defaults(run=_check)

    bench = commands.add_parser(
        "bench",
        help="time the ops on this machine, beside the usual PyTorch code and the floor",
        description="Time the ops on the GPU, or where there is none on the CPU, beside the usual PyTorch code and "
        "what the device could do at best. Writes JSON lines and prints the tables made from them.",
    )
    bench.add_argument("families", nargs="*", metavar="FAMILY", help="of ops, such as masks or obs; default: all")
    bench.add_argument(
        "--results",
        type=Path,
        default=Path("bench/results"),
        help="folder of the JSON lines, whose last results of this device are replaced (default: %(default)s)",
    )
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw time over floor into this picture")
    bench.add_argument("--only-report", action="store_true", help="measure nothing; tables of the results there are")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="train a small network, prune it by seven methods, draw the curves")
    demo.add_argument("--out", type=Path, default=Path("demo-results"), help="folder of the results")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    prune = commands.add_parser(
        "prune",
        allow_abbrev=False,
        help="prune a model of your own",
        description="Prune a model made by a function of yours on data from another. "
        "MODULE is looked for in the current folder first.",
    )
    prune.add_argument("model", metavar="MODULE:FUNCTION", help="() -> nn.Module")
    prune.add_argument("data", metavar="MODULE:FUNCTION", help="() -> iterable of (inputs, targets) batches")
    prune.add_argument("--checkpoint", type=Path, help="a state dict, or an earlier --out, to load first")
    prune.add_argument(
        "--dry-run", action="store_true", help="with --block-by-block: print time and memory of each block"
    )
    prune.add_argument(
        "--out", type=Path, help='file for {"model": pruned state dict, "masks": packed}; required without --dry-run'
    )
    prune.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION|none",
        help="(outputs, targets) -> scalar; default cross entropy; none is the loss that the model itself returns",
    )
    prune.add_argument("--evaluate", metavar="MODULE:FUNCTION", help="model -> number, shown before and after")
    for field in dataclasses.fields(PruneConfig):
        _add_setting(prune, field)
    prune.set_defaults(run=_prune)
    return parser


def _add_setting(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]") -> None:
    """Add the option of one setting, made from its default, type and help."""
    option, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
    how: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
    kind = field.metadata.get("plain") or str(field.type).partition(" ")[0].strip("<>'")
    if field.name == "progress":
        parser.add_argument("--quiet", **how | {"help": "no progress bars"}, action="store_false")
    elif field.type is bool:
        parser.add_argument(option, **how, action="store_true")
    elif kind == "optional":
        parser.add_argument(option, **how, action="store_true")
        how["help"] = f"the same with the name of what {option} else finds"
        parser.add_argument(f"{option}-of", **how, metavar="NAME")
    elif kind == "share":
        parser.add_argument(option, **how, action="store_true")
        how["help"] = f"the same with a number, in [0, 1]; {option} finds one"
        parser.add_argument(f"{option}-share", **how, type=float, metavar="SHARE")
    elif kind == "list":
        parser.add_argument(option, **how, action="append", metavar="NAME")
    elif kind == "scope":
        parser.add_argument(option, **how, type=_scope, metavar="global|flops|layer|row|NAME=SPARSITY,...")
    else:
        types: dict[Any, Callable[[str], Any]] = {"int": int, "float": float}
        name = types.get(kind, types.get(getattr(field.type, "__name__", ""), str))
        parser.add_argument(option, **how, type=name, choices=field.metadata.get("choices"))


def _scope(text: str) -> str | dict[str, float]:
    """A scope by name, or the sparsities of "name=sparsity,name=sparsity"."""
    if "=" not in text:
        return text
    try:
        pairs = (part.rpartition("=") for part in text.split(","))
        return {name.strip(): float(sparsity) for name, _, sparsity in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=SPARSITY,NAME=SPARSITY, got {text!r}") from None


def _info(arguments: argparse.Namespace) -> int:
    print(
        f"fishleg_ext {fishleg_ext.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {_version('triton')}"
    )
    print(f"GPU: {_gpu()}")
    print(f"CUDA part: {_cuda_part()}")
    print(f"CPU kernels in C++: {cpu.not_loaded() or build_record()['cpu']['reason']}")
    rows = []
    for name, op in OPS.items():
        reasons = {impl: op.unavailable(impl) for impl in op.kernels}
        here = [impl for impl, reason in reasons.items() if reason is None]
        why = [f"{impl}: {reason}" for impl, reason in reasons.items() if reason]
        rows.append([name, ", ".join([*here, "reference"]), "; ".join(why)])
    print("\n" + tabulate(rows, ["op", "runs here, fastest first", "why not more"], tablefmt="plain"))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from fishleg_ext.testing.check import check, device_of, ops_named

    names = ops_named(arguments.ops or None)
    if arguments.json and not arguments.json.parent.is_dir():
        raise OSError(f"the folder of --json, {arguments.json.parent}, does not exist")
    print(f"torch {torch.__version__}, triton {_version('triton')}, GPU: {_gpu()}; seed {arguments.seed}")
    print("error: the largest relative error against float64, in the case that used most of its budget; condition")
    print("numbers go up to 1e7, where single precision has hardly a digit left\n")
    print("op                   implementation        dtype     cases    error   budget   result")
    rows = []
    for row in check(names, arguments.impl, seed=arguments.seed):
        rows.append(row)
        on_cpu = row.dtype and device_of(row.impl).type == "cpu"
        impl = "triton (interpreter)" if row.impl == "triton" and on_cpu else row.impl
        label = f"{row.op:<20} {impl:<21} {row.dtype:<9}"
        if not (row.cases or row.failures):
            print(f"{label}     -        -        -   not run: {row.reason}")
            continue
        result = "ok" if not row.failures else "FAILED"
        note = f"; some cases left out: {row.reason}" if row.reason else ""
        print(f"{label} {row.cases:>5} {row.error:>8.1e} {row.budget:>8.1e}   {result}{note}", flush=True)
        for failure in row.failures:
            print(f"    {failure}")
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    if failures := sum(len(row.failures) for row in rows):
        print(f"\n{failures} cases failed")
        return 1
    if not any(row.cases for row in rows):
        print("\nnothing was checked")
        return 1
    unseen = sorted({f"{row.impl} of {row.op} {row.dtype}".rstrip() for row in rows if not row.cases})
    print(f"\nall that ran is within its budget{'; not run: ' if unseen else ''}{', '.join(unseen)}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return "none; this torch is built for the CPU alone"
    return "none that torch can use"


def _cuda_part() -> str:
    """Say what the compiled libraries were built with, or why they are not here."""
    try:
        _build = importlib.import_module("fishleg_ext._build")
    except ImportError as error:
        record = build_record()["cuda"]
        return (
            f"{record['reason']}, but it does not load: {error}"
            if record["built"]
            else f"not built: {record['reason']}"
        )
    built = f"built with toolkit {_build.cuda_toolkit}, architectures {_build.architectures}, {_build.compiler}"
    return f"{built}; {reason}" if (reason := cuda.not_loaded()) else built


def _bench(arguments: argparse.Namespace) -> int:
    try:
        from fishleg_ext.bench import report
    except ImportError as error:
        raise ImportError(f"the benchmarks need extra packages: pip install 'fishleg_ext[bench]' ({error})") from error
    folder = Path(report.__file__).parent
    known = sorted(file.stem.removeprefix("bench_") for file in folder.glob("bench_*.py"))
    families = arguments.families or known
    if unknown := sorted(set(families) - set(known)):
        raise ValueError(f"there is no benchmark of {', '.join(unknown)}; there are {', '.join(known)}")
    status = 0
    if not arguments.only_report:
        files = [str(folder / f"bench_{family}.py") for family in families]
        command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "-rs", *files]
        status = subprocess.run([*command, "--results", str(arguments.results.resolve())], check=False).returncode
    results = sorted(file for family in families for file in arguments.results.glob(f"{family}_*.jsonl"))
    if not results:
        raise ValueError(f"there are no results of {', '.join(families)} in {arguments.results}")
    lines = report.read(results)
    print(report.table(lines))
    if arguments.plot:
        report.plot(lines, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 1 if status else 0


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from fishleg_ext import demo
    except ImportError as error:
        raise ImportError(f"the demo needs its extra packages: pip install 'fishleg_ext[demo]' ({error})") from error
    demo.run(arguments.out, seed=arguments.seed)
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    sys.path.insert(0, os.getcwd())
    model = _load(arguments.model)()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected {arguments.model} to return an nn.Module, got {type(model).__name__}")
    if arguments.checkpoint is not None:
        model.load_state_dict(_read_checkpoint(arguments.checkpoint))
    if not arguments.dry_run:
        _check_out(arguments.out)
    evaluate = torch.no_grad()(_load(arguments.evaluate)) if arguments.evaluate else None
    loss_fn: LossFunction | None = torch.nn.functional.cross_entropy
    if arguments.loss:
        loss_fn = None if arguments.loss == "none" else _load(arguments.loss, loss=True)
    data = _load(arguments.data)()
    before = float(evaluate(model)) if evaluate and not arguments.dry_run else None
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(PruneConfig) if hasattr(arguments, f.name)}
    config = PruneConfig(**given)
    if arguments.dry_run:
        print(fishleg_ext.plan(model, data, loss_fn, **vars(config)).table())
        return 0
    result = fishleg_ext.prune(model, data, loss_fn, **vars(config))

    after = float(evaluate(model)) if evaluate else None

    print(result.table())
    print(f"predicted loss increase {result.predicted_loss_increase:.4g}")
    if result.divergence is not None:
        ratio = result.divergence_ratio
        times = "" if ratio is None else f", {ratio:.3g} times as much"
        print(f"divergence from the dense network {result.divergence:.4g}{times}")
    if evaluate:
        print(f"{arguments.evaluate}: {before} before, {after} after")
    checkpoint.save({"model": model.state_dict(), "masks": pack_masks(result.masks)}, arguments.out)
    report = {
        "model": arguments.model,
        "data": arguments.data,
        "checkpoint": arguments.checkpoint and str(arguments.checkpoint),
        "options": config.to_dict(),
        "sparsity": result.sparsity,
        "divergence": result.divergence,
        "evaluation": {"before": before, "after": after} if evaluate else None,
        "history": result.history,
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.json')}")
    return 0


def _check_out(out: Path | None) -> None:
    """Raise an error where a pruned model cannot be written to this file."""
    if out is None:
        raise ValueError(
            "--out is required, the file that the pruned model is written to; without it there is --dry-run"
        )
    if out.suffix == ".json":
        raise ValueError(f"--out {out} would be overwritten by the report of that name; use another suffix")
    if out.suffix == ".safetensors":
        raise ValueError(f"--out {out} would be a file of torch.save, which has masks, too; use another suffix")
    if out.is_dir():
        raise OSError(f"expected --out to be a file, {out} is a folder")
    if not out.parent.is_dir():
        raise OSError(f"the folder of --out, {out.parent}, does not exist")


def _load(spec: str, *, loss: bool = False) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, colon, function = spec.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"expected MODULE:FUNCTION{', or none' if loss else ''}, got {spec!r}")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"module {module} has no function {function}")
    return found


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The state dict in a file."""
    if not path.is_file():
        raise OSError(f"the file of --checkpoint, {path}, does not exist")
    state = checkpoint.load(path)
    if not isinstance(state, dict):
        raise ValueError(f"expected {path} to hold a state dict, got {type(state).__name__}")
    return state["model"] if state.keys() == {"model", "masks"} else state  # what this command wrote itself


if __name__ == "__main__":
    sys.exit(main())
