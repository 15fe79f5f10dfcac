"""Curves of FishLeg's auxiliary loss."""

from os import PathLike


class LossCurves:
    """A monitor of FishLeg that keeps what it is told: `FishLeg(monitor=LossCurves())`.

    Attributes:
        losses: parameter -> (gradients so far, auxiliary loss on the last of them before they were learned from), in
            the order in which they came. Another estimate begins where gradients fall back.
    """

    def __init__(self) -> None:
        self.losses: dict[str, list[tuple[int, float]]] = {}

    def __call__(self, name: str, gradients: int, loss: float) -> None:
        """Keep one."""
        self.losses.setdefault(name, []).append((gradients, loss))

    def plot(self, target: str | PathLike[str]) -> None:
        """Draw the losses of the last estimate, each parameter's over the size of its least.

        Args:
            target: image file, of a kind that matplotlib writes.

        Raises:
            ValueError: there are no losses yet.
            ImportError: matplotlib is not installed; it comes with the extras [demo].
        """
        if not self.losses:
            raise ValueError("expected losses to draw, got none: give this object to FishLeg as monitor= and estimate")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 0.25 * min(len(self.losses), 40) + 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for index, (name, losses) in enumerate(self.losses.items()):
            last = max((i for i in range(1, len(losses)) if losses[i][0] <= losses[i - 1][0]), default=0)
            gradients, values = zip(*losses[last:], strict=True)
            least = abs(min(values)) or 1.0
            color, style = f"C{index % 10}", ("-", "--", "-.", ":")[index // 10 % 4]
            axes.plot(gradients, [value / least for value in values], color=color, linestyle=style, label=name)
        axes.set_yscale("symlog", linthresh=1)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xlabel("gradients")
        axes.set_ylabel("auxiliary loss, over the size of its least")
        figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(target, dpi=150)
