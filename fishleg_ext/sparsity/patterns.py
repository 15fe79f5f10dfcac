"""Which weights may be pruned together: any of them, m - n of each m, or whole groups of N."""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fishleg_ext import ops


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros along the fan-in of each output.

    Attributes:
        name: as users write it.
        n, m: of each m consecutive weights at least n are kept; 0 is no such pattern.
        group: consecutive weights that are kept or pruned together; 1 is no such pattern.
    """

    name: str = "unstructured"
    n: int = 0
    m: int = 0
    group: int = 1

    @classmethod
    def parse(cls, name: Any) -> "Pattern":
        """Make a pattern from "unstructured", "n:m" or "blockN".

        Raises:
            ValueError: any other name, or n:m without 0 < n <= m.

        Examples:
            >>> Pattern.parse("2:4")
            Pattern(name='2:4', n=2, m=4, group=1)
        """
        found = re.fullmatch(r"unstructured|(\d+):(\d+)|block(\d+)", name) if isinstance(name, str) else None
        if found and found[1] and 0 < int(found[1]) <= int(found[2]):
            return cls(name, n=int(found[1]), m=int(found[2]))
        if found and found[3] and int(found[3]):
            return cls(name, group=int(found[3]))
        if name != "unstructured":
            raise ValueError(
                f"expected pattern to be 'unstructured', n:m such as '2:4' or blockN such as 'block4', got {name!r}"
            )
        return cls()

    @property
    def unit(self) -> int:
        """Consecutive weights that the pattern is about."""
        return max(self.m, self.group)

    @property
    def sparsity(self) -> float | None:
        """The only sparsity that the pattern has when it is complete, 1 - n/m; None where any will do."""
        return 1 - self.n / self.m if self.m else None

    def round_count(self, sparsity: float, numel: int) -> int:
        """Number of weights that a sparsity of `numel` is, rounded to whole groups."""
        return self.group * round(sparsity * numel / self.group)

    def max_count(self, numel: int) -> int:
        """Number of a parameter's weights that can be pruned."""
        return numel // self.m * (self.m - self.n) if self.m else numel

    def must_keep(self, order: Tensor) -> Tensor | None:
        """Mask of the weights that the n:m pattern forbids to prune, None where any may be pruned.

        Args:
            order: [..., B], in which weights would be pruned, by rank or by cost; m divides B.
        """
        return ops.nm_mask(order, self.n, self.m) if self.m else None

    def allows(self, mask: Tensor) -> bool:
        """Whether a parameter with this mask [out, ...], True = kept, has the pattern, or may have it later."""
        kept = mask.reshape(-1, self.unit).sum(1)
        return bool((kept % self.group == 0).all())

    def num_missing(self, mask: Tensor) -> int:
        """Number of weights that this mask [out, ...] keeps too few of, where n of m could be kept."""
        return int((self.n - mask.reshape(-1, self.unit).sum(1)).clamp(min=0).sum())

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Name -> how many consecutive weights there are, where that is no multiple of `unit`.

        Args:
            shapes: name -> shape of a parameter as `Orientation.to_matrix` has it: outputs, then fan-in. n:m goes along
                the last dimension, input channels, as sparse tensor cores take it; groups along all of the fan-in.
        """
        length = {
            name: (shape or (1,))[-1] if self.m else math.prod(shape[1:] or shape) for name, shape in shapes.items()
        }
        return {name: size for name, size in length.items() if size % self.unit}

    def fitting(self, shapes: Mapping[str, tuple[int, ...]], *, chosen: bool) -> list[str]:
        """Leave out parameters whose fan-in the pattern does not divide; an error where users chose them themselves.

        Args:
            shapes: see `misfits`.
            chosen: whether users did.

        Returns:
            names of the others.
        """
        misfits = self.misfits(shapes)
        if not misfits:
            return list(shapes)
        of = self._of()
        listed = ", ".join(f"{name} ({of} {size})" for name, size in misfits.items())
        multiple = f"the {of} to be a multiple of {self.unit} with pattern={self.name!r}"
        if chosen or len(misfits) == len(shapes):
            raise ValueError(f"expected {multiple}, got {listed}")
        warnings.warn(f"expected {multiple}; these stay dense: {listed}", stacklevel=5)
        return [name for name in shapes if name not in misfits]

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Say why a parameter of this shape cannot have the pattern."""
        size = self.misfits({"it": shape})["it"]
        return f"its {self._of()}, {size}, is no multiple of {self.unit}"

    def _of(self) -> str:
        return "input channels" if self.m else "fan-in"


UNSTRUCTURED = Pattern()
