"""Trains a deep autoencoder by FishLeg, K-FAC, Adam and SGD: loss against steps and against CPU seconds.

    python bench/studies/autoencoder.py --data DIR [--curves] [--batches 100 1000] [--optimizers NAME ...]
        [--seeds 0 1 2] [--out FILE] [--cache DIR] [--device cuda --tuned FILE]

The networks are those of Hinton and Salakhutdinov (2006) with a ReLU in the place of sigmoids, as in Garcia et al.,
FishLeg, ICLR 2023: 784-1000-500-250-30 and back (2.8 million weights) for MNIST, of which DIR holds the idx files,
gzipped, and whose last 5,000 training images are held out; with --curves 784-400-200-100-50-25-6 and back (0.8
million) for 20,000 curves that are drawn here, with 5,000 held out. The likelihood is Bernoulli, the code linear. Each
optimizer trains for 5 epochs at a constant learning rate; this is tuned for each on one grid of half decades, by the
held-out loss at the end with seed 0, from a start until its neighbours are worse. Then come the other seeds. Losses are
sums over pixels, means over images, of the 10,000 test images; seconds are CPU seconds of the process, on a GPU those
that pass. With --tuned, learning rates are those that were best in another file. Resumable: what is in FILE is not run
again.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fishleg_ext.bench.studies.mnist import HELD_OUT, images
from fishleg_ext.bench.studies.quantization import Study
from fishleg_ext.curvature import Adam
from fishleg_ext.optim import FishLeg

MNIST, CURVES = (784, 1000, 500, 250, 30), (784, 400, 200, 100, 50, 25, 6)  # sizes up to the code
EPOCHS, POINTS = 5, 25  # the points nearer to each other at first
PIXELS = 784
RESULTS = Path("bench/results")

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


def fishleg(**options: Any) -> Make:
    """Make FishLeg with these options."""
    return lambda model, lr: FishLeg(model, lr, likelihood="bernoulli", **options)


def descended(**options: Any) -> Make:
    """Make FishLeg with Q learned by Adam, as often as in the published experiments."""
    adam = Adam(steps=None, scaled=False, **options)
    return fishleg(adam=adam, update_every=10, invert_every=10)


# How each is made, and the exponent of the first learning rate that is tried, in half decades.
OPTIMIZERS: dict[str, tuple[Make, int]] = {
    "SGD": (lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), 1),
    "Adam": (lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr), -6),
    "K-FAC": (fishleg(curvature="kronecker"), -1),
    "FishLeg": (fishleg(), -1),
    "FishLeg by Adam": (descended(), -1),
    "FishLeg by Adam, Gaussian probes": (descended(probes="gaussian"), -1),
    "FishLeg by Adam, gradient probes": (descended(probes="gradients"), -1),
}


def autoencoder(seed: int, encoder: tuple[int, ...] = MNIST) -> nn.Sequential:
    """The network with the default initial weights of PyTorch; outputs are logits of pixels."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((*encoder, *encoder[-2::-1])):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        if outputs == encoder[-1]:
            layers.pop()
    return nn.Sequential(*layers[:-1])


@dataclass(eq=False)
class Images:
    """Images [N, 784] with values from 0 to 1, and the sizes of the network for them."""

    train: Tensor
    held_out: Tensor
    test: Tensor
    encoder: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.train.device

    def epoch(self, generator: torch.Generator, batch: int) -> Iterator[Tensor]:
        """Shuffled batches of training images, all of one size."""
        order = torch.randperm(len(self.train), generator=generator).to(self.device)
        yield from (self.train[index] for index in order.split(batch) if len(index) == batch)


def mnist(folder: Path, device: str = "cpu") -> Images:
    """Handwritten digits, in order."""
    read = lambda part: images(folder, part).flatten(1).float().to(device) / 255
    return Images(*read("train").tensor_split([HELD_OUT]), read("t10k"), MNIST)


def curves(device: str = "cpu", size: int = 28, points: int = 48) -> Images:
    """Quadratic Bezier curves by three random points each, as strokes with the profile of a normal distribution."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, points)
    weights = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
    parts = []
    for _ in range(35):
        ends = (0.1 + 0.8 * torch.rand(1000, 3, 2, generator=generator)) * size
        along = (weights @ ends)[..., None] - torch.arange(size)  # [images, points, 2, size]
        x, y = (-along.square() / 2).exp().unbind(2)
        parts.append(torch.stack([(a[:, :, None] * b[:, None]).amax(0) for a, b in zip(x, y, strict=True)]))
    whole = torch.cat(parts).flatten(1).to(device)
    return Images(*whole.split([20_000, 5_000, 10_000]), CURVES)


def clock(device: torch.device) -> float:
    """CPU seconds of the process; with a GPU those that have passed, once it is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def losses(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Negative log-likelihood and squared error, sums over pixels."""
    model.eval()
    logits = torch.cat([model(part) for part in x.split(1000)])
    model.train()
    likelihood = F.binary_cross_entropy_with_logits(logits, x)
    return PIXELS * float(likelihood), PIXELS * float(F.mse_loss(logits.sigmoid(), x))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Images, batch: int, seed: int, epochs: int = EPOCHS
) -> list[dict[str, float]]:
    """Train, and measure losses at some points; ends where the loss is not finite."""
    generator, points, seconds, step = torch.Generator().manual_seed(seed), [], 0.0, 0
    total = epochs * (len(data.train) // batch)
    due = {round(total * ((point + 1) / POINTS) ** 1.5) for point in range(POINTS)}
    for _ in range(epochs):
        for x in data.epoch(generator, batch):
            start = clock(data.device)
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(x), x)
            loss.backward()
            if not math.isfinite(loss.item()):
                return points
            optimizer.step()
            seconds += clock(data.device) - start
            if (step := step + 1) in due:
                held_out, (test, squared) = losses(model, data.held_out)[0], losses(model, data.test)
                names = ("step", "seconds", "held_out", "test", "squared_error")
                points.append(dict(zip(names, (step, seconds, held_out, test, squared), strict=True)))
    return points


def run(name: str, batch: int, exponent: int, seed: int, data: Images, cache: Path | None) -> dict[str, Any]:
    """Train one network; it and its optimizer go to the cache."""
    model = autoencoder(seed, data.encoder).to(data.device)
    optimizer = OPTIMIZERS[name][0](model, 10 ** (exponent / 2))
    points = train(model, optimizer, data, batch, seed)
    complete = len(points) == POINTS and math.isfinite(points[-1]["held_out"])
    if cache is not None and complete:
        cache.mkdir(exist_ok=True, parents=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, cache / f"{name}_{batch}_{exponent}_{seed}.pt")
    return {"held_out": points[-1]["held_out"] if complete else 1e9, "points": points}


def tuned(study: Study, name: str, batch: int, data: Images, cache: Path | None) -> int:
    """Walk along the grid of learning rates until both neighbours of the best are worse; return its exponent."""
    found: dict[int, float] = {}

    def loss(exponent: int) -> float:
        if exponent not in found:
            key = f"{name} | {batch} | {exponent} | 0"
            study.run(key, lambda: run(name, batch, exponent, 0, data, cache))
            found[exponent] = study.rows[key]["held_out"]
        return found[exponent]

    best = OPTIMIZERS[name][1]
    while True:
        neighbour = min((best - 1, best + 1), key=loss)
        if loss(neighbour) >= loss(best):
            return best
        best = neighbour


def costs(batch: int, data: Images, rounds: int = 5, steps: int = 20) -> dict[str, Any]:
    """Median seconds of a step, past FishLeg's warm-up; all optimizers in turn, so that they share the noise."""
    names = [name for name in OPTIMIZERS if " by Adam" not in name]
    # One for each, since FishLeg looks at every pass of its own.
    models = {name: autoencoder(0, data.encoder).to(data.device) for name in names}
    made = {name: OPTIMIZERS[name][0](models[name], 1e-9) for name in names}
    for optimizer in made.values():
        if isinstance(optimizer, FishLeg):
            optimizer.warm_up = 1
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        for name, optimizer in made.items():
            start = clock(data.device)
            for step in range(steps):
                x = data.train[step * batch : (step + 1) * batch]
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(models[name](x), x).backward()
                optimizer.step()
            if number:  # the first warms up
                seconds[name].append((clock(data.device) - start) / steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "to_sgd": {name: value / medians["SGD"] for name, value in medians.items()}}


def plot(rows: dict[str, Any], target: Path, unit: str) -> None:
    """Test loss against steps and against seconds, for each batch size, at each optimizer's best learning rate."""
    from matplotlib.figure import Figure

    best = chosen(rows)
    batches = sorted({batch for _, batch in best})
    figure = Figure(figsize=(9, 3.5 * len(batches)), layout="constrained")
    axes = figure.subplots(len(batches), 2, squeeze=False)
    for row, batch in zip(axes, batches, strict=True):
        ends = [rows[f"{name} | {b} | {e} | 0"]["points"][-1]["test"] for (name, b), e in best.items() if b == batch]
        bounds = 0.9 * min(ends), 3 * min(ends)
        for ax, part in zip(row, ("step", "seconds"), strict=True):
            for number, name in enumerate(OPTIMIZERS):
                if (name, batch) in best:
                    points = rows[f"{name} | {batch} | {best[name, batch]} | 0"]["points"]
                    ax.plot([p[part] for p in points], [p["test"] for p in points], f"C{number}", label=name)
            ax.set(xlabel="steps" if part == "step" else unit, title=f"batches of {batch}", ylim=bounds)
            ax.grid(alpha=0.3)
        row[0].set_ylabel("test loss, nats an image")
    named = max((row[0].get_legend_handles_labels() for row in axes), key=lambda found: len(found[1]))
    figure.legend(*named, loc="outside lower center", ncols=4)
    figure.savefig(target)


def chosen(rows: dict[str, Any]) -> dict[tuple[str, int], int]:
    """(Optimizer, batch size) -> exponent of the learning rate with the least held-out loss, with seed 0."""
    best: dict[tuple[str, int], tuple[float, int]] = {}
    for key, row in rows.items():
        if not key.startswith("cost") and key.endswith(" | 0"):
            name, batch, exponent, _ = key.split(" | ")
            found = row["held_out"], int(exponent)
            best[name, int(batch)] = min(found, best.get((name, int(batch)), found))
    return {key: exponent for key, (_, exponent) in best.items()}


def table(rows: dict[str, Any], unit: str = "CPU s") -> str:
    """The best learning rate of each, means over seeds, and how soon each is where Adam ends: at that rate and any."""
    best, lines = chosen(rows), []
    for (name, batch), exponent in sorted(best.items(), key=lambda item: item[0][1]):
        of = lambda n, e, b=batch: [row for key, row in rows.items() if key.startswith(f"{n} | {b} | {e} | ")]
        entries = of(name, exponent)
        ends = [row["points"][-1] for row in entries]
        mean = lambda part, ends=ends: statistics.mean(point[part] for point in ends)
        goal = math.nan
        if ("Adam", batch) in best:
            goal = statistics.mean(row["points"][-1]["test"] for row in of("Adam", best["Adam", batch]))
        tried = {int(key.split(" | ")[2]) for key in rows if key.startswith(f"{name} | {batch} | ")}
        soonest = [(*_reached(of(name, e), goal), e) for e in tried if _reached(of(name, e), goal)]
        cells = [f"{mean('test'):.1f}", f"{mean('squared_error'):.2f}", f"{mean('step'):.0f}", f"{mean('seconds'):.0f}"]
        own = [f"{value:.0f}" for value in _reached(entries, goal)] or ["", ""]
        steps, seconds, rate = min(soonest) if soonest else (math.inf, math.inf, 0)
        fewest = f"{steps:.0f} ({seconds:.0f} s, at {_rate(rate)})" if soonest else ""
        lines.append([batch, name, _rate(exponent), *cells, *own, fewest, len(entries)])
    headers = ["batch", "optimizer", "learning rate", "test loss", "squared error", "steps", unit]
    headers += ["steps to Adam's loss", f"{unit} to it", "fewest steps at any rate", "seeds"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _rate(exponent: int) -> str:
    return f"{10 ** (exponent / 2):.2g}"


def _reached(entries: list[dict[str, Any]], goal: float) -> tuple[float, ...]:
    """Mean step and CPU seconds at which the test loss is first at the goal; nothing where a run never is."""
    firsts = [next((point for point in row["points"] if point["test"] <= goal), None) for row in entries]
    found = [point for point in firsts if point is not None]
    if len(found) < len(entries):
        return ()
    return tuple(statistics.mean(point[part] for point in found) for part in ("step", "seconds"))


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of MNIST")
    parser.add_argument("--curves", action="store_true", help="the other network, for curves")
    parser.add_argument("--batches", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--costs", action="store_true", help="measure the cost of a step, on a quiet machine, and end")
    parser.add_argument("--out", type=Path, help="default: bench/results/autoencoder.json, or autoencoder_curves.json")
    parser.add_argument("--plot", type=Path, help="image file for a figure; takes matplotlib")
    parser.add_argument("--cache", type=Path, help="folder for trained networks")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--tuned", type=Path, help="results of this study, whose best learning rates are taken")
    options = parser.parse_args()
    if options.data is None and not options.curves:
        parser.error("expected --data, the folder of MNIST, or --curves")
    if options.device != "cpu" and options.out is None:
        parser.error("expected --out with another --device, as the results in the repository are of a CPU")
    data = curves(options.device) if options.curves else mnist(options.data, options.device)
    study = Study(options.out or RESULTS / f"autoencoder{'_curves' if options.curves else ''}.json")
    if data.device.type == "cuda":
        study.content["device"] = torch.cuda.get_device_name()
    known = {} if options.tuned is None else chosen(json.loads(options.tuned.read_text())["rows"])
    for batch in options.batches:
        if options.costs:
            study.run(f"cost | {batch}", lambda b=batch: costs(b, data))
        for name in () if options.costs else options.optimizers:
            exponent = known.get((name, batch))
            if exponent is None:
                exponent = tuned(study, name, batch, data, options.cache)
            for seed in options.seeds:
                make = lambda n=name, b=batch, e=exponent, s=seed: run(n, b, e, s, data, options.cache)
                study.run(f"{name} | {batch} | {exponent} | {seed}", make)
    unit = "CPU s" if options.device == "cpu" else "s"
    print(table(study.rows, unit))
    if options.plot is not None:
        plot(study.rows, options.plot, unit)


if __name__ == "__main__":
    main()
