"""Prunes a small convolutional network on scikit-learn's handwritten digits by seven methods, and draws the curves.

1,797 images of 8 x 8 pixels, a quarter of them held out for the accuracies shown.
"""

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn

from fishleg_ext.common.progress import progress_bar
from fishleg_ext.oneshot import prune
from fishleg_ext.sparsity.parameters import choose_parameters

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"curvature": "identity"},
    "diagonal Fisher": {"curvature": "diagonal"},
    "WoodFisher (block, simultaneous)": {"curvature": "block", "saliency": "simultaneous"},
    "M-FAC (low rank)": {"curvature": "low_rank"},
    "exact greedy": {"curvature": "block", "saliency": "exact"},
    "FishLeg": {"curvature": "fishleg", "num_grads": 1024},
    "exact greedy, 4 rounds": {"curvature": "block", "saliency": "exact", "recomputations": 4},
}


class Split:
    """Images [N, 1, 8, 8] and digits [N]."""

    def __init__(self, images: Any, digits: Any) -> None:
        self.images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        self.digits = torch.as_tensor(digits)

    def batches(self, size: int = 128) -> list[tuple[Tensor, Tensor]]:
        """Cut all samples into batches, in their order."""
        return list(zip(self.images.split(size), self.digits.split(size), strict=True))


def digits(seed: int = 0) -> tuple[Split, Split]:
    """Training and test set."""
    data = load_digits()
    parts = train_test_split(data.data, data.target, test_size=0.25, random_state=seed, stratify=data.target)
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])


def network(seed: int = 0) -> nn.Module:
    """Three convolutions with BatchNorm and one linear layer, 14,288 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (1, 16, 32, 32)
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            layers += [
                nn.Conv2d(fan_in, fan_out, 3, padding=1, stride=2 if i == 2 else 1, bias=False),
                nn.BatchNorm2d(fan_out),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(model: nn.Module, split: Split, epochs: int = 20, seed: int = 0, progress: bool = True) -> None:
    """Adam with a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in progress_bar(range(epochs), what="training", show=progress):
        for chosen in torch.randperm(len(split.images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(split.images[chosen]), split.digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Correct answers in percent."""
    return 100 * (model(split.images).argmax(1) == split.digits).double().mean().item()


def run(out: Path, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Train, prune, print the table, and write `digits.json` and `digits.png` into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    training, test = digits(seed)
    model = network(seed)
    train(model, training, seed=seed, progress=progress)
    dense = accuracy(model, test)
    num_weights = sum(weight.numel() for weight in choose_parameters(model).values())
    print(
        f"trained a network of {num_weights:,} weights on {len(training.images):,} digits in "
        f"{time.perf_counter() - start:.1f} s: {dense:.2f} % of {len(test.images)} test digits are right"
    )
    accuracies: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    bar = progress_bar(what="pruning", total=len(METHODS) * len(SPARSITIES), show=progress)
    for method, options in METHODS.items():
        start = time.perf_counter()
        accuracies[method] = []
        for sparsity in SPARSITIES:
            pruned = copy.deepcopy(model)
            prune(pruned, training.batches(), sparsity=sparsity, seed=seed, progress=False, **options)
            accuracies[method].append(accuracy(pruned, test))
            bar.update()
        seconds[method] = (time.perf_counter() - start) / len(SPARSITIES)
    bar.close()
    results = {
        "dataset": "scikit-learn digits",
        "weights": num_weights,
        "dense_accuracy": dense,
        "sparsities": list(SPARSITIES),
        "accuracies": accuracies,
        "seconds_per_pruning": seconds,
        "seed": seed,
        "torch": torch.__version__,
    }
    print(table(results))
    (out / "digits.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, out / "digits.png")
    print(f"wrote {out / 'digits.json'} and {out / 'digits.png'}")
    return results


def table(results: dict[str, Any]) -> str:
    """Test accuracy in percent by method and sparsity, no fine-tuning."""
    headers = ["test accuracy, %", *(f"{s:.0%}" for s in results["sparsities"]), "s each"]
    rows = [
        [method, *values, results["seconds_per_pruning"][method]] for method, values in results["accuracies"].items()
    ]
    formats = ["", *[".1f"] * len(results["sparsities"]), ".2f"]
    return tabulate(rows, headers, floatfmt=tuple(formats))


def draw(results: dict[str, Any], path: Path) -> None:
    """The table as curves."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    sparsities = [100 * s for s in results["sparsities"]]
    axes.axhline(results["dense_accuracy"], color="0.6", linestyle=":", label="dense")
    for (method, values), marker in zip(results["accuracies"].items(), "os^vDXP", strict=True):
        axes.plot(sparsities, values, marker=marker, markersize=5, label=method)
    axes.set(
        xlabel="sparsity, %",
        ylabel="test accuracy, %",
        xticks=sparsities,
        ylim=(0, 102),
        title=f"Pruning {results['weights']:,} weights in one call, no fine-tuning",
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
