"""Prunes networks of 10^4 to 10^8 weights by every method: seconds and peak memory of each stage, and their floors.

    python bench/studies/scale.py --data DIR [--networks mlp256 resnet20 ...] [--methods block fishleg ...]
        [--device cuda] [--out FILE]

Seconds on a CPU are CPU seconds of all threads, and each method runs in a process of its own, whose peak memory is
measured; on a GPU they are those of a clock, and memory is what PyTorch allocated there. The floor of a stage is its
arithmetic, counted below, at the rate of a product of square float32 matrices in the same process; a stage that moves
memory more than it computes is further from it. Networks are MLPs of three layers of some width on random data
(`mlp256`), ResNet-50 and BERT-base as `transformers` makes them, untrained and on random data, and those of
`cifar10.py`, whose accuracy on the 10,000 test images is measured as well. DIR is that of `resnet20.py`, with
`models/resnet18_cifar10.pt` (a state dict of `cifar10.ResNet18`).
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fishleg_ext import Pruner
from fishleg_ext.bench.studies import cifar10
from fishleg_ext.bench.studies.resnet20 import machine, peak_memory
from fishleg_ext.bench.studies.tables import STAGES, stage_cells
from fishleg_ext.round import Round

METHODS: dict[str, dict[str, Any]] = {
    "identity": {"curvature": "identity"},
    "diagonal": {"curvature": "diagonal"},
    "block": {"curvature": "block"},
    "low_rank": {"curvature": "low_rank"},
    "kronecker": {"curvature": "kronecker"},
    "layerwise": {"curvature": "layerwise"},
    "fixed_order": {"curvature": "layerwise", "saliency": "fixed_order"},
    "layerwise by block": {"curvature": "layerwise", "allocation": "block"},
    "fishleg": {"curvature": "fishleg"},
}
NETWORKS = ("mlp256", "mlp512", "mlp1024", "mlp2048", "resnet20", "resnet18")  # and resnet50, bert_base
SPARSITIES = (0.9, 0.8, 0.95)
SHARED = {"layerwise", "kronecker", "fishleg"}  # curvature whose rows share an inverse
wall = time.perf_counter  # also where the stages are timed by another clock


def network(name: str, folder: Path) -> tuple[nn.Module, list[Any], Callable[[nn.Module], float] | None, Any]:
    """A network, data, how accurate it is, and which parameters are pruned."""
    torch.manual_seed(0)
    if name.startswith("mlp"):
        width = int(name.removeprefix("mlp"))
        sizes = [64, width, width, width]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        data = [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(32)]
        return nn.Sequential(*layers, nn.Linear(width, 10)), data, None, None
    if name in ("resnet50", "bert_base"):
        return *untrained(name), None, None
    model = {"resnet20": cifar10.ResNet20, "resnet18": cifar10.ResNet18}[name]()
    state = torch.load(folder / "models" / f"{name}_cifar10.pt", weights_only=True)
    model.load_state_dict(state)
    inputs = cifar10.RESNET20_INPUTS if name == "resnet20" else cifar10.RESNET18_INPUTS
    cifar = cifar10.Cifar10(folder / "cifar10", inputs)
    params = cifar10.WEIGHTS if name == "resnet20" else None
    return model.eval(), cifar.training_batches(0, 2048), cifar.accuracy, params


class Logits(nn.Module):
    """A model of `transformers` as a function of a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of images or tokens."""
        return self.model(inputs).logits


def untrained(name: str) -> tuple[nn.Module, list[Any]]:
    """ResNet-50 and images of 224 x 224, or BERT-base and sequences of 128 tokens: 2,048 of them."""
    import transformers

    if name == "resnet50":
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
        data = [(torch.randn(64, 3, 224, 224), torch.randint(1000, (64,))) for _ in range(32)]
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig())
        data = [(torch.randint(30_000, (64, 128)), torch.randint(2, (64,))) for _ in range(32)]
    return Logits(model).eval(), data


def floors(model: nn.Module, pruner: Pruner, data: list[Any], method: str) -> dict[str, float]:
    """Operations of each stage, at least: see the module's docstring."""
    options = METHODS[method]
    curvature, saliency = options["curvature"], options.get("saliency")
    count = pruner.estimator.num_grads
    with FlopCounterMode(display=False) as counter:
        model(data[0][0][:1])
    passes = 0 if curvature == "identity" else 1 if curvature == "layerwise" else 3
    observation = float(counter.get_total_flops() * passes * count)
    eliminated = compensated = 0.0
    sizes = _positions(model, data)
    for name, weight in pruner.weights.items():
        out, fan_in, positions = len(weight), weight[0].numel(), sizes[name]
        if curvature == "block":
            observation += weight.numel() * 128 * count
            eliminated += weight.numel() * 128**2 * (1 / 3 + 1)  # and the inverses
            compensated += weight.numel() * 128**2 * (0.9**3 / 3 + 1)  # the inverses, which are not kept, anew
        elif curvature == "low_rank":
            observation += weight.numel() * 2 * positions * count
            eliminated += weight.numel() * count * (2 + 2 * count)  # half of G G^T, L^-1 G and the diagonal
            compensated += weight.numel() * count * 4
        elif curvature in SHARED:
            observation += positions * fan_in**2 * count if curvature != "fishleg" else 0
            if curvature == "fishleg":
                observation += min(positions * 2, out) * fan_in**2 * 1.25 * count
            inverted = float(fan_in**3)
            eliminated += out * fan_in**2 if saliency == "fixed_order" else out * fan_in**3 / 3
            eliminated += 2 / 3 * inverted if saliency == "fixed_order" else inverted
            compensated += 0 if saliency == "fixed_order" else 2 * inverted + out * fan_in**2
    if saliency == "fixed_order":
        return {"observation": observation, "compensation": eliminated}
    return {"observation": observation, "saliency": eliminated, "compensation": compensated}


def _positions(model: nn.Module, data: list[Any]) -> dict[str, int]:
    """Name of a weight -> rows that one sample makes of its inputs."""
    found: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):

            def note(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                found[f"{name}.weight"] = output[0].numel() // len(module.weight)  # type: ignore[arg-type]

            handles.append(module.register_forward_hook(note))
    model(data[0][0][:1])
    for handle in handles:
        handle.remove()
    return found


def gemm_rate(device: str) -> float:
    """Operations a second, of the CPU or of a clock, of a product of two float32 matrices."""
    side = 1024 if device == "cpu" else 8192
    a, best = torch.randn(side, side, device=device), float("inf")
    for _ in range(5):
        start = seconds(device)
        a @ a
        best = min(best, seconds(device) - start)
    return 2 * side**3 / best


def seconds(device: str) -> float:
    """Return seconds of all threads of the CPU, or of a clock once the GPU has done all that it was given."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return wall()


def run(name: str, method: str, folder: Path, sparsities: list[float], device: str) -> Iterator[dict[str, Any]]:
    """Prune to each sparsity by one estimate."""
    warnings.simplefilter("ignore")
    _warm_up(METHODS[method], device)
    model, data, accuracy, params = network(name, folder)
    model, data = model.to(device), [(inputs.to(device), targets.to(device)) for inputs, targets in data]
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    rate = gemm_rate(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = wall()
    pruner = Pruner(model, params=params, progress=False, **METHODS[method])
    pruner.estimate(data, F.cross_entropy)
    estimators, estimating = (pruner.estimator, pruner.allocator), dict(pruner._timed.seconds)
    estimated = wall() - start
    counted = floors(model, pruner, data, method)
    once: dict[str, float] = {}  # stages that do not depend on the sparsity
    found: dict[Any, Any] = {}
    costs = Round._costs

    def costs_once(self: Round, estimator: Any, solver: Any, group: list[str], stage: str) -> Any:
        key = (stage, *group)
        if key not in found:
            found[key] = costs(self, estimator, solver, group, stage)
        return found[key]

    for sparsity in sparsities:
        model.load_state_dict(dense)
        pruner = Pruner(model, params=params, progress=False, **METHODS[method])
        pruner.estimator, pruner.allocator = estimators
        start = wall()
        with mock.patch.object(Round, "_costs", costs_once):
            result = pruner.prune_to(sparsity)
        own = result.history[-1]["seconds"]
        once = once or {stage: own[stage] for stage in ("saliency", "allocation") if stage in own}
        stages = estimating | {key: estimating.get(key, 0) + s for key, s in (once | own).items()}
        yield {
            "network": name,
            "method": method,
            "weights": sum(weight.numel() for weight in pruner.weights.values()),
            "sparsity": sparsity,
            "stages": stages,
            "seconds": estimated + wall() - start if sparsity == sparsities[0] else None,  # all stages, in one go
            "floors": {stage: operations / rate for stage, operations in counted.items()},
            "peak_mib": peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20,
            "accuracy": accuracy(model) if accuracy else None,
        }


def _warm_up(options: dict[str, Any], device: str) -> None:
    """Prune a tiny network, so that modules and libraries which torch loads when they are first needed are there."""
    data = [(torch.randn(8, 4, device=device), torch.randint(2, (8,), device=device))]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)
    pruner = Pruner(model, progress=False, num_grads=8, **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)


def main() -> None:
    """Run each pruning in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        time.perf_counter = time.process_time  # which the stages are timed with
        for record in run(arguments.networks[0], arguments.methods[0], arguments.data, arguments.sparsities, "cpu"):
            print(json.dumps(record), flush=True)
        return
    records: list[dict[str, Any]] = []
    for name, method in itertools.product(arguments.networks, arguments.methods):
        sparsities = arguments.sparsities if name in ("resnet20", "resnet18") else [0.9]
        try:
            if arguments.device == "cpu":
                records.extend(in_a_process(name, method, sparsities, arguments))
            else:
                records.extend(run(name, method, arguments.data, sparsities, "cuda"))
        except (RuntimeError, ValueError) as error:  # as where memory ran out
            print(f"{name}, {method}: {error}", file=sys.stderr)
        if arguments.out:
            device = {} if arguments.device == "cpu" else {"device": torch.cuda.get_device_name()}
            arguments.out.write_text(json.dumps({"machine": machine() | device, "runs": records}, indent=1) + "\n")
    print(tabulate(list(map(row, records)), headers="keys", floatfmt=".3g"))


def in_a_process(
    name: str, method: str, sparsities: list[float], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Run one method in a process of its own; RuntimeError where it fails, after what it has found by then."""
    command = [sys.executable, __file__, "--one", "--data", str(options.data), "--networks", name, "--methods", method]
    command += ["--threads", str(options.threads), "--sparsities", *map(str, sparsities)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    yield from map(json.loads, done.stdout.splitlines())
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])


def row(record: dict[str, Any]) -> dict[str, Any]:
    """A line of the table: each stage in seconds, and in brackets how many times its floor."""
    stages = dict(zip(STAGES, stage_cells(record), strict=True))
    keys = ("network", "method", "weights", "sparsity")
    total = {"seconds": sum(record["stages"].values()), "wall": record["seconds"], "peak MiB": record["peak_mib"]}
    return {key: record[key] for key in keys} | stages | total | {"accuracy": record["accuracy"]}


if __name__ == "__main__":
    main()
