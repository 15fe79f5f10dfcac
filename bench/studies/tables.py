"""Tables of the studies' results, made from the files of bench/results/ alone: `python bench/studies/tables.py NAME`.

The docs put them where a page says {{ NAME }}.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fishleg_ext.bench import report
from fishleg_ext.bench.studies import autoencoder, autoencoder_pruning, language

# What older files call by other words.
WORDS = {
    "carried over": "warm start",
    "anew": "from scratch",
    "counts by": "allocation by",
    ", every layer alike": "",
    "1 rounds": "1 round",
    ", one threshold": ", global",
}
RESULTS = Path(__file__).parents[1] / "results"


def runs(name: str) -> list[dict[str, Any]]:
    """The records of a results file."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return found.get("runs") or found["rows"]


def markdown(rows: Iterable[list[Any]], headers: list[str]) -> str:
    """A table as Markdown has it."""
    return tabulate(list(rows), headers, tablefmt="github", disable_numparse=True)


def spread(values: list[float]) -> str:
    """Mean and (sample) standard deviation, or the one value."""
    if len(values) == 1:
        return f"{values[0]:.1f} (1 draw)"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def both(record: dict[str, Any]) -> str:
    """Accuracy without and with BatchNorm recalibrated."""
    return f"{record['accuracy']:.1f} / {record['accuracy_recalibrated']:.1f}"


def by_sparsity(
    records: list[dict[str, Any]], cell: Callable[[list[dict[str, Any]]], str], label: str = "test accuracy, %"
) -> str:
    """A row for each method, a column for each sparsity."""
    columns = sorted({round(record["sparsity"], 3) for record in records})
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == method]
        cells = [[r for r in mine if round(r["sparsity"], 3) == column] for column in columns]
        rows.append([method, *(cell(found) if found else "" for found in cells)])
    return markdown(rows, [label, *(f"{100 * column:.3g} %" for column in columns)])


def accuracies(records: list[dict[str, Any]]) -> str:
    """The spread of accuracy over records."""
    return spread([record["accuracy"] for record in records])


def renamed(records: Iterable[dict[str, Any]], *endings: str) -> list[dict[str, Any]]:
    """Records with their methods' names less what all have in common."""
    result = []
    for record in records:
        method = record["method"]
        for ending in endings:
            method = method.removeprefix(ending).removesuffix(ending)
        for old, new in WORDS.items():
            method = method.replace(old, new)
        result.append(record | {"method": method})
    return result


def table() -> str:
    """Every method of one draw."""
    records = [r for r in runs("resnet20_cifar10") if "rounds" not in r["method"] and r["draw"] == 0]
    unique = {(r["method"], round(r["sparsity"], 3)): r for r in records}
    return by_sparsity(list(unique.values()), lambda found: f"{found[0]['accuracy']:.2f}")


def rounds() -> str:
    """Exact greedy elimination in rounds."""
    records = [r for r in runs("resnet20_cifar10") if "rounds" in r["method"] and r["sparsity"] > 0.7]
    return by_sparsity(renamed(records, "exact greedy, B=128, ", ", 8 rounds"), accuracies, "damping")


def layerwise() -> str:
    """Mixtures of the block Fisher matrix and layerwise curvature."""
    records = renamed([*runs("resnet20_layerwise_one_shot"), *runs("resnet20_layerwise")])
    return by_sparsity(records, lambda found: both(found[-1]))


def refinement() -> str:
    """The auxiliary loss after a round, by gradients."""
    records = [record for record in runs("resnet20_fishleg_rounds") if record["method"] == "refinement"]
    counts = sorted({record["gradients"] for record in records})
    rows = []
    for number in sorted({record["round"] for record in records}):
        for way in ("anew", "carried over"):
            found = {r["gradients"]: r[way] for r in records if r["round"] == number}
            rows.append([f"round {number}, {WORDS[way]}", *(f"{found[count] / 1e9:,.2f}" for count in counts)])
    return markdown(rows, ["loss / 10⁹", *map(str, counts)])


def carried() -> str:
    """FishLeg in rounds, from scratch and warm."""
    records = [record for record in runs("resnet20_fishleg_rounds") if record["method"] != "refinement"]
    return by_sparsity(renamed(records, "FishLeg, 8 rounds, "), lambda found: both(found[0]))


def gradual() -> str:
    """One shot, one shot then trained, and gradual, on two networks."""
    ways = ("one shot", "one shot, trained", "gradual")
    records = {network: runs(f"gradual_{network}") for network in ("digits", "resnet20")}
    rows = []
    for model in dict.fromkeys(r["model"] for r in records["digits"] if r["model"] != "dense"):
        row = [model]
        for found in records.values():
            for way in ways:
                values = [r["accuracy"] for r in found if (r["model"], r["way"]) == (model, way)]
                row.append(spread(values).removesuffix(" (1 draw)") if values else "")
        rows.append(row)
    shown = ("one shot", "then trained", "gradual")
    return markdown(rows, ["test accuracy, %", *(f"{network}: {way}" for network in records for way in shown)])


def first_order() -> str:
    """Without the first-order term, with it, and with the whole step."""
    records, ways = runs("first_order_digits"), ("without", "with", "whole step")
    sparsities = [key for key in records[0] if key.endswith("%")]
    rows = []
    for epochs, curvature in dict.fromkeys((r["epochs"], r["curvature"]) for r in records):
        mine = {r["first-order term"]: r for r in records if (r["epochs"], r["curvature"]) == (epochs, curvature)}
        cells = [" / ".join(f"{mine[way][sparsity]:.1f}" for way in ways) for sparsity in sparsities]
        rows.append([f"{epochs} epoch{'s' * (epochs > 1)}, {curvature}", *cells])
    return markdown(rows, ["test accuracy, %", *sparsities])


def readme() -> str:
    """Six methods, and the spread of the default over at least five draws."""
    shown = {
        "magnitude": "magnitude",
        "block, simultaneous": "WoodFisher, oBERT (damping 1e-3)",
        "K-FAC": "K-FAC",
        "counts by block, then layerwise": "layerwise, allocation by block",
        "FishLeg": "FishLeg",
    }
    draws = renamed(runs("resnet20_block_draws"), ", side by side")
    count = len({record["draw"] for record in draws})
    default = f"exact greedy (the default), 1,024 images, {count} draws"
    records = [
        record | {"method": record["method"].removesuffix(", side by side")} for record in runs("resnet20_models")
    ]
    records = [record | {"method": shown[record["method"]]} for record in records if record["method"] in shown]
    records = [record | {"method": default} for record in draws] + records
    wanted = [*list(shown.values())[:2], default, *list(shown.values())[2:]]
    records.sort(key=lambda record: wanted.index(record["method"]))
    return by_sparsity([r for r in records if round(r["sparsity"], 2) in (0.5, 0.7, 0.8, 0.9)], accuracies)


STAGES = ("observation", "allocation", "saliency", "selection", "compensation")


def stage_cells(record: dict[str, Any]) -> list[str]:
    """Seconds of each stage of a run of `scale.py`, and in brackets how many times its floor."""
    cells = []
    for stage in STAGES:
        seconds, floor = record["stages"].get(stage), record["floors"].get(stage)
        ratio = f" ({seconds / floor:.1f})" if seconds is not None and floor else ""
        cells.append("" if seconds is None else f"{seconds:.2f}{ratio}")
    return cells


def scale_networks(prefix: str) -> list[dict[str, Any]]:
    """Runs of `scale.py` on networks whose name begins so."""
    return [record for record in runs("scale") if record["network"].startswith(prefix)]


def by_stage(records: list[dict[str, Any]], unit: str) -> str:
    """Seconds of each stage of prunings to 90 %, and their peak memory."""
    rows = []
    for record in records:
        if record["sparsity"] != 0.9:
            continue
        seconds = f"{sum(record['stages'].values()):.1f}"
        rows.append(
            [record["network"], record["method"], *stage_cells(record), seconds, f"{record['peak_mib'] / 1024:.1f}"]
        )
    return markdown(rows, ["network", "method", *STAGES, unit, "peak GiB"])


def gpu_kernels() -> str:
    """Kernels on an H200 beside the fastest of the usual PyTorch code for the same case."""
    rows = []
    for (op, case), group in groupby(
        report.read(sorted(RESULTS.glob("*_nvidia-h200.jsonl"))), lambda line: (line["op"], line["case"])
    ):
        members = sorted(group, key=lambda line: line["median_s"])
        usual = next((line for line in members if not line["implementation"].startswith("fishleg_ext")), None)
        for ours in members:
            _, _, how = ours["implementation"].partition("fishleg_ext ")
            if how in ("", "reference"):
                continue
            compared = ["", "", ""]
            if usual is not None:
                compared = [usual["implementation"], report.duration(usual["median_s"])]
                compared.append(f"{usual['median_s'] / ours['median_s']:.1f}")
            times = [report.duration(ours["median_s"]), f"{ours['median_s'] / ours['floor_s']:.0f}"]
            rows.append([f"`{op}`", case.replace(", float32", ""), how, *times, *compared])
    headers = ["op", "case", "fishleg_ext", "", "times its floor", "fastest PyTorch", "", "times as fast"]
    return markdown(rows, headers)


def scale_growth() -> str:
    """CPU seconds of all stages by the width of the MLP, and by how much a doubling multiplied them."""
    records = {(r["method"], int(r["network"].removeprefix("mlp"))): r for r in scale_networks("mlp")}
    widths = sorted({width for _, width in records})
    rows = []
    for method in dict.fromkeys(method for method, _ in records):
        cells, last = [], None
        for width in widths:
            record = records.get((method, width))
            seconds = None if record is None else sum(record["stages"].values())
            cells.append("" if seconds is None else f"{seconds:.2f}" + (f" (x {seconds / last:.1f})" if last else ""))
            last = seconds
        rows.append([method, *cells])
    return markdown(rows, ["CPU seconds", *(f"width {width}" for width in widths)])


def scale_accuracy() -> str:
    """Test accuracy of ResNet-18, and minutes of the whole pruning to 90 %."""
    records = scale_networks("resnet18")
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        mine = {round(r["sparsity"], 3): r for r in records if r["method"] == method}
        accuracy = [f"{mine[s]['accuracy']:.1f}" if s in mine else "" for s in (0.8, 0.9, 0.95)]
        minutes = next((r["seconds"] / 60 for r in mine.values() if r["seconds"]), None)
        rows.append([method, *accuracy, "" if minutes is None else f"{minutes:.1f}"])
    return markdown(rows, ["test accuracy, %", "80 %", "90 %", "95 %", "minutes"])


def quantization() -> str:
    """A row for each method, for each network and number of bits quality and size."""
    records = json.loads((RESULTS / "quantization.json").read_text())["rows"]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key, row in records.items():
        network, method, bits = key.split(" | ")
        if network == "layers":
            continue
        quality = f"{row['accuracy']:.1f} %" if "accuracy" in row else f"{row['nats']:.3f} nats"
        size = f", {row['bytes'] / 1000:.0f} kB" if "bytes" in row else ""
        found.setdefault((network, method), {})[bits] = f"{quality}{size}"
    columns = ("4", "3", "2")
    rows = [[*key, *(cells.get(bits, "") for bits in columns)] for key, cells in found.items() if "32" not in cells]
    return markdown(rows, ["network", "method", *(f"{bits} bits" for bits in columns)])


def optimizer_costs() -> str:
    """CPU time of a step over that of SGD."""
    found = json.loads((RESULTS / "autoencoder.json").read_text())["rows"]
    rows = {key.split(" | ")[1]: row["to_sgd"] for key, row in found.items() if key.startswith("cost")}
    names = list(next(iter(rows.values())))
    return markdown(
        [[batch, *(f"{row[name]:.2f}" for name in names)] for batch, row in rows.items()], ["batch", *names]
    )


def pruned_autoencoders() -> str:
    """Squared errors of pruned autoencoders."""
    return autoencoder_pruning.table(json.loads((RESULTS / "autoencoder_pruning.json").read_text())["rows"])


def quantization_layers() -> str:
    """Divergence of the outputs over what the diagonal Fisher matrix predicts, of layers quantized alone."""
    found: dict[str, dict[str, float]] = {}
    for key, row in json.loads((RESULTS / "quantization.json").read_text())["rows"].items():
        network, layer, what = key.split(" | ")
        if network == "layers":
            found.setdefault(what, {})[layer] = row["divergence"] / row["predicted"]
    rows = []
    for what, ratios in found.items():
        together = ratios.pop("all")
        rows.append([what, *(f"{f(ratios.values()):.2g}" for f in (min, statistics.median, max)), f"{together:.2g}"])
    return markdown(rows, ["codes", "least", "median", "most", "all layers"])


def lenet() -> str:
    """A row for each method, for each network and number of bits error and compression: means over the seeds."""
    entries: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for key, row in json.loads((RESULTS / "lenet.json").read_text())["rows"].items():
        _, network, method, *rest = key.split(" | ")
        bits, _, retrained = (rest or ["4"])[0].partition(", ")
        entries.setdefault((network, f"{method}{', ' * bool(retrained)}{retrained}", bits), []).append(row)
    seeds = max(len(rows) for rows in entries.values())
    found: dict[tuple[str, str], dict[str, str]] = {}
    for (network, method, bits), rows in entries.items():
        cell = f"{statistics.mean(row['error'] for row in rows):.2f} %"
        if "ratio" in rows[0]:
            cell += f", {statistics.mean(row['ratio'] for row in rows):.1f}x"
        cell += f" (of {len(rows)})" * (len(rows) < seeds)
        found.setdefault((network, method), {})[bits] = cell
    columns = ("4", "3", "2", "1.5")
    rows = [
        [*key, *(cells.get(bits, "") for bits in columns)] for key, cells in sorted(found.items(), key=_denser_first)
    ]
    return markdown(rows, ["network", "method", *(f"{bits} bits" for bits in columns)])


def stories() -> str:
    """Nats per token of the pruned Llama, and CPU seconds at 50 %."""
    return _by_target(runs("language_stories"), lambda found: _mean(found, "nats", 2))


def minilm() -> str:
    """What MiniLM's embeddings are worth, and CPU seconds at 50 %."""
    return _by_target(
        runs("language_minilm"), lambda found: f"{_mean(found, 'spearman', 1)} / {_mean(found, 'cosine', 3)}"
    )


def _by_target(records: list[dict[str, Any]], cell: Callable[[list[dict[str, Any]]], str]) -> str:
    """A row for each method, a column for each sparsity or pattern."""
    pruned = [record for record in records if record["method"] != "dense"]
    targets = sorted({record["target"] for record in pruned}, key=lambda target: (":" in target, target))
    rows = []
    for method in sorted({record["method"] for record in pruned}, key=language.NAMES.index):
        mine = [record for record in pruned if record["method"] == method]
        by_target = [[record for record in mine if record["target"] == target] for target in targets]
        seconds = _mean([record for record in mine if record["target"] == "0.5"], "seconds", 0)
        rows.append([method, *(cell(found) if found else "" for found in by_target), seconds])
    heads = [target if ":" in target else f"{100 * float(target):.0f} %" for target in targets]
    return markdown(rows, ["", *heads, "CPU s"])


def _mean(records: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [record[key] for record in records]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 or not digits else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _denser_first(item: tuple[tuple[str, str], Any]) -> float:
    """Sort by density, the highest first."""
    return -float(item[0][0].removeprefix("density ").replace("dense", "1"))


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "models": lambda: by_sparsity(renamed(runs("resnet20_models"), ", side by side"), accuracies),
    "block_draws": lambda: by_sparsity(renamed(runs("resnet20_block_draws"), ", side by side"), accuracies),
    "table": table,
    "layerwise": layerwise,
    "rounds": rounds,
    "carried": carried,
    "refinement": refinement,
    "gradual": gradual,
    "stories": stories,
    "minilm": minilm,
    "quantization": quantization,
    "quantization_layers": quantization_layers,
    "lenet": lenet,
    "optimizers": lambda: autoencoder.table(runs("autoencoder")),
    "optimizers_of_curves": lambda: autoencoder.table(runs("autoencoder_curves")),
    "optimizer_costs": optimizer_costs,
    "pruned_autoencoders": pruned_autoencoders,
    "first_order": first_order,
    "fishleg_defaults": lambda: by_sparsity(
        renamed(runs("resnet20_fishleg"), "FishLeg, ", ", held out"), accuracies, "held-out accuracy, %"
    ),
    "scale": lambda: by_stage(runs("scale"), "CPU s"),
    "scale_gpu": lambda: by_stage(runs("scale_nvidia-h200"), "s"),
    "gpu_kernels": gpu_kernels,
    "scale_growth": scale_growth,
    "scale_accuracy": scale_accuracy,
    "damping": lambda: by_sparsity(
        renamed(runs("resnet20_damping"), ", held out"), lambda found: both(found[0]), "held-out accuracy, %"
    ),
}


if __name__ == "__main__":
    print("\n\n".join(TABLES[name]() for name in sys.argv[1:] or TABLES))
