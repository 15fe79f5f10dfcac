"""Tables and plots of results, made from the files alone."""

import json
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

LEGEND = """GB/s, GFLOP/s: of the work that the shapes ask for. speed-up: the first row's median over this one's.
over the floor: the median over what that work takes at the rates of a copy and of a matrix product on this device;
below 1 where data stay in a cache or are only written."""


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of result files."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """Compare the implementations of each op and case with the first and with the floor."""
    from tabulate import tabulate

    parts = []
    for (op, case, device), group in groupby(lines, lambda line: (line["op"], line["case"], line["device"])):
        members = list(group)
        rows = [
            {
                "implementation": line["implementation"],
                "median": duration(line["median_s"]),
                "p20 to p80": f"{duration(line['p20_s'])} to {duration(line['p80_s'])}",
                "GB/s": f"{line['bytes_per_s'] / 1e9:.3g}",
                "GFLOP/s": f"{line['flop_per_s'] / 1e9:.3g}" if line["flop"] else "",
                "over the floor": f"{line['median_s'] / line['floor_s']:.3g}",
                "speed-up": f"{members[0]['median_s'] / line['median_s']:.3g}",
            }
            for line in members
        ]
        heading = f"{op}: {case}\n{device}, floor {duration(members[0]['floor_s'])}"
        parts.append(f"{heading}\n{tabulate(rows, headers='keys', disable_numparse=True)}")
    return "\n\n".join([*parts, LEGEND])


def duration(seconds: float) -> str:
    """Three digits and a unit.

    >>> duration(0.0123456)
    '12.3 ms'
    """
    exponent = min(0, max(-3, math.floor(math.log10(seconds) / 3)))
    return f"{seconds / 10.0 ** (3 * exponent):.3g} {('s', 'ms', 'us', 'ns')[-exponent]}"


def plot(lines: list[dict[str, Any]], target: Path) -> None:
    """Bars of time over the floor, one panel for each op and case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = [(key, list(g)) for key, g in groupby(lines, lambda line: (line["op"], line["case"], line["device"]))]
    heights = [0.6 + 0.3 * len(members) for _, members in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, sum(heights) + 0.6 * len(groups)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis, ((op, case, device), members) in zip(axes[:, 0], groups, strict=True):
        names = [line["implementation"] for line in members]
        ratios = [line["median_s"] / line["floor_s"] for line in members]
        ours = [name.startswith("fishleg_ext") for name in names]
        bars = axis.barh(names, ratios, color=["tab:blue" if mine else "tab:gray" for mine in ours])
        axis.bar_label(bars, [f" {duration(line['median_s'])}" for line in members])
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlim(0.5, 4 * max(ratios))
        axis.invert_yaxis()
        axis.set_title(f"{op}: {case} ({device})", fontsize=9)
        axis.set_xlabel("time over the floor")
    figure.savefig(target, dpi=150)
    plt.close(figure)
