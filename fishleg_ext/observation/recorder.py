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

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.calls import PARSERS, Call
from fishleg_ext.observation.products import Lookup, NoProduct, Product, WeightInMemory


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
        self._weights: dict[int, list[WeightInMemory]] = {}
        for name, weight in weights.items():
            if weight.numel():
                orientation = (orientations or {}).get(name) or Orientation.of(weight.shape)
                known = self._weights.setdefault(weight.untyped_storage().data_ptr(), [])
                known.append(WeightInMemory(name, weight, orientation))

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
        parse = PARSERS.get(getattr(func, "__name__", ""))
        for tensor, weight in entering:
            if parse is None:
                if self._makes_another(func, output, weight):
                    self._note(weight, func)
                continue
            try:
                if sum(other is weight for _, other in entering) > 1:
                    raise NoProduct("more than once")
                use = parse(Call(func, args, dict(kwargs), output, tensor, weight))
            except NoProduct as reason:
                self._note(weight, func, f", {reason}")
                continue
            self._signature.append((weight.name, getattr(func, "__name__", "")) if isinstance(use, list) else use.kind)
            if isinstance(use, Lookup):
                self.lookups.append(use)
                continue
            for product in use if isinstance(use, list) else [use]:
                self._take(product)
        return output

    def _entering(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Iterable[tuple[Tensor, WeightInMemory]]":
        for leaf in _leaves(args, kwargs):
            if isinstance(leaf, Tensor) and (weight := self._weight_of(leaf)) is not None:
                yield leaf, weight

    def _weight_of(self, tensor: Tensor) -> "WeightInMemory | None":
        if tensor.layout is not torch.strided or not tensor.is_floating_point() or not tensor.numel():
            return None
        try:
            known = self._weights.get(tensor.untyped_storage().data_ptr(), ())
        except (NotImplementedError, RuntimeError):  # of a tensor without memory
            return None
        return next((weight for weight in known if weight.holds(tensor)), None)

    def _makes_another(self, func: Callable[..., Any], output: Any, weight: "WeightInMemory") -> bool:
        """Tell whether a call makes values of the weight, rather than a view, a number, or a tensor of its shape."""
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            return True
        if name.startswith("new_") or name.endswith("_like"):
            return False
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and _has_values(leaf)]
        return any(self._weight_of(tensor) is not weight for tensor in tensors)

    def _note(self, weight: "WeightInMemory", func: Callable[..., Any], reason: str = "") -> None:
        call = f"{getattr(func, '__name__', func)}{reason}"
        self.others.setdefault(weight.name, {})[call] = None
        self._signature.append((weight.name, call))


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Any]:
    """Yield what a call was given, with the entries of lists and tuples."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from pytree.tree_leaves(value)
        else:
            yield value


def _is_composite(func: Callable[..., Any]) -> bool:
    """Tell whether it is written in Python, so that its own calls can be seen."""
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
