"""Products y = W x of a weight in a forward pass, and where in the weight they lie."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fishleg_ext.common.orientation import Orientation

ROW_BYTES = 2**25  # of inputs as rows, at a time: more are no faster
Axes = list[tuple[int, int]]  # size and stride of dimensions


@dataclass(frozen=True, eq=False)
class Product:
    """One product y = W x in a forward pass, of some rows of the matrix [out, fan-in] that a weight is.

    Attributes:
        name: of the weight.
        operation: name of the function that computed it.
        outputs: first row of the matrix that takes part, and the one after the last; in `groups` equal groups, each
            with inputs of its own.
        groups: how many.
        inputs: what the function was called with.
        edge: where the gradient by its output arrives; None where none will.
        divisible: whether `inputs` and the gradient by the output may be cut along their first dimension.
        uses: multiplications by each of the weights that take part.
    """

    name: str
    operation: str
    outputs: tuple[int, int]
    groups: int
    inputs: Tensor
    edge: GradientEdge | None
    divisible: bool
    uses: int
    _input_rows: Callable[[Tensor], Tensor]
    _output_rows: Callable[[Tensor], Tensor]
    _columns: Tensor | None = None  # of the matrix, in the order of the function's; None where it is the same
    _gradients: Callable[[Tensor, Tensor], Tensor | None] | None = None

    def input_rows(self, inputs: Tensor | None = None) -> Tensor:
        """Return `inputs`, or a part of them, as rows [groups, n, fan_in]."""
        rows = self._input_rows(self.inputs if inputs is None else inputs)
        return rows if self._columns is None else rows[..., self._columns.to(rows.device)]

    def output_rows(self, gradient: Tensor) -> Tensor:
        """Return the gradient by the output, or a part of it, as rows [groups, n, fan_out / groups]."""
        return self._output_rows(gradient)

    def sample_gradients(self, inputs: Tensor, gradient: Tensor) -> Tensor | None:
        """Compute the gradient of the whole matrix for each sample, [N, out, fan_in]; None where rows are faster.

        Args:
            inputs: some of the function's, along their first dimension.
            gradient: by the output, as many.
        """
        found = None if self._gradients is None else self._gradients(inputs, gradient)
        return found if found is None or self._columns is None else found[..., self._columns.to(found.device)]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Tell it from other products, but for how many rows it has."""
        return self.name, self.operation, self.outputs, self.groups


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of a weight that a forward pass looks up, as an embedding does.

    Attributes:
        name: of the weight.
        indices: which rows.
        edge: where the gradient by the rows arrives; None where none will.
        padding_index: a row that takes no gradient, or -1.
    """

    name: str
    indices: Tensor
    edge: GradientEdge | None
    padding_index: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """Tell it from others, but for how many rows it has."""
        return self.name, "embedding"

    def add_gradient_(self, total: Tensor, gradient: Tensor) -> None:
        """Add the gradient of the weight [rows, ...] that the gradient by the looked-up rows makes."""
        indices, rows = self.indices.flatten(), gradient.reshape(-1, *total.shape[1:])
        keep = indices != self.padding_index
        total.index_add_(0, indices[keep], rows[keep].to(total.dtype))


class NoProduct(Exception):
    """A call is no product of a weight; the message says why."""


class WeightInMemory:
    """A weight as it lies in memory, and as a matrix."""

    def __init__(self, name: str, tensor: Tensor, orientation: Orientation) -> None:
        self.name, self.tensor, self.orientation = name, tensor, orientation
        self._first = tensor.storage_offset()
        self._last = self._first + _extent(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether all elements of a tensor of the same memory are among those of the weight."""
        offset = tensor.storage_offset()
        return tensor.dtype == self.tensor.dtype and self._first <= offset and offset + _extent(tensor) <= self._last

    def place(self, view: Tensor, outs: Axes, ins: Axes) -> tuple[int, int, Tensor | None]:
        """Find where in the matrix a view lies, whose dimensions are outputs and fan-in; see `_place`."""
        layout = tuple(zip(self.tensor.shape, self.tensor.stride(), strict=True))
        found = _place(view.storage_offset() - self._first, tuple(outs), tuple(ins), layout, self.orientation)
        if isinstance(found, str):
            raise NoProduct(found)
        return found


@functools.lru_cache(maxsize=4096)
def _place(
    offset: int,
    outs: tuple[tuple[int, int], ...],
    ins: tuple[tuple[int, int], ...],
    layout: tuple[tuple[int, int], ...],
    orientation: Orientation,
) -> tuple[int, int, Tensor | None] | str:
    """The first row of a matrix at which a view lies, the one after the last, and the order of its columns.

    Both are sums of a part that depends on the output and of one that depends on the place in the fan-in, so that it is
    enough to look at the first column and the first row of the view.

    Args:
        offset: of the view from the parameter, in elements.
        outs, ins: size and stride of the dimensions of the view.
        layout: of those of the parameter.
        orientation: of the parameter.

    Returns:
        the order is None where the columns are in that of the matrix; or why the view is no rows of the matrix.
    """

    def positions(axes: Iterable[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        offsets = torch.tensor([offset])
        for size, stride in axes:
            offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
        index = torch.zeros_like(offsets)
        shape = [size for size, _ in layout]
        for dim, (size, stride) in enumerate(layout):
            if size > 1:
                index += offsets // stride % size * math.prod(shape[dim + 1 :])
        return orientation.positions(index)

    rows, first_cols = positions(outs)
    first_rows, cols = positions(ins)
    if not (first_cols == first_cols[0]).all() or not (first_rows == first_rows[0]).all():
        return "transposed: its outputs are not the first dimension"
    first, last = int(rows[0]), int(rows[-1]) + 1
    if not torch.equal(rows, torch.arange(first, last)):
        return "some of its outputs, not next to each other"
    if not torch.equal(cols.sort().values, torch.arange(orientation.fan_in)):
        return "a part of its fan-in"
    return first, last, None if torch.equal(cols, torch.arange(len(cols))) else cols.argsort()


def _extent(tensor: Tensor) -> int:
    """Distance in memory of the last element from the first."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
