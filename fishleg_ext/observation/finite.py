"""Finds NaN, inf and zeros among what is observed, without waiting for a GPU each time."""

from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.waiting import read


class Finite:
    """Sums of what was seen, which are not finite where any of it is not, and whether any of it is not zero."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._nonzero: Tensor | bool | None = None  # True once that was read

    @property
    def any_nonzero(self) -> bool:
        """Tell whether anything that was seen as `nonzero` was not zero, or there was none of it."""
        return self._nonzero is None or bool(self._nonzero)

    def see(self, name: str, x: Tensor, *, nonzero: bool = False) -> None:
        """Note one tensor; with `nonzero` also whether it is all zero."""
        total = x.sum(dtype=widened(x.dtype))
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        if nonzero and x.numel() and self._nonzero is not True:
            low, high = x.aminmax()  # many times as fast as `any` on a CPU
            found = (low != 0) | (high != 0)
            self._nonzero = found if self._nonzero is None else found | self._nonzero

    def bad(self) -> list[str]:
        """Return the names under which there was NaN or inf."""
        numbers = [x.isfinite() for x in self._sums.values()]
        if isinstance(self._nonzero, Tensor):
            numbers.append(self._nonzero)
        found = read(numbers)
        if isinstance(self._nonzero, Tensor) and found.pop():
            self._nonzero = True
        return [name for name, yes in zip(self._sums, found, strict=True) if not yes]
