"""How FishLeg learns on ResNet-20: its defaults, Adam beside alternating updates, warm starts from round to round.

    python bench/studies/fishleg_learning.py --data DIR [--parts fishleg carried refinement]

The options are those of resnet20.py, which says what is in DIR.
"""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner
from fishleg_ext.bench.studies.cifar10 import WEIGHTS
from fishleg_ext.bench.studies.resnet20 import FINAL_SPARSITY, ROUNDS, Bench, run
from fishleg_ext.curvature import Adam, Estimate, FishLeg
from fishleg_ext.curvature.kronecker import Factors
from fishleg_ext.observation.batchnorm import recalibrate_batchnorm
from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.types import Observation

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
    # The 24 batches after the 8 of alternating closed-form updates.
    **{f"Adam, {name}": ({"adam": Adam(steps=24, **how)}, {}) for name, how in ADAM.items()},
}
FISHLEG_SPARSITIES = (0.8, 0.9, 0.95)
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
        """Return the auxiliary loss of each, summed over parameters, for diagonal row factors."""
        losses = {}
        for key, inverse in self.inverses.items():
            norm = sum(float(row.square().sum() * col.square().sum()) for row, col, _ in inverse.values())
            trace = sum(float(row.sum() * col.trace()) for row, col, _ in inverse.values())
            losses[key] = 0.5 * (self.squares[key] / self.count + damping * norm) - trace
        return losses


class FishLegBench(Bench):
    """Studies of FishLeg's learning."""

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


if __name__ == "__main__":
    run(FishLegBench, ("fishleg", "carried", "refinement"), __doc__)
