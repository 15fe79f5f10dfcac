"""Compresses LeNet-5 (431,080 parameters) on MNIST: error against the size of the file, by every quantization.

    python bench/studies/lenet.py --data DIR [--seeds 0 1 2] [--out FILE] [--cache DIR]

DIR holds the four idx files of MNIST, gzipped. The last 5,000 training images are held out: on them settings are
chosen; errors are of the 10,000 test images. Each seed trains a network, quantizes it, prunes it step by step with
FishLeg and training between, and quantizes that, with and without retraining. Pruned and quantized networks learn to
predict what the dense one does (distillation; Hinton et al., arXiv 1503.02531). Resumable: what is in FILE is not run
again.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fishleg_ext import Pruner, QuantizeResult, quantize
from fishleg_ext.bench.studies.mnist import HELD_OUT, images, labels
from fishleg_ext.bench.studies.quantization import Study

EPOCHS, BATCH = 12, 128
DENSITIES = (0.3, 0.085, 0.05, 0.03)
EPOCHS_BETWEEN = 4
RETRAINING_EPOCHS = 1
LEARNING_RATE, LEARNING_RATE_DENSE = 3e-4, 1e-3  # of retraining, of pruned networks and of dense ones
TEMPERATURE = 4.0  # of distillation
BITS = (4, 3, 2, 1.5)
METHODS: dict[str, dict[str, Any]] = {
    "uniform bits": {"method": "fixed_point", "curvature": "identity", "allocate": False},
    "magnitude bits": {"method": "fixed_point", "curvature": "identity"},
    "Fisher bits": {"method": "fixed_point"},
    "k-means": {"curvature": "identity"},
    "Fisher k-means": {},
    "Fisher k-means, equal bits": {"allocate": False},
    "uniform grid, entropy": {"coding": "entropy", "curvature": "identity"},
    "Fisher grid, entropy": {"coding": "entropy"},
    "OBQ, FishLeg": {"method": "obq", "curvature": "fishleg"},
    "OBQ, FishLeg, entropy": {"method": "obq", "curvature": "fishleg", "coding": "entropy"},
}
SPARSEST = ("Fisher k-means", "Fisher grid, entropy", "OBQ, FishLeg, entropy")  # of the networks with fewest weights


class LeNet5(nn.Module):
    """The LeNet-5 of Caffe: 500 + 25,000 + 400,000 + 5,000 weights and 580 biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        x = F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Mnist:
    """Images and labels, in order."""

    def __init__(self, folder: Path) -> None:
        normal = lambda kind: (images(folder, kind).float() / 255 - 0.1307) / 0.3081
        train = normal("train"), labels(folder, "train")
        self.train, self.held_out = (
            tuple(x[part] for x in train) for part in (slice(0, HELD_OUT), slice(HELD_OUT, None))
        )
        self.test = normal("t10k"), labels(folder, "t10k")

    def epoch(self, generator: torch.Generator, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of training images and their targets."""
        for index in torch.randperm(55000, generator=generator).split(BATCH):
            yield self.train[0][index], targets[index]

    @torch.no_grad()
    def softened(self, model: nn.Module) -> Tensor:
        """What a network predicts of the training images, at the temperature of distillation, [55000, 10]."""
        return torch.cat([(model(x) / TEMPERATURE).softmax(1) for x in self.train[0].split(1000)])

    @torch.no_grad()
    def error(self, model: nn.Module, held_out: bool = False) -> float:
        """Wrong answers, in percent."""
        x, y = self.held_out if held_out else self.test
        wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
        return 100 * wrong / len(y)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Mnist,
    epochs: int,
    seed: int,
    softened: Tensor | None = None,
) -> None:
    """Train by the labels or by distillation, with a learning rate that falls to zero as a cosine."""
    targets, temperature = (data.train[1], 1.0) if softened is None else (softened, TEMPERATURE)
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (55000 // BATCH + 1))
    for _ in range(epochs):
        for x, y in data.epoch(generator, targets):
            optimizer.zero_grad()
            (temperature**2 * F.cross_entropy(model(x) / temperature, y)).backward()
            optimizer.step()
            schedule.step()


def calibration(data: Mnist, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first training images."""
    return list(zip(data.train[0][:count].split(128), data.train[1][:count].split(128), strict=True))


def measured(model: nn.Module, result: QuantizeResult, data: Mnist, seconds: float) -> dict[str, Any]:
    """One row of results."""
    return {
        "error": data.error(model),
        "held_out_error": data.error(model, held_out=True),
        "bytes": result.size,
        "ratio": result.dense_size / result.size,
        "mean_bits": result.mean_bits,
        "sizes": result.sizes(),
        "seconds": seconds,
    }


def run(
    name: str,
    network: nn.Module,
    data: Mnist,
    options: dict[str, Any],
    epochs: int,
    learning_rate: float,
    seed: int,
    softened: Tensor,
) -> dict[str, Any]:
    """Quantize a copy, and retrain it for some epochs."""
    model, start = copy.deepcopy(network), time.perf_counter()
    result = quantize(model, calibration(data, 2048), num_grads=2048, progress=False, seed=seed, **options)
    rows = {name: measured(model, result, data, time.perf_counter() - start)}
    if epochs:
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        handle = result.attach(optimizer)
        train(model, optimizer, data, epochs, seed + 1000, softened)
        handle.remove()
        rows[f"{name}, retrained"] = measured(model, result, data, time.perf_counter() - start)
    return rows


def wanted(stage: str) -> Iterator[tuple[str, float, int]]:
    """Yield the methods for one network, with their bits and epochs of retraining."""
    for bits in BITS:
        for method, options in METHODS.items():
            if options.get("allocate") is False and bits != int(bits):
                continue
            if stage in ("dense", "density 0.085"):
                yield method, bits, RETRAINING_EPOCHS
            elif stage != "density 0.3" and method in SPARSEST and bits in (3, 2):
                yield method, bits, 2 * RETRAINING_EPOCHS


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/results/lenet.json"))
    parser.add_argument("--cache", type=Path, help="folder for trained networks")
    options = parser.parse_args()
    data = Mnist(options.data)
    study = Study(options.out)
    for seed in options.seeds:
        networks = trained(seed, data, options.cache)
        softened = data.softened(networks["dense"][0])
        for stage, (network, masks) in reversed(networks.items()):
            key = f"seed {seed} | {stage}"
            errors = lambda n=network: {"error": data.error(n), "held_out_error": data.error(n, held_out=True)}
            study.run(f"{key} | float32", errors)
            for method, bits, epochs in wanted(stage):
                name = f"{key} | {method} | {bits}"
                rows = (name, f"{name}, retrained")[: 1 + bool(epochs)]
                if any(row not in study.rows for row in rows):
                    settings = METHODS[method] | {"bits": bits, "masks": masks}
                    rate = LEARNING_RATE_DENSE if stage == "dense" else LEARNING_RATE
                    for row, found in run(name, network, data, settings, epochs, rate, seed, softened).items():
                        study.run(row, lambda found=found: found)
    print(table(study.rows))


def trained(seed: int, data: Mnist, cache: Path | None) -> dict[str, tuple[nn.Module, dict[str, Tensor] | None]]:
    """The network of a seed, dense and pruned step by step, with its masks."""
    path = None if cache is None else cache / f"lenet_{seed}.pt"
    if path is not None and path.exists():
        states = torch.load(path, weights_only=True)
    else:
        torch.manual_seed(seed)
        model = LeNet5()
        train(model, torch.optim.Adam(model.parameters(), lr=1e-3), data, EPOCHS, seed)
        states = {"dense": {"state": copy.deepcopy(model.state_dict()), "masks": None}}
        softened = data.softened(model)
        pruner = Pruner(model, curvature="fishleg", num_grads=4096, progress=False, seed=seed)
        for index, density in enumerate(DENSITIES):
            pruner.estimate(calibration(data, 8192), F.cross_entropy)
            pruner.prune_to(1 - density)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            handle = pruner.attach(optimizer)
            train(model, optimizer, data, EPOCHS_BETWEEN, seed + 100 * (index + 1), softened)
            handle.remove()
            errors = f"{data.error(model):.2f} %, held out {data.error(model, held_out=True):.2f} %"
            print(f"seed {seed} density {density}: {errors}", flush=True)
            states[f"density {density}"] = {"state": copy.deepcopy(model.state_dict()), "masks": pruner.masks}
        if path is not None:
            path.parent.mkdir(exist_ok=True, parents=True)
            torch.save(states, path)
    found = {}
    for stage, entry in states.items():
        network = LeNet5()
        network.load_state_dict(entry["state"])
        found[stage] = network.eval(), entry["masks"]
    return found


def table(rows: dict[str, Any]) -> str:
    """Mean error and ratio over the seeds."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, row in rows.items():
        found.setdefault(tuple(key.split(" | ")[1:]), []).append(row)
    lines = []
    for key, entries in found.items():
        columns = ("error", "held_out_error", "ratio")
        means = [sum(entry.get(name, 1.0) for entry in entries) / len(entries) for name in columns]
        lines.append([*key, *[""] * (3 - len(key)), *means, len(entries)])
    headers = ["network", "method", "bits", "error %", "held out %", "compression", "seeds"]
    return tabulate(lines, headers, floatfmt=".2f")


if __name__ == "__main__":
    main()
