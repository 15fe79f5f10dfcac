"""Measures how far to go along a direction."""

from collections.abc import Mapping
from typing import Any

# What share of a running mean each measurement leaves of the earlier ones.
SMOOTHING = 0.9
NUMBERS = ("measurements", "slope", "bend", "divergence")


class StepLength:
    """The minimum of the quadratic model of the loss along a direction n: c = g^T n / n^T (F + damping I) n.

    Numerator and denominator are running means of measurements.

    Args:
        damping: of F.
        max_divergence: of a step s n, 1/2 s^2 n^T F n, in the units of the loss.
    """

    def __init__(self, damping: float, max_divergence: float) -> None:
        self._damping, self._max_divergence = damping, max_divergence
        self.measurements, self.slope, self.bend = 0, 0.0, 0.0
        self.divergence = 0.0  # of n itself, the last time

    def measure(self, slope: float, curvature: float, squared: float) -> None:
        """Take in g^T n, n^T F n and |n|^2."""
        keep = SMOOTHING if self.measurements else 0.0
        self.measurements += 1
        self.slope = keep * self.slope + (1 - keep) * max(slope, 0.0)
        self.bend = keep * self.bend + (1 - keep) * (curvature + self._damping * squared)
        self.divergence = 0.5 * curvature

    def rate(self, longest: float) -> float:
        """Return c, or less where the largest learning rate times c would diverge by too much."""
        rate = self.slope / self.bend if self.bend > 0 else 0.0
        divergence = (longest * rate) ** 2 * self.divergence
        return rate if divergence <= self._max_divergence else rate * (self._max_divergence / divergence) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {name: getattr(self, name) for name in NUMBERS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.measurements = int(state["measurements"])
        self.slope, self.bend, self.divergence = (float(state[name]) for name in NUMBERS[1:])
