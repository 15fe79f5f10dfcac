"""Reads the products off calls of PyTorch: what a function multiplies a weight by, and where its outputs go."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fishleg_ext.observation.products import Axes, Lookup, NoProduct, Product, WeightInMemory
from fishleg_ext.observation.unfold import conv_gradients, conv_rows, conv_transpose_rows


@dataclass
class Call:
    """A call of a function that a weight enters."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    view: Tensor  # what is given of the weight
    weight: WeightInMemory

    def arguments(self, *names: str, **defaults: Any) -> list[Any]:
        """The arguments by name, whether they were given by position or by keyword."""
        given = dict(zip([*names, *defaults], self.args, strict=False)) | self.kwargs
        if missing := [name for name in names if name not in given]:
            raise NoProduct(f"without its argument {missing[0]}")
        return [given.get(name, defaults.get(name)) for name in [*names, *defaults]]

    def other_than_view(self, *operands: Tensor) -> Tensor:
        """The only other operand of two."""
        others = [x for x in operands if x is not self.view]
        if len(operands) != 2 or len(others) != 1:
            raise NoProduct("with more than one other tensor")
        return others[0]

    def edge(self) -> GradientEdge | None:
        """Say where the gradient by the output arrives, if one can."""
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
        gradients: Callable[[Tensor, Tensor], Tensor | None] | None = None,
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
            gradients,
        )

    def contraction(self, view_labels: str, inputs: Tensor, labels: str, output_labels: str) -> Product:
        """A product in the notation of einsum, a letter for each dimension."""
        if len(set(view_labels)) < len(view_labels) or len(set(labels)) < len(labels):
            raise NoProduct("on a diagonal")
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
            raise NoProduct("summed over")
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
    size = dict(zip(labels, x.shape, strict=True))
    order = [labels.index(label) for label in groups + rows + cols]
    x = x if order == sorted(order) else x.permute(order)
    return x.reshape([math.prod(size[label] for label in part) for part in (groups, rows, cols)])


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _linear(call: Call) -> Product:
    x, weight, _ = call.arguments("input", "weight", bias=None)
    if x is call.view or weight is not call.view:
        raise NoProduct("as another argument than its weight")
    batch = LETTERS[: x.dim() - 1]
    outs = "O" * (weight.dim() - 1)
    return call.contraction(outs + "I", x, batch + "I", batch + outs)


def _matmul(call: Call) -> Product:
    a, b = [*call.args, *call.kwargs.values()][:2]
    inputs = call.other_than_view(a, b)
    batch = max(a.dim(), b.dim(), 2) - 2
    shared = LETTERS[:batch]
    of_a = shared[batch - max(0, a.dim() - 2) :] + ("" if a.dim() == 1 else "M") + "I"
    of_b = shared[batch - max(0, b.dim() - 2) :] + "I" + ("" if b.dim() == 1 else "O")
    output = shared + ("" if a.dim() == 1 else "M") + ("" if b.dim() == 1 else "O")
    view, other = (of_a, of_b) if a is call.view else (of_b, of_a)
    return call.contraction(view, inputs, other, output)


def _added(batch: str) -> Callable[[Call], Product]:
    """The product of addmm, baddbmm or addmv: beta * input + alpha * (a @ b)."""

    def parse(call: Call) -> Product:
        names = ("batch1", "batch2") if batch else ("mat1", "mat2")
        added, a, b, _, alpha = call.arguments("input", *names, beta=1, alpha=1)
        if added is call.view:
            raise NoProduct("as what is added")
        inputs = call.other_than_view(a, b)
        if alpha != 1:
            inputs = inputs.detach() * alpha
        view, other = (f"{batch}MI", f"{batch}IO") if a is call.view else (f"{batch}IO", f"{batch}MI")
        return call.contraction(view, inputs, other, f"{batch}MO")

    return parse


def _einsum(call: Call) -> Product:
    equation, *operands = call.args
    if not isinstance(equation, str):
        raise NoProduct("with dimensions by number")
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


def _conv(call: Call) -> Product:
    x, weight, _, stride, padding, dilation, groups = call.arguments(
        "input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    if weight is not call.view or x is call.view:
        raise NoProduct("as another argument than its weight")
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
        gradients=functools.partial(conv_gradients, kernel=kernel, **options) if groups == 1 else None,
    )


def _conv_transpose(call: Call) -> Product:
    x, weight, _, stride, padding, output_padding, groups, dilation = call.arguments(
        "input", "weight", bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    )
    if weight is not call.view or x is call.view:
        raise NoProduct("as another argument than its weight")
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

    def one_each(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return values * dims if len(values) == 1 else values

    options: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, str):
            reach = [d * (k - 1) for d, k in zip(one_each(given["dilation"]), kernel, strict=True)]
            total = reach if value == "same" else [0] * dims
            options[name] = tuple((t // 2, t - t // 2) for t in total)
        elif name == "padding":
            options[name] = tuple((p, p) for p in one_each(value))
        else:
            options[name] = one_each(value)
    return options


def _channels(gradient: Tensor, groups: int) -> Tensor:
    """Gradients [N, C, *positions] as [groups, rows, C / groups]."""
    return gradient.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)


def _embedding(call: Call) -> Lookup:
    weight, indices, padding_index, by_frequency, sparse = call.arguments(
        "weight", "indices", padding_idx=-1, scale_grad_by_freq=False, sparse=False
    )
    whole = weight.shape == call.weight.tensor.shape and weight.stride() == call.weight.tensor.stride()
    if weight is not call.view or not whole or by_frequency or sparse:
        raise NoProduct("in part, or with gradients of another scale")
    return Lookup(call.weight.name, indices, call.edge(), padding_index)


def _one_group(rows: Tensor, part: slice | None = None) -> Tensor:
    return (rows if part is None else rows[part])[None]


def _grouped_matmul(call: Call) -> list[Product]:
    """Rows of inputs [n, i] times the matrix of their group, of [groups, i, o]; offsets say where groups end."""
    x, weight, *_ = [*call.args, *call.kwargs.values()]
    ends = call.kwargs.get("offs", call.args[2] if len(call.args) > 2 else None)
    if weight is not call.view or x is call.view or x.dim() != 2 or weight.dim() != 3 or ends is None:
        raise NoProduct("in a way that is not known")
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


PARSERS: dict[str, Callable[[Call], Product | Lookup | list[Product]]] = {
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
