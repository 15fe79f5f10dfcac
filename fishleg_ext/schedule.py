"""Sparsity over a training run.

A schedule is a function from the number of the step, 0 for the first call of `Pruner.step`, to the sparsity it is to
reach, or None where it is to prune nothing. Those of this file are named after the shape of their curve; any other
function will do, too.
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from fishleg_ext.common.arguments import checked_count, checked_sparsity

Schedule = Callable[[int], float | None]


@dataclass(frozen=True, kw_only=True)
class _Curve(ABC):
    """A sparsity that rises from `init_sparsity` at `start` to `final_sparsity` at `end`.

    Args:
        final_sparsity: in [0, 1).
        init_sparsity: of the first pruning, at `start`; 0 prunes nothing then.
        start, end: the first and the last step at which weights are pruned.
        frequency: steps from one pruning to the next; `end` always prunes.
        steps_per_epoch: where given, start, end and frequency are in epochs of so many steps, and need not be whole.

    Raises:
        ValueError, TypeError: sparsities out of [0, 1) or falling, end before start, frequency of less than a step.
    """

    final_sparsity: float
    init_sparsity: float = 0.0
    start: float = 0
    end: float
    frequency: float = 1
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        checked_sparsity("final_sparsity", self.final_sparsity)
        checked_sparsity("init_sparsity", self.init_sparsity)
        if self.init_sparsity > self.final_sparsity:
            raise ValueError(
                f"expected init_sparsity <= final_sparsity, got {self.init_sparsity} and {self.final_sparsity}"
            )
        if self.steps_per_epoch is not None:
            checked_count("steps_per_epoch", self.steps_per_epoch)
        for name in ("start", "end", "frequency"):
            value = getattr(self, name)
            wanted = numbers.Integral if self.steps_per_epoch is None else numbers.Real
            if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
                what = "an integer, or steps_per_epoch" if self.steps_per_epoch is None else "a number"
                raise TypeError(f"expected {name} to be {what}, got {value!r}")
        if not 0 <= self.start <= self.end:
            raise ValueError(f"expected 0 <= start <= end, got {self.start} and {self.end}")
        if self._steps(self.frequency) < 1:
            raise ValueError(f"expected a frequency of at least one step, got {self.frequency}")

    def __call__(self, step: int) -> float | None:
        """The sparsity to be reached in this step, or None."""
        start, end = self._steps(self.start), self._steps(self.end)
        if not start <= step <= end or ((step - start) % self._steps(self.frequency) and step != end):
            return None
        return self.final_sparsity if step == end else self._sparsity((step - start) / (end - start))

    def _steps(self, duration: float) -> int:
        return round(duration * (self.steps_per_epoch or 1))

    @abstractmethod
    def _sparsity(self, part: float) -> float:
        """After this part of the way, in [0, 1)."""


class Cubic(_Curve):
    """A sparsity that rises fast at first, when most weights are redundant, then slower.

    Zhu and Gupta 2017, arXiv 1710.01878, eq. 1.

    Examples:
        >>> [Cubic(final_sparsity=0.96, end=4, frequency=2)(step) for step in range(6)]
        [0.0, None, 0.84, None, 0.96, None]
    """

    def _sparsity(self, part: float) -> float:
        return self.final_sparsity + (self.init_sparsity - self.final_sparsity) * (1 - part) ** 3


class Linear(_Curve):
    """A sparsity that rises by the same number of weights each time."""

    def _sparsity(self, part: float) -> float:
        return self.init_sparsity + (self.final_sparsity - self.init_sparsity) * part


class Geometric(_Curve):
    """A density that falls by the same fraction each time, as in `prune` with recomputations."""

    def _sparsity(self, part: float) -> float:
        return 1 - (1 - self.init_sparsity) * ((1 - self.final_sparsity) / (1 - self.init_sparsity)) ** part


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """The final sparsity all at once, at `start`.

    Args:
        final_sparsity: in [0, 1).
        start: the step; in epochs where steps_per_epoch is given.
        steps_per_epoch: see `Cubic`.
    """

    final_sparsity: float
    start: float = 0
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        self._curve()  # which checks

    def __call__(self, step: int) -> float | None:
        """The sparsity to be reached in this step, or None."""
        return self._curve()(step)

    def _curve(self) -> Linear:
        return Linear(
            final_sparsity=self.final_sparsity, start=self.start, end=self.start, steps_per_epoch=self.steps_per_epoch
        )
