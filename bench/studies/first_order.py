"""What the first-order term gives where training has not ended: the network of `fishleg-ext demo` after few epochs.

    python bench/studies/first_order.py

Pruned in one shot without it, with it as by default, and with the whole step.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from tabulate import tabulate

import fishleg_ext
from fishleg_ext import demo, prune

EPOCHS = (1, 3)
SPARSITIES = (0.5, 0.8, 0.9)
CURVATURES = ("block", "kronecker", "fishleg")
WAYS = {"without": False, "with": True, "whole step": 1.0}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers into this file, too")
    arguments = parser.parse_args()
    training, test = demo.digits(arguments.seed)
    rows = []
    for epochs in EPOCHS:
        model = demo.network(arguments.seed)
        demo.train(model, training, epochs=epochs, seed=arguments.seed, progress=False)
        dense = demo.accuracy(model, test)
        for curvature in CURVATURES:
            for way, first_order in WAYS.items():
                row = {"epochs": epochs, "dense": dense, "curvature": curvature, "first-order term": way}
                for sparsity in SPARSITIES:
                    pruned = copy.deepcopy(model)
                    options = {"curvature": curvature, "num_grads": 1024, "seed": arguments.seed, "progress": False}
                    result = prune(pruned, training.batches(), sparsity=sparsity, first_order=first_order, **options)
                    row[f"{sparsity:.0%}"] = demo.accuracy(pruned, test)
                    row["share"] = result.history[-1].get("first_order_share")
                rows.append(row)
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    if arguments.out:
        versions = {"torch": torch.__version__, "fishleg_ext": fishleg_ext.__version__, "seed": arguments.seed}
        arguments.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
