"""Prunes ResNet-20 on CIFAR-10 by every method, without fine-tuning: accuracy, time of each stage, peak memory.

    python bench/studies/resnet20.py --data DIR [--parts one table models ...]

DIR holds `models/resnet20_cifar10.pt` (a state dict of the ResNet-20 of He et al. 2016, option A shortcuts) and
`cifar10/` (lossless sheets of 100 x 100 images and JSON labels). Gradients are of training images k * num_grads
onwards for draw k; accuracies are of all 10,000 test images, but of the last 10,000 training images where a default is
chosen. Prints the tables and writes the numbers as JSON.
"""

import argparse
import copy
import functools
import json
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fishleg_ext import Pruner, PruneResult
from fishleg_ext.curvature import Adam, Estimate, FishLeg, Kronecker
from fishleg_ext.curvature.kronecker import Factors
from fishleg_ext.observation.batchnorm import recalibrate_batchnorm
from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.types import Observation
from fishleg_ext.pruning.compensation import exact_update

WEIGHTS = r"re:(conv\d|linear)\.weight$"
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
ADAM: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, a tenth of the rate": {"learning_rate": 0.002},
    "log-determinant": {"loss": "log_determinant"},
    "8 Gaussian probes": {"probes": "gaussian", "num_probes": 8},
    "8 gradient probes": {"probes": "gradients", "num_probes": 8},
    "8 gradient probes, not preconditioned": {"probes": "gradients", "num_probes": 8, "preconditioned": False},
    "a Gaussian probe, Gauss-Newton products": {"probes": "gaussian", "products": "gauss_newton"},
}
# One change at a time from two passes in batches of 128, beside the defaults.
TWO_PASSES = {"passes": 2, "batch_size": 128}
FISHLEG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "2 passes, batches of 128": (TWO_PASSES, {}),
    **{f"damping {damping:.0e}": (TWO_PASSES | {"damping": damping}, {}) for damping in (1e-7, 1e-5, 1e-4)},
    **{f"{passes} passes": (TWO_PASSES | {"passes": passes}, {}) for passes in (1, 3)},
    **{f"batches of {size}": (TWO_PASSES | {"batch_size": size}, {}) for size in (64, 256)},
    "structure kronecker": (TWO_PASSES | {"structure": "kronecker"}, {}),
    "labels of the data": (TWO_PASSES, {"labels": "data"}),
    # The 24 batches after the 8 that are learned by turns.
    **{f"Adam, {name}": ({"adam": Adam(steps=24, **how)}, {}) for name, how in ADAM.items()},
}
FISHLEG_SPARSITIES = (0.8, 0.9, 0.95)
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
# Of rounds, images after the first and what is made of them.
CARRIED: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    "anew": (2048, lambda _: {"curvature": FishLeg()}),
    "carried over": (2048, lambda n: {"curvature": FishLeg(carry_over=n)}),
    "anew, 256 after the first": (256, lambda _: {"curvature": FishLeg()}),
    "carried over, 256 after the first": (256, lambda n: {"curvature": FishLeg(carry_over=n)}),
    "counts by FishLeg, then layerwise": (
        2048,
        lambda n: {"curvature": "layerwise", "allocation": FishLeg(carry_over=n)},
    ),
}
CARRIED_ROUNDS = 4  # measured, the last ones
HELD_OUT_AFTER = (1, 3, 5)  # rounds
HELD_OUT_AT = (64, 128, 256, 512, 1024, 2048)
ROUNDS = 8
ROUNDS_DAMPING = (1e-5, 1e-4)
FINAL_SPARSITY = 0.95


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.stride, self.padding = stride, (fan_out - fan_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The shortcut subsamples and pads channels with zeros."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, n = 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class Cifar10:
    """Normalised training and test images, read from the sheets of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train_labels = torch.tensor(json.loads((folder / "train_labels.json").read_text()))
        self.test_images = self._sheet("test.webp")
        self.test_labels = torch.tensor(json.loads((folder / "test_labels.json").read_text()))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _sheet(self, name: str) -> Tensor:
        pixels = np.asarray(Image.open(self.folder / name).convert("RGB"))
        images = pixels.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(10000, 3, 32, 32)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        return (torch.from_numpy(images.astype(np.float32)) / 255 - mean) / std

    def training_batches(self, start: int, count: int, size: int = 128) -> list[tuple[Tensor, Tensor]]:
        """Images start to start + count of the training set, in its order."""
        sheets = range(start // 10000, (start + count - 1) // 10000 + 1)
        images = torch.cat([self._sheet(f"train_{i}.webp") for i in sheets])[start - 10000 * sheets[0] :][:count]
        return list(zip(images.split(size), self.train_labels[start : start + count].split(size), strict=True))

    @torch.no_grad()
    def accuracy(self, model: nn.Module, held_out: bool = False) -> float:
        """Right answers on the test set, or on the last 10,000 training images, in percent."""
        model.eval()
        test = list(zip(self.test_images.split(500), self.test_labels.split(500), strict=True))
        batches = self.training_batches(40000, 10000, 500) if held_out else test
        right = torch.cat([model(x).argmax(1) == y for x, y in batches])
        return float(right.double().mean()) * 100


def reset_peak_memory() -> None:
    """Start a new measurement of the peak resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """MiB of resident memory at its highest since `reset_peak_memory`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Learners:
    """FishLegs that learn from the same gradients, and what they have learned after some of them."""

    observes = frozenset({"gradients"})

    def __init__(self, previous: dict[str, Estimate | None], weights: dict[str, nn.Parameter], prior: int) -> None:
        self.names, self.seen = list(weights), 0
        self.snapshots: dict[tuple[str, int], dict[str, Factors]] = {}
        values = {name: weight.detach() for name, weight in weights.items()}
        recipe = FishLeg(carry_over=prior)
        self.learners = {name: recipe.start(values, previous=before) for name, before in previous.items()}

    def update(self, observation: Observation) -> None:
        """Learn from a chunk."""
        self.seen += observation.count
        for name, learner in self.learners.items():
            learner.update(observation)
            if self.seen in HELD_OUT_AT:
                self.snapshots[name, self.seen] = {n: learner.factors(n) for n in self.names}


class HeldOut:
    """E|Q g|^2 of several Q."""

    observes = frozenset({"gradients"})

    def __init__(self, inverses: dict[Any, dict[str, Factors]]) -> None:
        self.inverses, self.count = inverses, 0
        self.squares = dict.fromkeys(inverses, 0.0)

    def update(self, observation: Observation) -> None:
        """Add a chunk."""
        self.count += observation.count
        for key, inverse in self.inverses.items():
            for name, (row, col, _) in inverse.items():
                grads = observation.gradients[name].reshape(-1, len(row), len(col))
                self.squares[key] += float((row[:, None] * (grads @ col)).square().sum(dtype=torch.float64))

    def losses(self, damping: float) -> dict[Any, float]:
        """The auxiliary loss of each, all parameters added up; of rows apart."""
        losses = {}
        for key, inverse in self.inverses.items():
            norm = sum(float(row.square().sum() * col.square().sum()) for row, col, _ in inverse.values())
            trace = sum(float(row.sum() * col.trace()) for row, col, _ in inverse.values())
            losses[key] = 0.5 * (self.squares[key] / self.count + damping * norm) - trace
        return losses


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
            for name in tqdm(
                LAYERWISE if rounds == 1 else IN_ROUNDS, desc=f"mixtures, {rounds} rounds", leave=False, disable=None
            ):
                row, seconds = [name, rounds], []
                for sparsity in LAYERWISE_SPARSITIES:
                    steps = [1 - (1 - sparsity) ** (k / rounds) for k in range(1, rounds + 1)]
                    record = self.prune(f"{name}, {rounds} rounds", steps, last_only=True, **LAYERWISE[name])[-1]
                    row.append(f"{record['accuracy']:.2f} / {record['accuracy_recalibrated']:.2f}")
                    seconds.append(record["seconds"])
                rows.append([*row, max(seconds)])
                self.write()
        print("\ntest accuracy, %, as it is / with BatchNorm recalibrated; most seconds of a round")
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

    def fishleg(self) -> None:
        """FishLeg's defaults, judged on training images that no estimate has seen."""
        rows = []
        for name, (model, options) in self._chosen(FISHLEG):
            runs = [
                self.one_shots(
                    f"FishLeg, {name}, held out",
                    FISHLEG_SPARSITIES,
                    draw,
                    held_out=True,
                    curvature=FishLeg(**model),
                    **options,
                )
                for draw in range(self.arguments.draws)
            ]
            accuracies = [np.mean([r["accuracy"] for r in records]) for records in zip(*runs, strict=True)]
            rows.append([name, *accuracies, np.mean(accuracies), runs[0][0]["seconds_estimating"]])
            print(tabulate(rows[-1:], tablefmt="plain", floatfmt=".2f"), flush=True)
            self.write()
        print(f"\naccuracy on held-out training images, %, mean of {self.arguments.draws} draws; seconds of learning")
        columns = ["", *(f"{s:.0%}" for s in FISHLEG_SPARSITIES), "mean", "s"]
        print(tabulate(rows, columns, floatfmt=".2f", tablefmt="github"))

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

    def carried(self) -> None:
        """FishLeg in rounds, anew in each or from the last one's inverse."""
        steps = [1 - (1 - FINAL_SPARSITY) ** (k / ROUNDS) for k in range(1, ROUNDS + 1)]
        rows = []
        for name, (images, options) in self._chosen(CARRIED):
            runs = []
            for draw in range(self.arguments.draws):
                runs.append(self._rounds(f"FishLeg, {ROUNDS} rounds, {name}", steps, draw, images, options))
                self.write()
            for key, what in (("accuracy", ""), ("accuracy_recalibrated", ", BatchNorm recalibrated")):
                row: list[Any] = [name + what]
                for records in zip(*runs, strict=True):
                    accuracies = [r[key] for r in records]
                    row.append(f"{np.mean(accuracies):.1f} ± {np.std(accuracies):.1f}")
                rows.append(row)
            print(tabulate(rows[-2:], tablefmt="plain"), flush=True)
        print(f"\ntest accuracy, %, mean and standard deviation of {self.arguments.draws} draws")
        columns = ["", *(f"{s:.1%}" for s in steps[-CARRIED_ROUNDS:])]
        print(tabulate(rows, columns, tablefmt="github"))

    def refinement(self) -> None:
        """The auxiliary loss on gradients of other images, by how many the inverse was learned from after a round.

        Anew, and from the last round's inverse.
        """
        num_grads = self.arguments.num_grads
        steps = [1 - (1 - FINAL_SPARSITY) ** (k / ROUNDS) for k in range(1, ROUNDS + 1)]
        data, others = (self.cifar.training_batches(start, n) for start, n in ((0, num_grads), (40000, 1024)))
        model = copy.deepcopy(self.dense).eval()
        pruner = Pruner(model, curvature=FishLeg(carry_over=num_grads), params=WEIGHTS, num_grads=num_grads)
        pruner.estimator.known_biases = {}  # the learners observe weights alone
        rows = []
        for number, sparsity in enumerate(steps[: max(HELD_OUT_AFTER)], 1):
            pruner.estimate(data, F.cross_entropy)
            pruner.prune_to(sparsity)
            if number not in HELD_OUT_AFTER:
                continue
            learners = Learners({"anew": None, "carried over": pruner.curvature}, pruner.weights, num_grads)
            how = {"num_grads": num_grads, "labels": "model"}
            observe(model, data, F.cross_entropy, learners, pruner.weights, **how)
            held_out = HeldOut(learners.snapshots)
            observe(model, others, F.cross_entropy, held_out, pruner.weights, num_grads=1024, labels="model", seed=1)
            losses = held_out.losses(FishLeg().damping)
            counts = [count for count in HELD_OUT_AT if count <= num_grads]
            for count in counts:
                loss = {name: losses[name, count] for name in ("anew", "carried over")}
                rows.append([number, f"{sparsity:.1%}", count, *loss.values()])
                self.records.append({"method": "refinement", "round": number, "gradients": count} | loss)
            print(tabulate(rows[-len(counts) :], tablefmt="plain", floatfmt=".3g"), flush=True)
            self.write()
        print("\nauxiliary loss on gradients of 1,024 other images, summed over parameters")
        columns = ["round", "pruned", "gradients", "anew", "carried over"]
        print(tabulate(rows, columns, tablefmt="github", floatfmt=".3g"))

    def _rounds(
        self, name: str, steps: list[float], draw: int, images: int, make: Callable[[int], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """All rounds of one run, the last ones measured; later estimates have fewer images."""
        num_grads = self.arguments.num_grads
        data = self.cifar.training_batches(draw * num_grads, num_grads)
        later = self.cifar.training_batches(draw * num_grads, min(images, num_grads))
        model = copy.deepcopy(self.dense).eval()
        options = make(num_grads) | {"params": WEIGHTS, "num_grads": num_grads, "progress": self.arguments.progress}
        pruner = Pruner(model, **options)
        records = []
        for number, sparsity in enumerate(steps):
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="the data ended")
                pruner.estimate(later if number else data, F.cross_entropy)
            result = pruner.prune_to(sparsity)
            record = self._record(name, draw, result, time.perf_counter() - start)
            if number >= len(steps) - CARRIED_ROUNDS:
                recalibrate_batchnorm(copied := copy.deepcopy(model), data)
                record["accuracy"] = self.cifar.accuracy(model)
                record["accuracy_recalibrated"] = self.cifar.accuracy(copied)
                records.append(record)
                self.records.append(record)
        return records

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
    """What the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and cifar10/")
    parts = ("one", "rounds", "table", "layerwise", "damping", "fishleg", "models", "carried", "refinement")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--rounds", nargs="+", type=int, default=(1, ROUNDS), help="of layerwise; default: 1 and 8")
    parser.add_argument("--draws", type=int, default=1, help="samples of gradients; not for table, layerwise, damping")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "resnet20_cifar10.json")
    parser.add_argument("--only", default="", help="expression for the names of methods in fishleg, models, carried")
    parser.add_argument("--progress", action="store_true", help="progress bars of each pruning too")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for part in arguments.parts:
        getattr(bench, part)()
    bench.write()
    print(f"\nwrote {arguments.out}")


if __name__ == "__main__":
    main()
