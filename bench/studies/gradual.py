"""Pruning over a training run against pruning in one shot, by every curvature model.

    python bench/studies/gradual.py                                # the network of `fishleg-ext demo`
    python bench/studies/gradual.py --network resnet20 --data DIR  # that of resnet20.py, which says what is in DIR

Each begins from the trained network. "One shot" is as pruned; "one shot, trained" and "gradual" take the same steps of
training on the same batches, after the pruning and around it. Accuracies are of all test images, with the standard
deviation over seeds where there are several: of the order of batches, and for digits of the split and the network, too.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fishleg_ext
from fishleg_ext import demo, prune
from fishleg_ext.bench.studies.gradual_digits import Run, adamw
from fishleg_ext.common.progress import progress_bar

MODELS: dict[str, dict[str, Any]] = {
    "magnitude": {"curvature": "identity"},
    "diagonal": {"curvature": "diagonal", "labels": "model"},
    "block": {"curvature": "block", "labels": "model"},
    "low rank (M-FAC)": {"curvature": "low_rank", "num_grads": 256},
    "layerwise, counts by block": {"curvature": "layerwise", "allocation": "block"},
    "Kronecker (K-FAC)": {"curvature": "kronecker"},
    "FishLeg": {"curvature": "fishleg"},
}
WAYS = {"one shot": None, "one shot, trained": "one_shot", "gradual": "cubic"}


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to 4 pixels, and mirrored every other time, all images of a batch alike."""
    y, x, mirrored = (int(torch.randint(0, n, (), generator=generator)) for n in (9, 9, 2))
    images = nn.functional.pad(images, (4, 4, 4, 4))[..., y : y + images.shape[2], x : x + images.shape[3]]
    return images.flip(3) if mirrored else images


def of_digits(
    arguments: argparse.Namespace, seed: int
) -> tuple[nn.Module, dict[str, Any], Callable[[nn.Module], float]]:
    """The trained network, arguments of `Run`, and what is measured."""
    training, test = demo.digits(seed)
    model = demo.network(seed)
    demo.train(model, training, seed=seed, progress=False)
    data = {"images": training.images, "targets": training.digits, "data": training.batches(), "optimizer": adamw}
    return model, data, lambda model: demo.accuracy(model.eval(), test)


def of_resnet20(
    arguments: argparse.Namespace, seed: int
) -> tuple[nn.Module, dict[str, Any], Callable[[nn.Module], float]]:
    """The same of ResNet-20, of which there is one."""
    from fishleg_ext.bench.studies.cifar10 import WEIGHTS, Cifar10, ResNet20

    cifar = Cifar10(arguments.data / "cifar10")
    model = ResNet20()
    model.load_state_dict(torch.load(arguments.data / "models" / "resnet20_cifar10.pt", weights_only=True))
    images, labels = (torch.cat(part) for part in zip(*cifar.training_batches(0, 20000), strict=True))
    sgd = lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9, weight_decay=5e-4)
    estimated = cifar.training_batches(0, 2048)
    data = {"images": images, "targets": labels, "data": estimated, "batch": 128, "augment": crop_and_flip}
    return model.eval(), data | {"optimizer": sgd, "params": WEIGHTS}, cifar.accuracy


def measure(arguments: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """A row for each model and way, and one for the network as it came."""
    model, data, accuracy = (of_digits if arguments.network == "digits" else of_resnet20)(arguments, seed)
    rows: list[dict[str, Any]] = [{"seed": seed, "model": "dense", "way": "one shot", "accuracy": accuracy(model)}]
    chosen = [name for name in MODELS if any(part in name for part in arguments.only)]
    bar = progress_bar(what=f"seed {seed}", total=len(chosen) * len(WAYS), show=True)
    for name in chosen:
        for way, curve in WAYS.items():
            options = {"num_grads": arguments.num_grads, **MODELS[name]}
            pruned, start = copy.deepcopy(model), time.perf_counter()
            if curve is None:
                params = {"params": data["params"]} if "params" in data else {}
                prune(pruned, data["data"], sparsity=arguments.sparsity, progress=False, seed=seed, **options, **params)
            else:
                refined = {"refine_grads": arguments.num_grads // 4} if options["curvature"] == "fishleg" else {}
                run = Run(
                    pruned,
                    curve=curve,
                    sparsity=arguments.sparsity,
                    steps=arguments.steps,
                    seed=seed,
                    **data,
                    **options,
                    **refined,
                )
                run.finish(progress=False)
            seconds = time.perf_counter() - start
            rows.append({"seed": seed, "model": name, "way": way, "accuracy": accuracy(pruned), "seconds": seconds})
            bar.update()
    bar.close()
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("digits", "resnet20"), default="digits")
    parser.add_argument("--data", type=Path, help="folder of networks and data, for resnet20")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--only", nargs="+", default=[""], help="models whose name has one of these in it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, help="write the numbers into this file, too")
    arguments = parser.parse_args()
    if arguments.network == "resnet20" and arguments.data is None:
        parser.error("--network resnet20 needs --data")
    rows = [row for seed in arguments.seeds for row in measure(arguments, seed)]
    print(f"{arguments.network}, {arguments.sparsity:.0%} pruned, {arguments.steps} steps, test accuracy in percent")
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        of_seeds = [other["accuracy"] for other in rows if (other["model"], other["way"]) == (row["model"], row["way"])]
        spread = f" ± {statistics.stdev(of_seeds):.1f}" if len(of_seeds) > 1 else ""
        table.setdefault(row["model"], {"model": row["model"]})[row["way"]] = f"{statistics.mean(of_seeds):.1f}{spread}"
    print(tabulate(list(table.values()), headers="keys", disable_numparse=True))
    if arguments.out:
        settings = {name: getattr(arguments, name) for name in ("network", "sparsity", "steps", "num_grads", "seeds")}
        machine = {"torch": torch.__version__, "fishleg_ext": fishleg_ext.__version__, "machine": platform.machine()}
        report = {**settings, **machine, "threads": torch.get_num_threads(), "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
