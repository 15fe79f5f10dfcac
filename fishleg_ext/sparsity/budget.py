"""How many weights a sparsity is, and whether so many can be pruned."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fishleg_ext.common.arguments import checked_sparsity
from fishleg_ext.sparsity.masks import Masks
from fishleg_ext.sparsity.patterns import Pattern

Sparsity = float | Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """The number of weights that a sparsity means, by the settings of a pruner.

    Attributes:
        scope: "global", "flops", "layer", "row", or name -> sparsity.
        pattern: that the masks keep to.
        min_density: that every parameter keeps.
        missing: name -> how many weights fewer than n of each m its first mask kept, which are pruned beyond 1 - n/m.
    """

    scope: str | Mapping[str, float]
    pattern: Pattern
    min_density: float
    missing: Mapping[str, int] = field(default_factory=dict)

    def counts(self, sparsity: Sparsity | None, masks: Masks) -> int | dict[str, int]:
        """Return how many weights are pruned afterwards, in all or of each parameter.

        Args:
            sparsity: of all together, of each with scope="layer" or "row", or name -> sparsity of a parameter, the
                others staying as they are; None is what scope or pattern say.
            masks: the present ones.

        Raises:
            ValueError, TypeError: out of range, more than pattern and min_density leave, less than is pruned already,
                or unknown names.
        """
        if sparsity is None:
            sparsity = self.scope if isinstance(self.scope, Mapping) else self.pattern.sparsity
            if sparsity is None:
                raise ValueError("expected a sparsity, got None")
        before, most = masks.pruned_counts(), self.max_counts(masks)
        sizes = {name: mask.numel() for name, mask in masks.items()}
        if isinstance(sparsity, Mapping):
            check_names(sparsity, masks)
            wanted = {n: checked_sparsity(f"sparsity of {n}", s) for n, s in sparsity.items()}
        elif self.scope in ("layer", "row"):
            wanted = dict.fromkeys(sizes, checked_sparsity("sparsity", sparsity))
            if self.exceeds(sparsity, masks):  # some may be sparser, as masks from elsewhere have it: they stay so
                extra = self.missing.get
                wanted = {
                    n: s for n, s in wanted.items() if self.pattern.round_count(s, sizes[n]) + extra(n, 0) > before[n]
                }
        elif isinstance(self.scope, Mapping):
            raise ValueError(f"sparsity={sparsity} cannot be combined with scope={{...}}; give a dict, too, or None")
        else:
            size, done, possible = (sum(counts.values()) for counts in (sizes, before, most))
            return self._target(checked_sparsity("sparsity", sparsity), size, done, possible, self._missing())
        return before | {
            n: self._target(s, sizes[n], before[n], most[n], self.missing.get(n, 0), f" of {n}")
            for n, s in wanted.items()
        }

    def max_counts(self, masks: Masks) -> dict[str, int]:
        """Return how many weights of each parameter may be pruned, or are pruned already if that is more."""
        before, group = masks.pruned_counts(), self.pattern.group
        most = {}
        for name, mask in masks.items():
            size = mask.numel()
            kept = math.ceil(self.min_density * size * (1 - 1e-9))  # 0.1 * 10 is to be 1, whatever the rounding
            free = min(self.pattern.max_count(size) + self.missing.get(name, 0), size - kept)
            most[name] = max(free // group * group, before[name])
        return most

    def exceeds(self, sparsity: float, masks: Masks) -> bool:
        """Whether this sparsity prunes more weights than the masks do."""
        sizes, before = {name: mask.numel() for name, mask in masks.items()}, masks.pruned_counts()
        if self.scope in ("layer", "row"):
            wanted = {n: self.pattern.round_count(sparsity, s) + self.missing.get(n, 0) for n, s in sizes.items()}
            return any(count > before[name] for name, count in wanted.items())
        return self.pattern.round_count(sparsity, sum(sizes.values())) + self._missing() > sum(before.values())

    def check_final(self, sparsity: Sparsity, masks: Masks) -> None:
        """Raise unless weights can be pruned so far and the pattern is complete then."""
        only = self.pattern.sparsity
        for given in sparsity.values() if isinstance(sparsity, Mapping) else [checked_sparsity("sparsity", sparsity)]:
            if only is not None and not math.isclose(given, only, abs_tol=1e-9):
                raise ValueError(f"expected a sparsity of {only} with pattern={self.pattern.name!r}, got {given}")
        if isinstance(sparsity, Mapping) or self.exceeds(sparsity, masks):
            self.counts(sparsity, masks)

    def warn_of_incomplete(self, final: float | None, masks: Masks) -> None:
        """Warn where a schedule has not come to its final sparsity, or a pattern of n:m is there in part."""
        if final is not None and self.exceeds(final, masks):
            warnings.warn(
                f"finalized at a sparsity of {masks.sparsity():.4g}, the schedule ends at {final}", stacklevel=3
            )
        pruned = {name: count for name, count in masks.pruned_counts().items() if self.pattern.m and count}
        full = {n: self.pattern.max_count(masks[n].numel()) + self.missing.get(n, 0) for n in pruned}
        partly = [name for name, count in pruned.items() if count != full[name]]
        if partly:
            warnings.warn(f"only a part of {', '.join(partly)} is {self.pattern.name}", stacklevel=3)

    def _missing(self) -> int:
        return sum(self.missing.values())

    def _target(self, sparsity: float, size: int, before: int, most: int, missing: int, of: str = "") -> int:
        count = self.pattern.round_count(sparsity, size) + missing
        if count < before:
            raise ValueError(f"sparsity {sparsity}{of} is {count} weights, but {before} are pruned already")
        if count > most:
            limits = [f"pattern={self.pattern.name!r}"] if self.pattern.m else []
            limits += [f"min_density={self.min_density}"] if self.min_density else []
            why = " with ".join(limits)
            raise ValueError(f"sparsity {sparsity}{of} is {count} weights, but {why} leaves only {most} to prune")
        return count


def check_names(names: Iterable[Any], masks: Masks) -> None:
    """Raise unless all are names of parameters that are pruned."""
    unknown = [name for name in names if name not in masks]
    if unknown:
        raise ValueError(f"{', '.join(map(str, unknown))} not among the pruned parameters {', '.join(masks)}")
