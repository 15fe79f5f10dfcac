"""Sees every product y = W x in which a weight enters a forward pass, whatever module or function computes it.

A PyTorch function mode looks at each call whose argument is a weight, or a view of one: a slice, chunk, index,
transpose or reshape, told by the elements of memory that it covers. Linear layers, convolutions and their transposes,
and whatever contracts two tensors (matmul, addmm, bmm, einsum and their like) are products: their inputs are rows, and
the gradient by their output arrives at an edge of autograd's graph. With X the rows [n, fan_in] and D the output
gradients [n, fan_out] the gradient of the weight is the sum over its products of D^T X.

A weight that enters in any other way first, scaled, masked or normalised, is no product of that weight; the mode notes
by which call it entered. `verification` compares the products with autograd, since some code cannot be seen: fused
recurrent layers, custom autograd functions, compiled or scripted regions.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.unfold import conv_rows, conv_transpose_rows

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

    def input_rows(self, inputs: Tensor | None = None) -> Tensor:
        """Return `inputs`, or a part of them, as rows [groups, n, fan_in]."""
        rows = self._input_rows(self.inputs if inputs is None else inputs)
        return rows if self._columns is None else rows[..., self._columns.to(rows.device)]

    def output_rows(self, gradient: Tensor) -> Tensor:
        """Return the gradient by the output, or a part of it, as rows [groups, n, fan_out / groups]."""
        return self._output_rows(gradient)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tells it from other products, but for how many rows it has."""
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
        """What tells it from others, but for how many rows it has."""
        return self.name, "embedding"

    def add_gradient_(self, total: Tensor, gradient: Tensor) -> None:
        """Add the gradient of the weight [rows, ...] that the gradient by the looked-up rows makes."""
        indices, rows = self.indices.flatten(), gradient.reshape(-1, *total.shape[1:])
        keep = indices != self.padding_index
        total.index_add_(0, indices[keep], rows[keep].to(total.dtype))


class _NoProduct(Exception):
    """A call is no product of a weight; the message says why."""


class ProductRecorder(TorchFunctionMode):
    """Records the products of some weights while it is entered.

    Args:
        weights: name -> the tensor that enters the forward pass.
        orientations: name -> how the weight is seen as a matrix; the default one where there is none.
        take: called with each product instead of its being kept.

    Attributes:
        products, lookups: of these weights, in the order of the forward pass.
        others: name of a weight -> other functions that it enters, in the order of the forward pass.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        orientations: Mapping[str, Orientation] | None = None,
        take: Callable[[Product], None] | None = None,
    ) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.lookups: list[Lookup] = []
        self.others: dict[str, dict[str, None]] = {}
        self._signature: list[tuple[Any, ...]] = []
        self._take = self.products.append if take is None else take
        self._weights: dict[int, list[_Weight]] = {}
        for name, weight in weights.items():
            if weight.numel():
                orientation = (orientations or {}).get(name) or Orientation.of(weight.shape)
                known = self._weights.setdefault(weight.untyped_storage().data_ptr(), [])
                known.append(_Weight(name, weight, orientation))

    @property
    def signature(self) -> tuple[tuple[Any, ...], ...]:
        """The sequence of products, lookups and other calls."""
        return tuple(self._signature)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and look at what it does with weights."""
        kwargs = kwargs or {}
        entering = list(self._entering(args, kwargs))
        if not entering:
            return func(*args, **kwargs)
        if _is_composite(func) and func is not torch.functional.einsum:
            with self:  # its own calls tell more
                return _without_check(func)(*args, **kwargs)
        output = func(*args, **kwargs)
        parse = _PARSERS.get(getattr(func, "__name__", ""))
        for tensor, weight in entering:
            if parse is None:
                if self._makes_another(func, output, weight):
                    self._note(weight, func)
                continue
            try:
                if sum(other is weight for _, other in entering) > 1:
                    raise _NoProduct("more than once")
                use = parse(_Call(func, args, dict(kwargs), output, tensor, weight))
            except _NoProduct as reason:
                self._note(weight, func, f", {reason}")
                continue
            self._signature.append((weight.name, getattr(func, "__name__", "")) if isinstance(use, list) else use.kind)
            if isinstance(use, Lookup):
                self.lookups.append(use)
                continue
            for product in use if isinstance(use, list) else [use]:
                self._take(product)
        return output

    def _entering(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Iterable[tuple[Tensor, _Weight]]":
        for leaf in _leaves(args, kwargs):
            if isinstance(leaf, Tensor) and (weight := self._weight_of(leaf)) is not None:
                yield leaf, weight

    def _weight_of(self, tensor: Tensor) -> "_Weight | None":
        if tensor.layout is not torch.strided or not tensor.is_floating_point() or not tensor.numel():
            return None
        try:
            known = self._weights.get(tensor.untyped_storage().data_ptr(), ())
        except (NotImplementedError, RuntimeError):  # of a tensor without memory
            return None
        return next((weight for weight in known if weight.holds(tensor)), None)

    def _makes_another(self, func: Callable[..., Any], output: Any, weight: "_Weight") -> bool:
        """Whether a call makes values of the weight, rather than a view, a number, or a tensor of its shape."""
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            return True
        if name.startswith("new_") or name.endswith("_like"):
            return False
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and _has_values(leaf)]
        return any(self._weight_of(tensor) is not weight for tensor in tensors)

    def _note(self, weight: "_Weight", func: Callable[..., Any], reason: str = "") -> None:
        call = f"{getattr(func, '__name__', func)}{reason}"
        self.others.setdefault(weight.name, {})[call] = None
        self._signature.append((weight.name, call))


class _Weight:
    """A weight as it lies in memory, and as a matrix."""

    def __init__(self, name: str, tensor: Tensor, orientation: Orientation) -> None:
        self.name, self.tensor, self.orientation = name, tensor, orientation
        self._first = tensor.storage_offset()
        self._last = self._first + _extent(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether all elements of a tensor of the same memory are among those of the weight."""
        offset = tensor.storage_offset()
        return tensor.dtype == self.tensor.dtype and self._first <= offset and offset + _extent(tensor) <= self._last

    def place(self, view: Tensor, outs: Axes, ins: Axes) -> tuple[int, int, Tensor | None]:
        """Where in the matrix a view lies, whose dimensions are outputs and fan-in; see `_place`."""
        layout = tuple(zip(self.tensor.shape, self.tensor.stride(), strict=True))
        found = _place(view.storage_offset() - self._first, tuple(outs), tuple(ins), layout, self.orientation)
        if isinstance(found, str):
            raise _NoProduct(found)
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


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Any]:
    """What a call was given, with the entries of lists and tuples."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from pytree.tree_leaves(value)
        else:
            yield value


def _is_composite(func: Callable[..., Any]) -> bool:
    """Whether it is written in Python, so that its own calls can be seen."""
    return isinstance(func, types.FunctionType) and str(func.__module__).startswith("torch")


@functools.cache
def _without_check(func: types.FunctionType) -> types.FunctionType:
    """Copy a Python function of PyTorch that does not ask for function modes, which it would be handed to again."""
    never = {name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")}
    copied = types.FunctionType(
        func.__code__, func.__globals__ | never, func.__name__, func.__defaults__, func.__closure__
    )
    copied.__kwdefaults__ = func.__kwdefaults__
    return copied


@dataclass
class _Call:
    """A call of a function that a weight enters."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    view: Tensor  # what is given of the weight
    weight: _Weight

    def arguments(self, *names: str, **defaults: Any) -> list[Any]:
        """The arguments by name, whether they were given by position or by keyword."""
        given = dict(zip([*names, *defaults], self.args, strict=False)) | self.kwargs
        if missing := [name for name in names if name not in given]:
            raise _NoProduct(f"without its argument {missing[0]}")
        return [given.get(name, defaults.get(name)) for name in [*names, *defaults]]

    def other_than_view(self, *operands: Tensor) -> Tensor:
        """The only other operand of two."""
        others = [x for x in operands if x is not self.view]
        if len(operands) != 2 or len(others) != 1:
            raise _NoProduct("with more than one other tensor")
        return others[0]

    def edge(self) -> GradientEdge | None:
        return get_gradient_edge(self.output) if self.output.requires_grad else None

    def product(
        self,
        groups: Axes,
        outs: Axes,
        ins: Axes,
        inputs: Tensor,
        input_rows: Callable[[Tensor], Tensor],
        output_rows: Callable[[Tensor], Tensor],
        *,
        divisible: bool,
        uses: int,
    ) -> Product:
        """Find where in the weight's matrix the view lies, whose dimensions are groups, outputs and fan-in."""
        first, last, order = self.weight.place(self.view, groups + outs, ins)
        return Product(
            self.weight.name,
            getattr(self.func, "__name__", "product"),
            (first, last),
            math.prod(size for size, _ in groups),
            inputs.detach(),
            self.edge(),
            divisible,
            uses,
            input_rows,
            output_rows,
            order,
        )

    def contraction(self, view_labels: str, inputs: Tensor, labels: str, output_labels: str) -> Product:
        """A product in the notation of einsum, a letter for each dimension."""
        if len(set(view_labels)) < len(view_labels) or len(set(labels)) < len(labels):
            raise _NoProduct("on a diagonal")
        axes: dict[str, tuple[int, int]] = {}
        for label, size, stride in zip(view_labels, self.view.shape, self.view.stride(), strict=True):
            shared = label in labels and label in output_labels
            if shared and (stride == 0 or size == 1):
                continue  # the same weights for all
            axes[label] = (size, stride)
        wide = {label: size for label, size in zip(labels, inputs.shape, strict=True) if size != 1 or label not in axes}
        single = [dim for dim, label in enumerate(labels) if label not in wide and axes[label][0] > 1]
        if single:  # of size 1 where the weight has more: the same inputs for all
            inputs = inputs.squeeze(single)
        labels = "".join(label for dim, label in enumerate(labels) if dim not in single)
        groups = [label for label in axes if label in labels and label in output_labels]
        outs = [label for label in axes if label not in labels and label in output_labels]
        ins = [label for label in axes if label in labels and label not in output_labels]
        if len(groups) + len(outs) + len(ins) < len(axes):
            raise _NoProduct("summed over")
        rows = [label for label in output_labels if label in labels and label not in axes]
        summed = [labels.index(label) for label in labels if label not in axes and label not in output_labels]
        kept = [label for dim, label in enumerate(labels) if dim not in summed]

        def input_rows(x: Tensor) -> Tensor:
            x = x.sum(summed) if summed else x
            return _matrix(x, kept, groups, rows, ins)

        def output_rows(gradient: Tensor) -> Tensor:
            return _matrix(gradient, list(output_labels), groups, rows, outs)

        # Its first dimension is the first one of the rows, in the inputs and in the output alike.
        divisible = bool(rows) and not groups and labels[:1] == output_labels[:1] == rows[0]
        number = self.output.numel() // max(1, math.prod(axes[label][0] for label in groups + outs))
        of = lambda names: [axes[name] for name in names]
        return self.product(
            of(groups), of(outs), of(ins), inputs, input_rows, output_rows, divisible=divisible, uses=number
        )


def _matrix(x: Tensor, labels: list[str], groups: list[str], rows: list[str], cols: list[str]) -> Tensor:
    """Dimensions by label, to [groups, rows, cols]."""
    x = x.permute([labels.index(label) for label in groups + rows + cols])
    sizes = [math.prod(part) for part in _cut(x.shape, len(groups), len(rows))]
    return x.reshape(sizes)


def _cut(shape: Sequence[int], *counts: int) -> list[Sequence[int]]:
    first, second = counts
    return [shape[:first], shape[first : first + second], shape[first + second :]]


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _linear(call: _Call) -> Product:
    x, weight, _ = call.arguments("input", "weight", bias=None)
    if x is call.view or weight is not call.view:
        raise _NoProduct("as another argument than its weight")
    batch = LETTERS[: x.dim() - 1]
    outs = "O" * (weight.dim() - 1)
    return call.contraction(outs + "I", x, batch + "I", batch + outs)


def _matmul(call: _Call) -> Product:
    a, b = [*call.args, *call.kwargs.values()][:2]
    inputs = call.other_than_view(a, b)
    batch = max(a.dim(), b.dim(), 2) - 2
    shared = LETTERS[:batch]
    of_a = shared[batch - max(0, a.dim() - 2) :] + ("" if a.dim() == 1 else "M") + "I"
    of_b = shared[batch - max(0, b.dim() - 2) :] + "I" + ("" if b.dim() == 1 else "O")
    output = shared + ("" if a.dim() == 1 else "M") + ("" if b.dim() == 1 else "O")
    view, other = (of_a, of_b) if a is call.view else (of_b, of_a)
    return call.contraction(view, inputs, other, output)


def _added(batch: str) -> Callable[[_Call], Product]:
    """The product of addmm, baddbmm or addmv: beta * input + alpha * (a @ b)."""

    def parse(call: _Call) -> Product:
        names = ("batch1", "batch2") if batch else ("mat1", "mat2")
        added, a, b, _, alpha = call.arguments("input", *names, beta=1, alpha=1)
        if added is call.view:
            raise _NoProduct("as what is added")
        inputs = call.other_than_view(a, b)
        if alpha != 1:
            inputs = inputs.detach() * alpha
        view, other = (f"{batch}MI", f"{batch}IO") if a is call.view else (f"{batch}IO", f"{batch}MI")
        return call.contraction(view, inputs, other, f"{batch}MO")

    return parse


def _einsum(call: _Call) -> Product:
    equation, *operands = call.args
    if not isinstance(equation, str):
        raise _NoProduct("with dimensions by number")
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    inputs = call.other_than_view(*operands)
    terms, arrow, output = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    # An ellipsis, aligned at its right, stands for dimensions that have no letter yet.
    free = [letter for letter in LETTERS if letter not in equation]
    hidden = [
        x.dim() - len(term.replace("...", "")) if "..." in term else 0 for term, x in zip(labels, operands, strict=True)
    ]
    names = "".join(free[: max(hidden)])
    labels = [term.replace("...", names[len(names) - n :]) for term, n in zip(labels, hidden, strict=True)]
    if arrow:
        output = output.replace("...", names)
    else:
        counts = "".join(labels).count
        output = names + "".join(sorted(c for c in set("".join(labels)) if counts(c) == 1 and c not in names))
    mine, theirs = labels if operands[0] is call.view else labels[::-1]
    return call.contraction(mine, inputs, theirs, output)


def _conv(call: _Call) -> Product:
    x, weight, _, stride, padding, dilation, groups = call.arguments(
        "input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    if weight is not call.view or x is call.view:
        raise _NoProduct("as another argument than its weight")
    kernel = tuple(weight.shape[2:])
    options = _spatial(len(kernel), kernel, stride=stride, padding=padding, dilation=dilation)
    sizes = list(zip(weight.shape, weight.stride(), strict=True))
    out, out_stride = sizes[0]
    batched = lambda z: z if z.dim() == 2 + len(kernel) else z[None]
    return call.product(
        [(groups, out // groups * out_stride)],
        [(out // groups, out_stride)],
        sizes[1:],
        batched(x),
        functools.partial(conv_rows, kernel=kernel, groups=groups, **options),
        lambda gradient: _channels(batched(gradient), groups),
        divisible=call.output.dim() == 2 + len(kernel),
        uses=call.output.numel() // out,
    )


def _conv_transpose(call: _Call) -> Product:
    x, weight, _, stride, padding, output_padding, groups, dilation = call.arguments(
        "input", "weight", bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    )
    if weight is not call.view or x is call.view:
        raise _NoProduct("as another argument than its weight")
    kernel = tuple(weight.shape[2:])
    options = _spatial(
        len(kernel), kernel, stride=stride, padding=padding, dilation=dilation, output_padding=output_padding
    )
    sizes = list(zip(weight.shape, weight.stride(), strict=True))
    channels, channel_stride = sizes[0]
    batched = lambda z: z if z.dim() == 2 + len(kernel) else z[None]
    return call.product(
        [(groups, channels // groups * channel_stride)],
        [sizes[1]],
        [(channels // groups, channel_stride), *sizes[2:]],
        batched(x),
        functools.partial(conv_transpose_rows, kernel=kernel, groups=groups, **options),
        lambda gradient: _channels(batched(gradient), groups),
        divisible=call.output.dim() == 2 + len(kernel),
        uses=x.numel() // channels,
    )


def _spatial(dims: int, kernel: Sequence[int], **given: Any) -> dict[str, Any]:
    """One value for each spatial dimension; padding by name as amounts before and after."""
    one_each = lambda value: tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    options = {}
    for name, value in given.items():
        if isinstance(value, str):
            reach = [d * (k - 1) for d, k in zip(one_each(given["dilation"]), kernel, strict=True)]
            total = reach if value == "same" else [0] * dims
            options[name] = tuple((t // 2, t - t // 2) for t in total)
        elif name == "padding":
            options[name] = tuple((p, p) for p in one_each(value) * (dims if len(one_each(value)) < dims else 1))
        else:
            options[name] = one_each(value) * (dims if len(one_each(value)) < dims else 1)
    return options


def _channels(gradient: Tensor, groups: int) -> Tensor:
    """Gradients [N, C, *positions] as [groups, rows, C / groups]."""
    return gradient.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)


def _embedding(call: _Call) -> Lookup:
    weight, indices, padding_index, by_frequency, sparse = call.arguments(
        "weight", "indices", padding_idx=-1, scale_grad_by_freq=False, sparse=False
    )
    whole = weight.shape == call.weight.tensor.shape and weight.stride() == call.weight.tensor.stride()
    if weight is not call.view or not whole or by_frequency or sparse:
        raise _NoProduct("in part, or with gradients of another scale")
    return Lookup(call.weight.name, indices, call.edge(), padding_index)


def _one_group(rows: Tensor, part: slice | None = None) -> Tensor:
    return (rows if part is None else rows[part])[None]


def _grouped_matmul(call: _Call) -> list[Product]:
    """Rows of inputs [n, i] times the matrix of their group, of [groups, i, o]; offsets say where groups end."""
    x, weight, *_ = [*call.args, *call.kwargs.values()]
    ends = call.kwargs.get("offs", call.args[2] if len(call.args) > 2 else None)
    if weight is not call.view or x is call.view or x.dim() != 2 or weight.dim() != 3 or ends is None:
        raise _NoProduct("in a way that is not known")
    products, start = [], 0
    for index, end in enumerate(ends.tolist()):
        part = slice(start, end)
        single = dataclasses.replace(call, view=weight[index])
        outs, ins = ([(weight.shape[dim], weight.stride(dim))] for dim in (2, 1))
        if end > start:
            products.append(
                single.product(
                    [],
                    outs,
                    ins,
                    x[part],
                    _one_group,
                    functools.partial(_one_group, part=part),
                    divisible=False,
                    uses=end - start,
                )
            )
        start = end
    return products


_PARSERS: dict[str, Callable[[_Call], Product | Lookup | list[Product]]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "mv": _matmul,
    "bmm": _matmul,
    "addmm": _added(""),
    "baddbmm": _added("b"),
    "_grouped_mm": _grouped_matmul,
    "grouped_mm": _grouped_matmul,
    "grouped_mm_fallback": _grouped_matmul,
    "einsum": _einsum,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "conv_transpose1d": _conv_transpose,
    "conv_transpose2d": _conv_transpose,
    "conv_transpose3d": _conv_transpose,
    "embedding": _embedding,
}
