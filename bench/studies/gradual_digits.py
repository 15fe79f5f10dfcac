"""Trains the network of `fishleg-ext demo` while it is pruned, and can be killed at any time.

    python bench/studies/gradual_digits.py --checkpoint run.pt --curvature fishleg

The same command goes on where the last checkpoint was written and ends with the same weights and masks, to the bit, as
if it had not been killed. What it takes for that is all here: the order of the samples follows from the number of the
step, and a checkpoint holds model, optimizer, pruner and that number. With `--kills 20` the script kills itself so many
times, at random, and compares.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext import Pruner, checkpoint, schedule
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.demo import accuracy, digits, network

SCHEDULES = {
    "cubic": schedule.Cubic,
    "linear": schedule.Linear,
    "geometric": schedule.Geometric,
    "one_shot": schedule.OneShot,
}
Augment = Callable[[Tensor, torch.Generator], Tensor]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer of the network of digits."""
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)


class Run:
    """A training run: everything that changes, and how.

    Args:
        model: to be trained by cross-entropy.
        images, targets: all samples.
        data: of the pruner's estimates.
        curve: name of the schedule.
        sparsity: at its end, after half of the steps.
        steps: of training.
        prunings: on the way.
        batch: samples in each step.
        seed: of the order of samples, and of the pruner.
        optimizer: made of the parameters; its rate falls to zero by a cosine.
        augment: changes a batch of images at random.
        pruner: more arguments of `Pruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        data: Iterable[Any],
        *,
        curve: str = "cubic",
        sparsity: float = 0.95,
        steps: int = 300,
        prunings: int = 10,
        batch: int = 64,
        seed: int = 0,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adamw,
        augment: Augment | None = None,
        **pruner: Any,
    ) -> None:
        self.model, self.images, self.targets = model, images, targets
        self.steps, self.batch, self.seed, self.augment = steps, batch, seed, augment
        end = steps // 2
        when = {} if curve == "one_shot" else {"end": end, "frequency": max(1, math.ceil(end / prunings))}
        self.pruner = Pruner(
            model,
            schedule=SCHEDULES[curve](final_sparsity=sparsity, **when),
            data=data,
            loss_fn=nn.functional.cross_entropy,
            seed=seed,
            progress=False,
            **pruner,
        )
        self.optimizer = optimizer(model.parameters())
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.pruner.attach(self.optimizer)
        self.done = 0

    def step(self) -> None:
        """Prune if it is time, and train on one batch."""
        self.pruner.step()
        self.model.train()
        epoch, index = divmod(self.done, len(self.images) // self.batch)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(2**20 * self.seed + epoch))
        chosen = order[index * self.batch : (index + 1) * self.batch]
        images = self.images[chosen]
        if self.augment is not None:
            images = self.augment(images, torch.Generator().manual_seed(2**20 * (self.seed + 1) + self.done))
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), self.targets[chosen]).backward()
        self.optimizer.step()
        self.decay.step()
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """All that `step` depends on."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "decay", "pruner")}
        return parts | {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in ("model", "optimizer", "decay", "pruner"):
            getattr(self, name).load_state_dict(state[name])
        self.done = state["done"]

    def finish(self, path: Path | None = None, every: int = 10, progress: bool = True) -> None:
        """Take the steps that are left, with a checkpoint now and then."""
        if path is not None and path.exists():
            self.load_state_dict(checkpoint.load(path))
        for _ in progress_bar(range(self.done, self.steps), what="training", show=progress):
            self.step()
            if path is not None and (self.done % every == 0 or self.done == self.steps):
                checkpoint.save(self.state_dict(), path)
        self.pruner.finalize()
        self.model.eval()

    def digest(self) -> str:
        """Hash weights and masks, to the bit."""
        tensors = {**self.model.state_dict(), **{f"mask of {n}": m for n, m in self.pruner.masks.items()}}
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


def train(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Go on from the checkpoint, if there is one, to the end."""
    training, test = digits(arguments.seed)
    run = Run(
        network(arguments.seed),
        training.images,
        training.digits,
        training.batches(),
        curve=arguments.schedule,
        sparsity=arguments.sparsity,
        steps=arguments.steps,
        seed=arguments.seed,
        curvature=arguments.curvature,
        num_grads=arguments.num_grads,
    )
    run.finish(path, arguments.every, progress=not arguments.kills)
    sparsity = run.pruner.finalize().sparsity
    return {"sparsity": sparsity, "accuracy": accuracy(run.model, test), "digest": run.digest()}


def killed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once, then again with kills at random times, anew where it ends; RuntimeError if an end is another."""
    start, not_killed = time.perf_counter(), arguments.checkpoint.with_stem(arguments.checkpoint.stem + "_whole")
    for older in (arguments.checkpoint, not_killed):
        older.unlink(missing_ok=True)
    whole = train(arguments, not_killed)
    longest = 5 * (time.perf_counter() - start) / arguments.kills
    context, chance = multiprocessing.get_context("fork"), random.Random(arguments.seed)
    steps_done, runs = list[int](), 0
    while len(steps_done) < arguments.kills or not runs:
        process = context.Process(target=train, args=(arguments, arguments.checkpoint))
        process.start()
        process.join(chance.uniform(0, longest) if len(steps_done) < arguments.kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            steps_done.append(checkpoint.load(arguments.checkpoint)["done"] if arguments.checkpoint.exists() else 0)
            continue
        runs += 1
        if process.exitcode or (again := train(arguments, arguments.checkpoint)) != whole:
            raise RuntimeError(f"after kills the run ends with {process.exitcode}, {again}; without with {whole}")
        if len(steps_done) < arguments.kills:
            arguments.checkpoint.unlink()
    return whole | {"kills": arguments.kills, "runs": runs, "steps_done": steps_done}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="written while it runs, and gone on from")
    parser.add_argument("--every", type=int, default=10, help="steps from one checkpoint to the next")
    parser.add_argument("--kills", type=int, default=0, help="kill a second run so often, and compare")
    parser.add_argument("--curvature", default="block")
    parser.add_argument("--schedule", choices=SCHEDULES, default="cubic")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-grads", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    if arguments.kills:
        torch.set_num_threads(1)  # a process with threads does not survive being forked
        print(json.dumps(killed(arguments)))
    else:
        print(json.dumps(train(arguments, arguments.checkpoint)))


if __name__ == "__main__":
    main()
