"""Quantizes ResNet-20 on CIFAR-10 and a small language model, without retraining: quality against the size of the file.

    python bench/studies/quantization.py --data DIR [--parts resnet20 pruned stories layers] [--out FILE]

DIR holds `models/resnet20_cifar10.pt`, `cifar10/` and `stories260k/`. Accuracies are of the 10,000 test images,
held-out ones of the last 10,000 training images; losses are of 56 test stories, in nats per token. Curvature is of
2,048 training images, or of 128 sequences that the language model wrote itself. "layers" quantizes one layer of
ResNet-20 alone, and all: what the diagonal Fisher matrix predicts, and the divergence of the outputs (of 1,024 of these
images).
Resumable: what is in FILE is not run again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fishleg_ext import Pruner, prune, quantize
from fishleg_ext.bench.studies.cifar10 import Cifar10, ResNet20
from fishleg_ext.bench.studies.resnet20 import machine
from fishleg_ext.curvature import DiagonalFisher
from fishleg_ext.quantizer import DAMPING

BITS = (4, 3, 2)
METHODS: dict[str, dict[str, Any]] = {
    "uniform bits, per row": {"method": "fixed_point", "group": "row", "curvature": "identity", "allocate": False},
    "magnitude bits, per row": {"method": "fixed_point", "group": "row", "curvature": "identity"},
    "Fisher bits, per row": {"method": "fixed_point", "group": "row"},
    "k-means, equal bits": {"curvature": "identity", "allocate": False},
    "k-means, magnitude bits": {"curvature": "identity"},
    "Fisher k-means, equal bits": {"allocate": False},
    "Fisher k-means": {},
    "uniform grid, entropy": {"coding": "entropy", "curvature": "identity"},
    "Fisher grid, entropy": {"coding": "entropy"},
    "GPTQ, per row": {
        "method": "obq",
        "curvature": "layerwise",
        "order": "given",
        "grid": "fixed_point",
        "group": "row",
        "allocate": False,
    },
    "OBQ by FishLeg, per row": {
        "method": "obq",
        "curvature": "fishleg",
        "grid": "fixed_point",
        "group": "row",
        "allocate": False,
    },
    "OBQ, layerwise": {"method": "obq", "curvature": "layerwise"},
    "OBQ, block": {"method": "obq", "curvature": "block"},
    "OBQ, K-FAC": {"method": "obq", "curvature": "kronecker"},
    "OBQ, FishLeg": {"method": "obq", "curvature": "fishleg"},
    "OBQ, FishLeg, entropy": {"method": "obq", "curvature": "fishleg", "coding": "entropy"},
}
OF_PRUNED = (
    "k-means, equal bits",
    "Fisher k-means, equal bits",
    "Fisher k-means",
    "uniform grid, entropy",
    "Fisher grid, entropy",
    "OBQ by FishLeg, per row",
    "OBQ, FishLeg",
    "OBQ, FishLeg, entropy",
)
KINDS = ("Fisher", "magnitude")
OF_STORIES = (
    "uniform bits, per row",
    "magnitude bits, per row",
    "Fisher bits, per row",
    "k-means, equal bits",
    "Fisher k-means, equal bits",
    "Fisher k-means",
    "Fisher grid, entropy",
    "GPTQ, per row",
    "OBQ by FishLeg, per row",
    "OBQ, layerwise",
    "OBQ, block",
    "OBQ, FishLeg",
    "OBQ, FishLeg, entropy",
)


class Study:
    """Rows of results, in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        self.content |= machine()
        self.commit = self.content.pop("commit")[:12]  # of each row

    @property
    def rows(self) -> dict[str, Any]:
        """What there is, by key."""
        return self.content["rows"]

    def run(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a row unless it is there."""
        if key not in self.rows:
            self.rows[key] = row = measure() | {"commit": self.commit}
            print(key, {name: value for name, value in row.items() if name not in ("sizes", "points")}, flush=True)
            self.path.parent.mkdir(exist_ok=True, parents=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def quantized(
    model: nn.Module, data: Any, quality: Callable[[nn.Module], dict[str, float]], **options: Any
) -> dict[str, Any]:
    """One row of results, of a copy."""
    model, start = copy.deepcopy(model), time.perf_counter()
    result = quantize(model, data, progress=False, **options)
    seconds = time.perf_counter() - start
    sizes = {"bytes": result.size, "ratio": result.dense_size / result.size, "mean_bits": result.mean_bits}
    return quality(model) | sizes | {"distortion": result.distortion, "seconds": seconds}


def resnet20(folder: Path, study: Study, pruned: bool) -> None:
    """All methods, of the dense network or of one that FishLeg pruned to 80 %."""
    data, network = Cifar10(folder / "cifar10"), ResNet20()
    network.load_state_dict(torch.load(folder / "models" / "resnet20_cifar10.pt", weights_only=True))
    calibration, masks, name = data.training_batches(0, 2048), None, "ResNet-20"
    quality = lambda model: {"accuracy": data.accuracy(model), "held_out_accuracy": data.accuracy(model, held_out=True)}
    if pruned:
        name = "ResNet-20, 80 % pruned"
        masks = prune(network, calibration, sparsity=0.8, curvature="fishleg", progress=False).masks
    study.run(f"{name} | float32 | 32", lambda: quality(network))
    for bits in BITS:
        for method in OF_PRUNED if pruned else METHODS:
            options = METHODS[method]
            grads = {} if options.get("curvature") == "identity" else {"num_grads": 2048}
            run = lambda o=options, b=bits, g=grads: quantized(
                network, calibration, quality, bits=b, masks=masks, **g, **o
            )
            study.run(f"{name} | {method} | {bits}", run)


def layers(folder: Path, study: Study) -> None:
    """Predicted and measured divergence, in nats, of one layer at a time and of all."""
    data, network = Cifar10(folder / "cifar10"), ResNet20()
    network.load_state_dict(torch.load(folder / "models" / "resnet20_cifar10.pt", weights_only=True))
    calibration = data.training_batches(0, 2048)
    images = torch.cat([x for x, _ in calibration])[:1024]

    @torch.no_grad()
    def outputs(model: nn.Module) -> Tensor:
        return torch.cat([model(x).double().log_softmax(1) for x in images.split(256)])

    original = outputs(network)

    def divergence(model: nn.Module) -> float:
        return float((original.exp() * (original - outputs(model))).sum(1).mean())

    recipe = DiagonalFisher(num_grads=2048, labels="model", damping=DAMPING)
    pruner = Pruner(network, curvature=recipe, progress=False)
    pruner.estimate(calibration)
    inverse = pruner.curvature.diag()
    equal = METHODS["Fisher k-means, equal bits"]
    runs = [(f"{bits} bits", equal | {"bits": bits}) for bits in (1, 2, 3, 4)]
    runs += [(f"{kind} bits of rows, 3 on average", METHODS[f"{kind} bits, per row"] | {"bits": 3}) for kind in KINDS]
    for what, options in runs:
        model = copy.deepcopy(network)
        result = quantize(model, calibration, num_grads=2048, progress=False, **options)
        total = 0.0
        for name, tensor in result.tensors.items():
            one = copy.deepcopy(network)
            with torch.no_grad():
                one.get_parameter(name).copy_(model.get_parameter(name))
            step = tensor.orientation.to_matrix(one.get_parameter(name).detach() - network.get_parameter(name).detach())
            predicted = float(0.5 * (step.double().square() / inverse[name]).sum())
            total += predicted
            row = {"predicted": predicted, "mean_bits": float(tensor.bits.float().mean())}
            study.run(f"layers | {name} | {what}", lambda one=one, row=row: row | {"divergence": divergence(one)})
        row = {"predicted": total, "mean_bits": result.mean_bits}
        study.run(f"layers | all | {what}", lambda model=model, row=row: row | {"divergence": divergence(model)})


def stories(folder: Path, study: Study) -> None:
    """A Llama of 227,200 weights in blocks; its embedding stays as it is."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "stories260k").eval()
    read = lambda name: json.loads((folder / "stories260k" / f"{name}.json").read_text())
    sequences = torch.tensor(read("calibration")[:128])
    calibration = [{"input_ids": x, "labels": x} for x in sequences.split(8)]
    test = [torch.tensor(story)[None] for story in read("stories")["test"]]

    @torch.no_grad()
    def loss(model: nn.Module) -> dict[str, float]:
        total, count = 0.0, 0
        for story in test:
            predicted: Tensor = model(story).logits[0, :-1].log_softmax(1)
            total -= float(predicted.gather(1, story[0, 1:, None]).sum())
            count += story.numel() - 1
        return {"nats": total / count}

    study.run("stories260K | float32 | 32", lambda: loss(model))
    for bits in (4, 3):
        for method in OF_STORIES:
            options = METHODS[method] | {"bits": bits, "params": "re:proj", "loss_fn": None}
            study.run(f"stories260K | {method} | {bits}", lambda o=options: quantized(model, calibration, loss, **o))


def table(rows: dict[str, Any]) -> str:
    """Every row: quality, size, bits."""
    qualities = ("accuracy", "held_out_accuracy", "nats", "predicted", "divergence")
    columns = (*qualities, "bytes", "ratio", "mean_bits", "seconds")
    lines = [[*key.split(" | "), *(row.get(column, "") for column in columns)] for key, row in rows.items()]
    return tabulate(lines, ["network", "method", "bits", *columns], floatfmt=".4g")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["resnet20", "pruned", "stories", "layers"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/quantization.json"))
    options = parser.parse_args()
    study = Study(options.out)
    for part in options.parts:
        if part in ("resnet20", "pruned"):
            resnet20(options.data, study, part == "pruned")
        else:
            {"stories": stories, "layers": layers}[part](options.data, study)
    print(table(study.rows))


if __name__ == "__main__":
    main()
