"""Prunes ResNet-20 on CIFAR-10 by every method, without fine-tuning: accuracy, time of each stage, peak memory.

    python bench/studies/resnet20.py --data DIR [--parts one table models ...]

DIR holds `models/resnet20_cifar10.pt` (a state dict of the ResNet-20 of He et al. 2016, option A shortcuts) and
`cifar10/` (lossless sheets of 100 x 100 images and JSON labels). Gradients are of training images k * num_grads
onwards for draw k; accuracies are of all 10,000 test images, but of the last 10,000 training images where a default is
chosen. Prints the tables and writes the numbers as JSON.
"""

import argparse
import copy
import json
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F
from tqdm.auto import tqdm

from fishleg_ext import Pruner, PruneResult
from fishleg_ext.bench.studies.cifar10 import WEIGHTS, Cifar10, ResNet20
from fishleg_ext.curvature import Kronecker
from fishleg_ext.observation.batchnorm import recalibrate_batchnorm
from fishleg_ext.pruning.compensation import exact_update

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
EXACT = {"curvature": "block", "saliency": "exact", "block_size": 128, "damping": 1e-5}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"curvature": "identity"},
    "diagonal Fisher": {"curvature": "diagonal"},
    "oBERT/WoodFisher, B=50, 1e-3": {"saliency": "simultaneous", "block_size": 50, "damping": 1e-3},
    "oBERT/WoodFisher, B=128, 1e-3": {"saliency": "simultaneous", "block_size": 128, "damping": 1e-3},
    "oBERT/WoodFisher, B=128, 1e-5": {"saliency": "simultaneous", "block_size": 128, "damping": 1e-5},
    "M-FAC, full matrix, 1e-5": {"curvature": "low_rank", "damping": 1e-5},
    "exact greedy, B=50, 1e-5": EXACT | {"block_size": 50},
    "exact greedy, B=128, 1e-5": EXACT,
}
LAYERWISE: dict[str, dict[str, Any]] = {
    "block": EXACT,
    "block, every layer alike": EXACT | {"scope": "layer"},
    "layerwise, every layer alike (OBC)": {"curvature": "layerwise"},
    "layerwise, fixed order, every layer alike (SparseGPT)": {"curvature": "layerwise", "saliency": "fixed_order"},
    "layerwise, one threshold": {"curvature": "layerwise", "scope": "global"},
    "counts by block, then layerwise": {"curvature": "layerwise", "allocation": "block"},
    "counts by block, then layerwise in fixed order": {
        "curvature": "layerwise",
        "allocation": "block",
        "saliency": "fixed_order",
    },
    "counts by layerwise, then block": EXACT | {"allocation": "layerwise"},
    "mask by block, compensation layerwise": {"chooser": EXACT, "mover": {"curvature": "layerwise"}},
    "mask by layerwise, compensation by block": {"chooser": {"curvature": "layerwise"}, "mover": EXACT},
}
IN_ROUNDS = (
    "counts by block, then layerwise",
    "layerwise, every layer alike (OBC)",
    "block",
    "counts by layerwise, then block",
    "mask by block, compensation layerwise",
    "mask by layerwise, compensation by block",
)
LAYERWISE_SPARSITIES = (0.8, 0.85, 0.9, 0.95)
LAYERWISE_DAMPING = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
MODELS: dict[str, dict[str, Any]] = {
    "magnitude": {"curvature": "identity"},
    "diagonal": {"curvature": "diagonal", "labels": "model"},
    "block, simultaneous": {"saliency": "simultaneous", "damping": 1e-3},
    "M-FAC": {"curvature": "low_rank"},
    "block, labels of the data": {"curvature": "block"},
    "block": {"curvature": "block", "labels": "model"},
    "K-FAC": {"curvature": "kronecker"},
    "Kronecker factors of gradients": {"curvature": Kronecker(factors="gradients")},
    "layerwise (OBC)": {"curvature": "layerwise"},
    "counts by block, then layerwise": {"curvature": "layerwise", "allocation": "block"},
    "counts by FishLeg, then layerwise": {"curvature": "layerwise", "allocation": "fishleg"},
    "FishLeg": {"curvature": "fishleg"},
}
MODELS_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
ROUNDS = 8
ROUNDS_DAMPING = (1e-5, 1e-4)
FINAL_SPARSITY = 0.95


def reset_peak_memory() -> None:
    """Start a new measurement of the peak resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """MiB of resident memory at its highest since `reset_peak_memory`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Bench:
    """Runs prunings of the dense network and collects a record of each."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.cifar = Cifar10(arguments.data / "cifar10")
        self.dense = ResNet20()
        state = torch.load(arguments.data / "models" / "resnet20_cifar10.pt", weights_only=True)
        self.dense.load_state_dict(state)
        self.records: list[dict[str, Any]] = []
        self.machine = machine()  # the commit of now, whatever is committed by the time that results are written
        # Before anything is timed: the first call of each op pays for threads and libraries.
        warm_up = copy.deepcopy(self.dense)
        pruner = Pruner(warm_up, params=WEIGHTS, num_grads=64, progress=False)
        pruner.estimate(self.cifar.training_batches(0, 64), F.cross_entropy)
        pruner.prune_to(0.5)

    def prune(
        self,
        name: str,
        sparsities: list[float],
        draw: int = 0,
        *,
        held_out: bool = False,
        last_only: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Prune the dense network to one sparsity after another and measure it after each, or after the last."""
        num_grads = self.arguments.num_grads
        data = self.cifar.training_batches(draw * num_grads, num_grads)
        model = copy.deepcopy(self.dense).eval()
        shared = {"params": WEIGHTS, "num_grads": num_grads, "progress": self.arguments.progress}
        mover = options.pop("mover", None)
        pruner = Pruner(model, **shared, **options.pop("chooser", options))
        records = []
        for sparsity in sparsities:
            reset_peak_memory()
            start = time.perf_counter()
            pruner.estimate(data, F.cross_entropy)
            if mover is not None:
                moving = Pruner(model, **shared, **mover)
                moving.estimate(data, F.cross_entropy)
                before = {name: weight.detach().clone() for name, weight in pruner.weights.items()}
            result = pruner.prune_to(sparsity)
            if mover is not None:
                with torch.no_grad():
                    for weight_name, moved in exact_update(moving.curvature, before, result.masks).items():
                        pruner.weights[weight_name].copy_(moved)
            seconds = time.perf_counter() - start
            if last_only and sparsity != sparsities[-1]:
                continue
            record = self._record(name, draw, result, seconds) | {"accuracy": self.cifar.accuracy(model, held_out)}
            recalibrate_batchnorm(copied := copy.deepcopy(model), data)
            record["accuracy_recalibrated"] = self.cifar.accuracy(copied, held_out)
            records.append(record)
        self.records += records
        return records

    def one_shots(
        self, name: str, sparsities: Iterable[float], draw: int, *, held_out: bool = False, **options: Any
    ) -> list[dict[str, Any]]:
        """Prune the dense network to each sparsity, all by one estimate of its curvature, and measure it."""
        num_grads = self.arguments.num_grads
        options |= {"params": WEIGHTS, "num_grads": num_grads, "progress": self.arguments.progress}
        reset_peak_memory()
        start = time.perf_counter()
        pruner = Pruner(copy.deepcopy(self.dense).eval(), **options)
        pruner.estimate(self.cifar.training_batches(draw * num_grads, num_grads), F.cross_entropy)
        estimating, state = time.perf_counter() - start, pruner.state_dict()
        records = []
        for sparsity in sparsities:
            start = time.perf_counter()
            pruner = Pruner(model := copy.deepcopy(self.dense).eval(), **options)
            pruner.load_state_dict(state)
            result = pruner.prune_to(sparsity)
            record = self._record(name, draw, result, estimating + time.perf_counter() - start)
            records.append(
                record | {"seconds_estimating": estimating, "accuracy": self.cifar.accuracy(model, held_out)}
            )
        self.records += records
        return records

    def _record(self, name: str, draw: int, result: PruneResult, seconds: float) -> dict[str, Any]:
        return {
            "method": name,
            "draw": draw,
            "sparsity": result.sparsity,
            "seconds": seconds,
            "stages": result.history[-1]["seconds"],
            "peak_mib": peak_memory(),
            "predicted_loss_increase": result.predicted_loss_increase,
        }

    def one(self) -> None:
        """Exact greedy at 80 %, in one shot."""
        rows = []
        for draw in range(self.arguments.draws):
            (record,) = self.prune("exact greedy, B=128, 1e-5", [0.8], draw, **EXACT)
            rows.append([draw, record["accuracy"], *self._costs(record)])
        print(f"\nexact greedy, B=128, damping 1e-5, {self.arguments.num_grads} gradients, 80 %")
        print(tabulate(rows, ["draw", "accuracy, %", *COSTS], floatfmt=".2f"))

    def rounds(self) -> None:
        """Exact greedy to 95 % in eight rounds, density falling geometrically."""
        steps = [1 - (1 - FINAL_SPARSITY) ** (k / ROUNDS) for k in range(1, ROUNDS + 1)]
        for damping in ROUNDS_DAMPING:
            options = EXACT | {"damping": damping}
            runs = [
                self.prune(f"exact greedy, B=128, {damping:.0e}, 8 rounds", steps, draw, **options)
                for draw in range(self.arguments.draws)
            ]
            rows = []
            for i, records in enumerate(zip(*runs, strict=True)):
                accuracies = [record["accuracy"] for record in records]
                rows.append([i + 1, f"{records[0]['sparsity']:.1%}", *accuracies, *self._costs(records[0])])
            print(f"\nexact greedy, B=128, damping {damping:.0e}, {self.arguments.num_grads} gradients a round")
            draws = [f"draw {draw}, %" for draw in range(len(runs))]
            print(tabulate(rows, ["round", "sparsity", *draws, *COSTS], floatfmt=".2f"))

    def table(self) -> None:
        """Every method at every sparsity, each from the dense network."""
        rows = []
        for name, options in tqdm(METHODS.items(), desc="methods", leave=False, disable=None):
            records = [self.prune(name, [sparsity], **options)[0] for sparsity in SPARSITIES]
            rows.append([name, *(r["accuracy"] for r in records), *self._costs(records[-1])])
        print(f"\ntest accuracy, %; times and memory of the last column; dense {self.cifar.accuracy(self.dense):.2f}")
        print(tabulate(rows, ["", *(f"{s:.0%}" for s in SPARSITIES), *COSTS], floatfmt=".2f"))

    def layerwise(self) -> None:
        """Every mixture of block Fisher and layerwise curvature, in one shot and in rounds."""
        rows = []
        for rounds in self.arguments.rounds:
            methods = {name: LAYERWISE[name] for name in (LAYERWISE if rounds == 1 else IN_ROUNDS)}
            chosen = list(self._chosen(methods))
            for name, options in tqdm(chosen, desc=f"mixtures, {rounds} rounds", leave=False, disable=None):
                row, seconds = [name, rounds], []
                for sparsity in LAYERWISE_SPARSITIES:
                    steps = [1 - (1 - sparsity) ** (k / rounds) for k in range(1, rounds + 1)]
                    record = self.prune(f"{name}, {rounds} rounds", steps, last_only=True, **options)[-1]
                    row.append(f"{record['accuracy']:.2f} / {record['accuracy_recalibrated']:.2f}")
                    seconds.append(record["seconds"])
                rows.append([*row, max(seconds)])
                self.write()
        print("\ntest accuracy, %, without recalibration / with BatchNorm recalibrated; most seconds of a round")
        columns = ["", "rounds", *(f"{s:.0%}" for s in LAYERWISE_SPARSITIES), "s"]
        print(tabulate(rows, columns, floatfmt=".1f", tablefmt="github"))

    def damping(self) -> None:
        """Layerwise curvature at every damping, judged on training images that no estimate has seen."""
        rows = []
        for name in ("layerwise, every layer alike (OBC)", "counts by block, then layerwise"):
            for damping in LAYERWISE_DAMPING:
                row = [name, damping]
                for sparsity in LAYERWISE_SPARSITIES[::2]:
                    options = LAYERWISE[name] | {"damping": damping}
                    (record,) = self.prune(f"{name}, {damping:.0e}, held out", [sparsity], held_out=True, **options)
                    row += [record["accuracy"], record["accuracy_recalibrated"]]
                rows.append(row)
                self.write()
        print("\naccuracy on held-out training images, %")
        names = [f"{s:.0%}{how}" for s in LAYERWISE_SPARSITIES[::2] for how in ("", ", recalibrated")]
        print(tabulate(rows, ["", "damping", *names], floatfmt=("", ".0e", *[".2f"] * 4), tablefmt="github"))

    def models(self) -> None:
        """Every curvature model at every sparsity in one shot, all with the same images."""
        rows = []
        for name, options in self._chosen(MODELS):
            runs = []
            for draw in range(self.arguments.draws):
                runs.append(self.one_shots(f"{name}, side by side", MODELS_SPARSITIES, draw, **options))
                self.write()
            row: list[Any] = [name]
            for records in zip(*runs, strict=True):
                accuracies = [r["accuracy"] for r in records]
                row.append(f"{np.mean(accuracies):.1f} ± {np.std(accuracies):.1f}")
            rows.append(row)
            print(tabulate(rows[-1:], tablefmt="plain"), flush=True)
        print(f"\ntest accuracy, %, mean and standard deviation of {self.arguments.draws} draws")
        print(tabulate(rows, ["", *(f"{s:.0%}" for s in MODELS_SPARSITIES)], tablefmt="github"))

    def _chosen(self, methods: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        return ((name, method) for name, method in methods.items() if re.search(self.arguments.only, name))

    def write(self) -> None:
        """All records so far, as JSON."""
        report = self.machine | {"num_grads": self.arguments.num_grads, "runs": self.records}
        self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
        self.arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    @staticmethod
    def _costs(record: dict[str, Any]) -> list[float]:
        stages = record["stages"]
        return [record["seconds"], *(stages.get(stage, 0.0) for stage in STAGES), record["peak_mib"]]


STAGES = ("allocation", "observation", "saliency", "selection", "compensation")
COSTS = ("total, s", *(f"{stage}, s" for stage in STAGES), "peak MiB")


def machine() -> dict[str, Any]:
    """Describe what the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def run(kind: type[Bench], parts: tuple[str, ...], description: str | None) -> None:
    """Run the parts of a bench that are chosen on the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and cifar10/")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--rounds", nargs="+", type=int, default=(1, ROUNDS), help="of layerwise; default: 1 and 8")
    parser.add_argument("--draws", type=int, default=1, help="samples of gradients; not for table, layerwise, damping")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "resnet20_cifar10.json")
    parser.add_argument(
        "--only", default="", help="expression for the names of methods in fishleg, models, layerwise, carried"
    )
    parser.add_argument("--progress", action="store_true", help="progress bars of each pruning too")
    arguments = parser.parse_args()
    bench = kind(arguments)
    for part in arguments.parts:
        getattr(bench, part)()
    bench.write()
    print(f"\nwrote {arguments.out}")


if __name__ == "__main__":
    run(Bench, ("one", "rounds", "table", "layerwise", "damping", "models"), __doc__)
