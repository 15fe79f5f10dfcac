"""Prunes autoencoders that `autoencoder.py` has trained by FishLeg: at once, and step by step while training goes on.

    python bench/studies/autoencoder_pruning.py --data DIR --cache DIR [--exponent -1] [--seeds 0 1 2] [--out FILE]

CACHE is the folder in which `autoencoder.py` left networks and optimizers; EXPONENT says which learning rate, in half
decades. At once: every method from 2,048 training images, and the optimizer's own Q from none. The damping of each is
chosen on one grid of decades by the squared error of 5,000 held-out images at 90 % sparsity, with seed 0, which goes on
where the best is at its end; a network whose factors cannot be inverted with it gets the next decade with which they
can. Step by step: one epoch of FishLeg,
pruned ten times along a cubic schedule, by the optimizer's own Q or by estimates that are made anew each time from
2,048 images. Squared errors are of the 10,000 test images, sums over pixels, means over images.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from fishleg_ext import CurvatureError, Pruner
from fishleg_ext.bench.studies.autoencoder import OPTIMIZERS, Images, autoencoder, losses, mnist
from fishleg_ext.bench.studies.quantization import Study
from fishleg_ext.optim import FishLeg, OptimizerCurvature
from fishleg_ext.schedule import Cubic

BATCH, GRADS, PRUNINGS = 100, 2048, 10
AT_ONCE, STEP_BY_STEP = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), (0.95, 0.98)
DAMPINGS = [10.0**exponent for exponent in range(-10, -3)]
OPTIMIZER = "FishLeg, as the optimizer left it"
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"curvature": "identity"},
    "oBERT": {"curvature": "block", "saliency": "simultaneous"},
    "M-FAC": {"curvature": "low_rank", "num_grads": 512},
    "exact greedy": {"curvature": "block"},
    "layerwise": {"curvature": "layerwise"},
    "K-FAC": {"curvature": "kronecker"},
    "FishLeg": {"curvature": "fishleg"},
    OPTIMIZER: {},
}
GRADUAL = ("magnitude", "exact greedy", "layerwise", "K-FAC", "FishLeg", OPTIMIZER)


def pruner(method: str, model: nn.Module, optimizer: FishLeg, damping: float | None, **options: Any) -> Pruner:
    """A pruner by one method."""
    settings = dict(METHODS[method])
    curvature = settings.pop("curvature", None) or OptimizerCurvature(source=optimizer, damping=damping or 1e-6)
    if curvature not in ("identity",) and isinstance(curvature, str):
        settings = {"num_grads": GRADS, "damping": damping} | settings
        if curvature != "layerwise":
            settings["likelihood"] = "bernoulli"
            settings["labels"] = "model"
    return Pruner(model, curvature=curvature, progress=False, **settings, **options)


def loaded(cache: Path, exponent: int, seed: int) -> tuple[nn.Module, FishLeg]:
    """A trained network and its optimizer."""
    state = torch.load(cache / f"FishLeg_{BATCH}_{exponent}_{seed}.pt", weights_only=True)
    model = autoencoder(seed)
    model.load_state_dict(state["model"])
    optimizer = OPTIMIZERS["FishLeg"][0](model, 10 ** (exponent / 2))
    optimizer.load_state_dict(state["optimizer"])
    assert isinstance(optimizer, FishLeg)
    return model, optimizer


def at_once(
    method: str,
    cache: Path,
    exponent: int,
    seed: int,
    data: Images,
    damping: float | None,
    sparsities: tuple[float, ...],
) -> dict[str, Any]:
    """Squared errors after pruning at once, to each sparsity from the same estimate; and CPU seconds of that."""
    model, optimizer = loaded(cache, exponent, seed)
    images = [(x, x) for x in data.train[:GRADS].split(256)]
    start = time.process_time()
    first = pruner(method, model, optimizer, damping)
    first.estimate(images, F.binary_cross_entropy_with_logits)
    seconds = time.process_time() - start
    before, state, found = copy.deepcopy(model.state_dict()), first.state_dict(), {}
    for sparsity in sparsities:
        model.load_state_dict(before)
        first.load_state_dict(state)
        first.prune_to(sparsity)
        found[str(sparsity)] = {
            "squared_error": losses(model, data.test)[1],
            "held_out": losses(model, data.held_out)[1],
        }
    return {"at": found, "estimate_seconds": seconds, "damping": damping}


def tried(method: str, cache: Path, exponent: int, data: Images, damping: float | None) -> dict[str, Any]:
    """What a damping gives at 90 %, with seed 0; an error beyond all others where nothing can be inverted."""
    try:
        return at_once(method, cache, exponent, 0, data, damping, (0.9,))
    except CurvatureError as error:
        return {"at": {"0.9": {"held_out": 1e9}}, "damping": damping, "error": str(error)}


def chosen(method: str, study: Study, cache: Path, exponent: int, data: Images) -> float | None:
    """Return the best damping of a grid that grows until the best lies within it."""
    found: dict[float | None, float] = {}
    grid: list[float | None] = [None] if method == "magnitude" else list(DAMPINGS)
    while True:
        for damping in grid:
            key = f"{method} | damping {damping}"
            study.run(key, lambda d=damping: tried(method, cache, exponent, data, d))
            found[damping] = study.rows[key]["at"]["0.9"]["held_out"]
        best = min(found, key=lambda damping: found[damping])
        if best is None or min(found) < best < max(found):
            return best
        grid = [float(f"{best * (10 if best == max(found) else 0.1):.0e}")]


def inverted(run: Callable[[float | None], dict[str, Any]], damping: float | None) -> dict[str, Any]:
    """Run with this damping, or with the next decade at which the factors of this network can be inverted."""
    try:
        return run(damping)
    except CurvatureError:
        if damping is None or damping >= 1:
            raise
    return inverted(run, float(f"{10 * damping:.0e}"))


def step_by_step(
    method: str, cache: Path, exponent: int, seed: int, data: Images, damping: float | None, sparsity: float
) -> dict[str, Any]:
    """Squared error after one epoch of training, pruned along the way; and CPU seconds of estimates and prunings."""
    model, optimizer = loaded(cache, exponent, seed)
    steps, generator = len(data.train) // BATCH, torch.Generator().manual_seed(100 + seed)
    every = steps // (PRUNINGS + 2)
    schedule = Cubic(final_sparsity=sparsity, init_sparsity=0.3, start=0, end=(PRUNINGS - 1) * every, frequency=every)
    images = [(x, x) for x in data.train[:GRADS].split(256)]
    gradual = pruner(
        method, model, optimizer, damping, schedule=schedule, data=images, loss_fn=F.binary_cross_entropy_with_logits
    )
    gradual.attach(optimizer)
    seconds = 0.0
    for x in data.epoch(generator, BATCH):
        start = time.process_time()
        gradual.step()
        seconds += time.process_time() - start
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), x).backward()
        optimizer.step()
    result = gradual.finalize()
    squared, held_out = losses(model, data.test)[1], losses(model, data.held_out)[1]
    found = {"squared_error": squared, "held_out": held_out, "sparsity": result.sparsity}
    return found | {"seconds": seconds, "damping": damping}


def table(rows: dict[str, Any]) -> str:
    """Mean squared errors over seeds."""
    lines = []
    for stage, sparsities, methods in (("at once", AT_ONCE, tuple(METHODS)), ("step by step", STEP_BY_STEP, GRADUAL)):
        for method in methods:
            cells: list[Any] = []
            for sparsity in AT_ONCE:
                if stage == "at once":
                    of = [r["at"] for k, r in rows.items() if k.startswith(f"{method} | at once | ")]
                    values = [at[str(sparsity)]["squared_error"] for at in of]
                else:
                    key = f"{method} | {sparsity} | "
                    values = [r["squared_error"] for k, r in rows.items() if k.startswith(key)]
                cells.append(sum(values) / len(values) if values and sparsity in sparsities else "")
            if any(cells):
                lines.append([stage, method, *cells])
    headers = ["", "method", *(f"{100 * sparsity:.0f} %" for sparsity in AT_ONCE)]
    return tabulate(lines, headers, floatfmt=".2f", tablefmt="pipe")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--exponent", type=int, default=-1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--stages", nargs="+", default=["once", "steps"], choices=["once", "steps"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/autoencoder_pruning.json"))
    options = parser.parse_args()
    data, study, where = mnist(options.data), Study(options.out), (options.cache, options.exponent)
    for method in options.methods:
        best = chosen(method, study, *where, data)
        for seed in options.seeds:
            if "once" in options.stages:
                run = lambda d, m=method, s=seed: at_once(m, *where, s, data, d, AT_ONCE)
                study.run(f"{method} | at once | {seed}", lambda run=run, d=best: inverted(run, d))
            for sparsity in STEP_BY_STEP if method in GRADUAL and "steps" in options.stages else ():
                run = lambda d, m=method, s=seed, p=sparsity: step_by_step(m, *where, s, data, d, p)
                study.run(f"{method} | {sparsity} | {seed}", lambda run=run, d=best: inverted(run, d))
    print(table(study.rows))


if __name__ == "__main__":
    main()
