"""Compresses LeNet-5 (431,080 weights) on MNIST: error against the size of the file, by every method of quantization.

    python bench/studies/lenet.py --data DIR [--seeds 0 1 2] [--out FILE]

DIR holds the four idx files of MNIST, gzipped. The last 5,000 training images are held out: on them defaults are
chosen; errors are of the 10,000 test images. Each seed trains a network, quantizes it, prunes it step by step with
training between, and quantizes that, with and without retraining. Resumable: what is in FILE is not run again.
"""

import argparse
import copy
import gzip
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fishleg_ext import Pruner, QuantizeResult, quantize

EPOCHS, BATCH = 12, 128
DENSITIES = (0.5, 0.25, 0.15, 0.085, 0.05, 0.03, 0.02)
EPOCHS_BETWEEN = 2
RETRAINING_EPOCHS = 3
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
    "OBQ (block)": {"method": "obq", "curvature": "block"},
    "OBQ (block), entropy": {"method": "obq", "curvature": "block", "coding": "entropy"},
}


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
        read = lambda name: torch.frombuffer(
            bytearray(gzip.decompress((folder / name).read_bytes())), dtype=torch.uint8
        )
        images = lambda name: (read(name)[16:].view(-1, 1, 28, 28).float() / 255 - 0.1307) / 0.3081
        labels = lambda name: read(name)[8:].long()
        train = images("train-images-idx3-ubyte.gz"), labels("train-labels-idx1-ubyte.gz")
        self.train, self.held_out = (tuple(x[part] for x in train) for part in (slice(0, 55000), slice(55000, None)))
        self.test = images("t10k-images-idx3-ubyte.gz"), labels("t10k-labels-idx1-ubyte.gz")

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches."""
        for index in torch.randperm(55000, generator=generator).split(BATCH):
            yield self.train[0][index], self.train[1][index]

    @torch.no_grad()
    def error(self, model: nn.Module, held_out: bool = False) -> float:
        """Wrong answers, in percent."""
        x, y = self.held_out if held_out else self.test
        wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
        return 100 * wrong / len(y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Mnist, epochs: int, seed: int) -> None:
    """Train with a learning rate that falls to zero as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (55000 // BATCH + 1))
    for _ in range(epochs):
        for x, y in data.epoch(generator):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()


def calibration(data: Mnist) -> list[tuple[Tensor, Tensor]]:
    """The first 2,048 training images."""
    return list(zip(data.train[0][:2048].split(128), data.train[1][:2048].split(128), strict=True))


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


def run(name: str, network: nn.Module, data: Mnist, options: dict[str, Any], retraining: bool, seed: int) -> Any:
    """Quantize a copy, and retrain it."""
    model, start = copy.deepcopy(network), time.perf_counter()
    result = quantize(model, calibration(data), num_grads=2048, progress=False, seed=seed, **options)
    rows = {name: measured(model, result, data, time.perf_counter() - start)}
    if retraining:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        handle = result.attach(optimizer)
        train(model, optimizer, data, RETRAINING_EPOCHS, seed + 1000)
        handle.remove()
        rows[f"{name}, retrained"] = measured(model, result, data, time.perf_counter() - start)
    return rows


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/results/lenet.json"))
    parser.add_argument("--cache", type=Path, help="folder for trained networks")
    options = parser.parse_args()
    data = Mnist(options.data)
    known = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    known |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    rows = known["rows"]

    def keep(key: str, found: dict[str, Any]) -> None:
        for name, row in found.items():
            rows[f"{key} | {name}"] = row
            print(key, "|", name, {k: v for k, v in row.items() if k != "sizes"}, flush=True)
        options.out.parent.mkdir(exist_ok=True, parents=True)
        options.out.write_text(json.dumps(known, indent=1) + "\n")

    for seed in options.seeds:
        networks = trained(seed, data, options.cache)
        for stage, (network, masks) in networks.items():
            key = f"seed {seed} | {stage}"
            if f"{key} | dense" not in rows:
                plain = {"error": data.error(network), "held_out_error": data.error(network, held_out=True)}
                keep(key, {"dense": plain})
            for bits in BITS:
                for method, given in METHODS.items():
                    retraining = stage != "dense" and method in RETRAINED and bits in (3, 2)
                    if given.get("allocate") is False and bits != int(bits):
                        continue
                    if stage not in ("dense", "density 0.085") and not retraining:
                        continue
                    name = f"{method} | {bits}"
                    if f"{key} | {name}" not in rows:
                        keep(key, run(name, network, data, {**given, "bits": bits, "masks": masks}, retraining, seed))
    print(table(rows))


RETRAINED = ("Fisher k-means", "uniform grid, entropy")  # with 3 and 2 bits


def trained(seed: int, data: Mnist, cache: Path | None) -> dict[str, tuple[nn.Module, dict[str, Tensor] | None]]:
    """The network of a seed, dense and pruned step by step, with its masks."""
    path = None if cache is None else cache / f"lenet_{seed}.pt"
    if path is not None and path.exists():
        states = torch.load(path, weights_only=True)
    else:
        torch.manual_seed(seed)
        model = LeNet5()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        train(model, optimizer, data, EPOCHS, seed)
        states = {"dense": {"state": copy.deepcopy(model.state_dict()), "masks": None}}
        pruner = Pruner(model, curvature="block", num_grads=1024, progress=False, seed=seed)
        for index, density in enumerate(DENSITIES):
            pruner.estimate(calibration(data), F.cross_entropy)
            pruner.prune_to(1 - density)
            optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
            handle = pruner.attach(optimizer)
            train(model, optimizer, data, EPOCHS_BETWEEN, seed + 100 * (index + 1))
            handle.remove()
            print(f"seed {seed} density {density}: {data.error(model)} %", flush=True)
            states[f"density {density}"] = {"state": copy.deepcopy(model.state_dict()), "masks": pruner.masks}
        if path is not None:
            path.parent.mkdir(exist_ok=True, parents=True)
            torch.save(states, path)
    found = {}
    for stage, entry in states.items():
        network = LeNet5()
        network.load_state_dict(entry["state"])
        if stage in ("dense", "density 0.085", "density 0.03", "density 0.02"):
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
