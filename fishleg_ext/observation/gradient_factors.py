"""Gradients of samples in factors: G = D^T X, X the inputs of a product and D the gradients by its outputs.

One backward pass gives D for all samples, without a gradient of the size of the weights for each. Rows lie sample after
sample, or position after position with a row of each sample at each; see `factors`, which tells how.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fishleg_ext.observation.products import ROW_BYTES, Product

# A CPU multiplies out so many bytes of gradients at a time: these stay in its caches, and the next take the same
# memory. It takes at least as many rows of the matrix as X has, since it reads X again each time, up to MOST_BYTES,
# which malloc still keeps for the next.
CACHE_BYTES, MOST_BYTES = 2**22, 3 * 2**23


@dataclass(frozen=True, eq=False)
class Use:
    """One product of a weight, with what its rows need to be told apart.

    Attributes:
        product: of some samples.
        gradient: of each sample's own loss, by the output of the product.
        samples: how many there are.
        by_position: whether rows lie position after position, with a row of each sample at each; else sample after
            sample.
    """

    product: Product
    gradient: Tensor
    samples: int
    by_position: bool

    def rows(self, start: int, stop: int, group: int) -> tuple[Tensor, Tensor]:
        """Rows of groups of samples, from `start` to before `stop`.

        Args:
            start, stop: numbers of groups of samples.
            group: samples in each.

        Returns:
            X [groups, count, T, fan_in] and D [groups, count, T, fan_out / groups], groups being those of the product.
        """
        product, first, last = self.product, start * group, stop * group
        inputs, gradient, each = product.inputs, self.gradient, self._length
        if each and last - first < self.samples:
            inputs, gradient = inputs[first * each : last * each], gradient[first * each : last * each]
        samples = last - first if each else self.samples
        x, d = product.input_rows(inputs), product.output_rows(gradient)
        part = None if each else slice(start, stop)
        return self._cut(x, samples, group, part), self._cut(d, samples, group, part)

    def sample_gradients(self, start: int, stop: int) -> Tensor | None:
        """Gradients of samples, [count, out, fan_in], where there is a faster way to them than by rows."""
        if self._length != 1 or self.product.inputs.dtype != self.gradient.dtype:
            return None
        return self.product.sample_gradients(self.product.inputs[start:stop], self.gradient[start:stop])

    @property
    def num_rows(self) -> int:
        """Rows of X, and of D, for each group of the product."""
        first, last = self.product.outputs
        return self.gradient.numel() // max(1, last - first)

    @property
    def _length(self) -> int:
        """Entries of the first dimension for each sample, where that can be cut; else 0."""
        number = len(self.product.inputs)
        whole = number == len(self.gradient) and number % max(1, self.samples) == 0
        return number // max(1, self.samples) if whole and self.product.divisible and not self.by_position else 0

    def _cut(self, rows: Tensor, samples: int, group: int, part: slice | None) -> Tensor:
        length = rows.shape[1] // max(1, samples)
        if self.by_position:
            rows = rows.unflatten(1, (length, samples // group, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        else:
            rows = rows.unflatten(1, (samples // group, group * length))
        return rows if part is None else rows[:, part]


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """Gradients G_s = D_s^T X_s [out, fan-in] of groups of samples by one weight matrix, summed over its products.

    Attributes:
        uses: its products.
        shape: of the matrix.
        like: a tensor of the dtype and on the device of the gradients.
        count: how many gradients.
        group: samples in each.
        start: number of the first.
        mask: bool [out, fan-in], False where gradients are to be zero; or None.
    """

    uses: Sequence[Use]
    shape: tuple[int, int]
    like: Tensor
    count: int
    group: int
    start: int = 0
    mask: Tensor | None = None

    def part(self, start: int, stop: int) -> "GradientFactors":
        """Return the gradients from `start` to before `stop`."""
        return replace(self, count=stop - start, start=self.start + start)

    @property
    def rows(self) -> int:
        """Count the rows of each gradient's X and D, T."""
        return sum(use.num_rows // use.samples * self.group for use in self.uses)

    @property
    def whole(self) -> bool:
        """Tell whether G is D^T X, the X and D of all products put together: each is of the whole matrix, no mask."""
        return bool(self.uses) and self.mask is None and all(map(self._is_whole, self.uses))

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs of each product, as the function was called with them, and the gradient by its output."""
        for use in self.uses:
            yield use.product.inputs, use.gradient

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Put X [count, T, fan_in] and D [count, T, out] together, where they are `whole`."""
        parts = list(map(self._rows_of, self.uses))
        x, d = (torch.cat([part[i][0] for part in parts], dim=1) if len(parts) > 1 else parts[0][i][0] for i in (0, 1))
        return x, d

    def gradients(self) -> Tensor:
        """Multiply out: [count, out, fan_in]."""
        result = self._multiplied_out()
        if self.mask is not None:
            result *= self.mask
        return result

    def rows_at_a_time(self, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Multiply out some rows of the matrix at a time, where that is faster.

        Args:
            multiple: parts begin at a multiple of as many rows.

        Yields:
            the first row, and gradients of rows from there on, [count, rows, fan_in].
        """
        out, fan_in = self.shape
        row_bytes = max(1, self.count * fan_in * self.like.element_size())
        rows = max(CACHE_BYTES // row_bytes, min(self.rows, MOST_BYTES // row_bytes))
        rows = max(1, rows // multiple) * multiple
        if self.like.device.type != "cpu" or rows >= out or not self._is_best_by_rows:
            yield 0, self.gradients()
            return
        x, d = (rows_of[0] for rows_of in self._rows_of(self.uses[0]))
        for first in range(0, out, rows):
            own = d[:, :, first : first + rows].mT
            part = own * x if own.shape[2] == 1 else own @ x
            if self.mask is not None:
                part *= self.mask[first : first + rows]
            yield first, part

    def sum_of_squares(self, dtype: torch.dtype) -> Tensor:
        """Sum the squares of all gradients, in this dtype: [out, fan_in]."""
        if self.rows == 1 and self._is_single:
            x, d = (rows[0, :, 0].to(dtype) for rows in self._rows_of(self.uses[0]))
            squares = d.square().T @ x.square()
            return squares if self.mask is None else squares * self.mask
        return torch.cat([part.to(dtype).square().sum(0) for _, part in self.rows_at_a_time()])

    @property
    def _is_single(self) -> bool:
        return len(self.uses) == 1 and self._is_whole(self.uses[0])

    @property
    def _is_best_by_rows(self) -> bool:
        """Tell whether there is one product, whose rows take no more memory than the gradients."""
        return self._is_single and self.rows <= self.shape[0]

    def _rows_of(self, use: Use) -> tuple[Tensor, Tensor]:
        return self._rows_between(use, self.start, self.start + self.count)

    def _rows_between(self, use: Use, start: int, stop: int) -> tuple[Tensor, Tensor]:
        x, d = use.rows(start, stop, self.group)
        return x.to(self.like.dtype), d.to(self.like.dtype)  # under autocast they may be of others

    def _is_whole(self, use: Use) -> bool:
        return use.product.groups == 1 and use.product.outputs == (0, self.shape[0])

    def _multiplied_out(self) -> Tensor:
        single = self._is_single
        if single and self.group == 1:
            found = self.uses[0].sample_gradients(self.start, self.start + self.count)
            if found is not None:
                return found.to(self.like.dtype)
        result = self.like.new_empty(self.count, *self.shape)
        if not single:
            result.zero_()
        for use in self.uses:
            (first, last), groups = use.product.outputs, use.product.groups
            for start, stop in self._slices(use):
                x, d = self._rows_between(use, self.start + start, self.start + stop)
                part = result[start:stop, first:last].unflatten(1, (groups, -1))
                for index in range(groups):
                    if single:
                        torch.bmm(d[index].mT, x[index], out=part[:, index])
                    else:
                        part[:, index] += d[index].mT @ x[index]
        return result

    def bias_gradients(self) -> Tensor:
        """Sum over rows of D: [count, out], of a bias that is added to each product."""
        result = self.like.new_zeros(self.count, self.shape[0])
        for use in self.uses:
            first, last = use.product.outputs
            _, d = self._rows_of(use)
            result[:, first:last] += d.sum(2).transpose(0, 1).flatten(1)
        return result

    def _slices(self, use: Use) -> Iterator[tuple[int, int]]:
        """Parts of the gradients whose inputs as rows are of bounded size."""
        per_row = self.shape[1] * use.product.groups * self.like.element_size()
        per_gradient = per_row * use.num_rows // max(1, use.samples) * self.group
        step = max(1, ROW_BYTES // max(1, per_gradient))
        for start in range(0, self.count, step):
            yield start, min(start + step, self.count)


Compute = Callable[[], Tensor]


class LazyGradients(Mapping[str, Tensor]):
    """Name -> gradients, each computed when it is asked for and not kept: those of one parameter at a time."""

    def __init__(self, compute: Mapping[str, Compute]) -> None:
        self._compute = dict(compute)

    def __getitem__(self, name: str) -> Tensor:
        return self._compute[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute)

    def __len__(self) -> int:
        return len(self._compute)
