"""Cuts a model's outputs into samples, and differentiates the loss of each by them."""

import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from fishleg_ext.observation.batches import PASSED_ON
from fishleg_ext.observation.forward import scalar_loss
from fishleg_ext.observation.likelihoods import LossFunction


class CannotCut(Exception):
    """The loss needs what cannot be cut into samples."""


class _Uncut:
    """Stands for an output that cannot be cut, so that a loss that needs it says so."""

    def __init__(self, what: str) -> None:
        object.__setattr__(self, "what", what)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # which Python, not the loss, asks for
            raise AttributeError(name)
        raise CannotCut(self.what)

    def _fail(self, *_: Any) -> NoReturn:
        raise CannotCut(self.what)

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __neg__ = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _fail

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        found = [x for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, _Uncut)]
        raise CannotCut(found[0].what)


class OutputTree:
    """A model's outputs as leaves: tensors, and what else containers and dataclasses hold.

    Attributes:
        leaves: in a fixed order.
        names: of the leaves, to tell them apart.
    """

    def __init__(self, outputs: Any) -> None:
        self._outputs = outputs
        self.leaves: list[Any] = []
        self.names: list[str] = []
        self._map(outputs, self._collect)

    def _collect(self, leaf: Any, name: str) -> Any:
        self.leaves.append(leaf)
        self.names.append(name)
        return leaf

    def with_leaves(self, leaves: list[Any]) -> Any:
        """The same structure with other leaves."""
        remaining = iter(leaves)
        return self._map(self._outputs, lambda *_: next(remaining))

    def detached(self) -> Any:
        """The same structure, its tensors without their history."""
        return self.with_leaves([x.detach() if isinstance(x, Tensor) else x for x in self.leaves])

    def cuttable(self, samples: int, names: Collection[str]) -> list[bool]:
        """Tell which leaves can be cut into samples: those of these names, of the right length."""
        pairs = zip(self.names, self.leaves, strict=True)
        return [name in names and _length(leaf) == samples for name, leaf in pairs]

    def per_sample(self, alone: "OutputTree", samples: int) -> frozenset[str]:
        """Names of the leaves whose first dimension is the sample, seen by what they are of a single sample."""
        if self.names != alone.names:
            return frozenset()
        both = zip(self.names, self.leaves, alone.leaves, strict=True)
        return frozenset(name for name, mine, other in both if _length(mine) == samples and _length(other) == 1)

    def uncut(self, index: int) -> Any:
        """Return what stands for a leaf that cannot be cut."""
        leaf = self.leaves[index]
        if isinstance(leaf, PASSED_ON):
            return leaf
        kind = f"a tensor of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        return _Uncut(f"{self.names[index] or 'its output'}, {kind}")

    def _map(self, tree: Any, function: Any, name: str = "") -> Any:
        if _holds_tensors(tree):  # an object of a class of its own
            held = {key: self._map(value, function, f"{name}.{key}") for key, value in vars(tree).items()}
            copied = copy.copy(tree)
            vars(copied).update(held)
            return copied
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not isinstance(tree, dict):
            fields = [field.name for field in dataclasses.fields(tree) if field.init]
            by_field = {key: self._map(getattr(tree, key), function, f"{name}.{key}") for key in fields}
            return dataclasses.replace(tree, **by_field)
        paths, spec = pytree.tree_flatten_with_path(tree)
        if len(paths) == 1 and paths[0][1] is tree:
            return function(tree, name)
        mapped = [self._map(leaf, function, name + pytree.keystr(path)) for path, leaf in paths]
        return pytree.tree_unflatten(mapped, spec)


def times_own(tensors: Iterable[Tensor], numbers: Tensor) -> list[Tensor]:
    """Multiply what belongs to each sample, along the first dimension, by the number [samples] of that sample."""
    return [x * numbers.to(x).reshape(-1, *[1] * (x.dim() - 1)) for x in tensors]


def _length(leaf: Any) -> int:
    """Size of the first dimension, -1 where there is none."""
    return len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else -1


def _holds_tensors(tree: Any) -> bool:
    """Tell whether it is an object, none of a container or dataclass, that has tensors as attributes."""
    known = isinstance(tree, (*PASSED_ON, Tensor, type, tuple, list, dict)) or dataclasses.is_dataclass(tree)
    return not known and any(isinstance(value, Tensor) for value in getattr(tree, "__dict__", {}).values())


class SampleLosses:
    """The loss of each sample, from the outputs of all, by vmap where the loss allows it.

    Attributes:
        loss_fn: (outputs, targets) -> scalar.
        names: of the outputs whose first dimension is the sample, as `OutputTree.per_sample` tells.
    """

    def __init__(self, loss_fn: LossFunction | None) -> None:
        self.loss_fn = loss_fn
        self.names: Collection[str] = ()
        self._vectorized = True

    def values(self, outputs: OutputTree, targets: Any, samples: int) -> Tensor:
        """Return the losses [samples].

        Raises:
            CannotCut: the loss needs an output that cannot be cut into samples.
        """
        cut = _Cut(self.loss_fn, outputs, targets, samples, self.names)
        found = self._vectorize(vmap(cut.loss), cut)
        if found is not None:
            return found
        return torch.stack([cut.loss(*parts) for parts in cut.samples()])

    def gradients(
        self, outputs: OutputTree, targets: Any, samples: int, group: int = 1
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs that require gradients, and the gradient of the loss of each group of samples by them.

        Raises:
            CannotCut: the loss needs an output that cannot be cut into samples.
        """
        cut = _Cut(self.loss_fn, outputs, targets, samples, self.names, group)
        found = self._vectorize(vmap(grad(cut.loss)), cut)
        if found is not None:
            return cut.free, [x.flatten(0, 1) for x in found]
        rows: list[list[Tensor]] = [[] for _ in cut.free]
        for free, rest, target_parts in cut.samples():
            with torch.enable_grad():
                free = [x.requires_grad_() for x in free]
                loss = cut.loss(free, rest, target_parts)
            by: tuple[Tensor | None, ...] = (None,) * len(free)
            if loss.requires_grad:
                by = torch.autograd.grad(loss, free, allow_unused=True)
            for row, x, gradient in zip(rows, free, by, strict=True):
                row.append(torch.zeros_like(x) if gradient is None else gradient)
        return cut.free, [torch.cat(row) for row in rows]

    def gradients_by(
        self, wanted: Sequence[Any], outputs: Any, targets: Any, samples: int, scale: Tensor
    ) -> list[Tensor | None]:
        """Return gradients of each sample's own loss, times its scale, by tensors or edges of the graph of outputs.

        Args:
            wanted: what to differentiate by; None is returned for what the loss does not depend on.
            outputs: of the model.
            targets: of the samples.
            samples: how many.
            scale: a number, or one for each sample.

        Raises:
            CannotCut: the loss needs an output that cannot be cut into samples.
        """
        if samples == 1:
            with torch.enable_grad():
                loss = scalar_loss(self.loss_fn, outputs, targets)
            if not loss.requires_grad or not wanted:
                return [None] * len(wanted)
            return list(torch.autograd.grad(loss, wanted, scale.to(loss).reshape(()), allow_unused=True))
        free, gradients = self.gradients(OutputTree(outputs), targets, samples)
        if not free or not wanted:
            return [None] * len(wanted)
        return list(torch.autograd.grad(free, wanted, times_own(gradients, scale), allow_unused=True))

    def _vectorize(self, function: Any, cut: "_Cut") -> Any:
        """Return what the function does for all samples, or None where vmap cannot run the loss."""
        if not self._vectorized:
            return None
        try:
            return function(*cut.tensors())
        except CannotCut:
            raise
        except Exception:  # what is wrong with the loss itself is raised where it is called without vmap
            self._vectorized = False
            return None


class _Cut:
    """The loss as a function of what belongs to a group of samples: outputs to differentiate by, others, targets."""

    def __init__(
        self,
        loss_fn: LossFunction | None,
        outputs: OutputTree,
        targets: Any,
        samples: int,
        names: Collection[str],
        group: int = 1,
    ) -> None:
        if loss_fn is None:
            raise CannotCut("the loss that the model itself returns, a mean over the batch")
        self._loss_fn, self._outputs, self._count = loss_fn, outputs, samples // group
        indices = [i for i, yes in enumerate(outputs.cuttable(samples, names)) if yes]
        self._free = [i for i in indices if outputs.leaves[i].requires_grad]
        self._rest = [i for i in indices if i not in self._free]
        self._targets, self._spec = pytree.tree_flatten(targets)
        self.free = [outputs.leaves[i] for i in self._free]

    def tensors(self) -> list[list[Tensor]]:
        """The three of all groups, [count, group, ...] each."""
        rest = [self._outputs.leaves[i] for i in self._rest]
        parts = [[x.detach() for x in self.free], rest, [x for x in self._targets if isinstance(x, Tensor)]]
        return [[x.unflatten(0, (self._count, -1)) for x in part] for part in parts]

    def samples(self) -> Iterator[list[list[Tensor]]]:
        """The three of each group."""
        for s in range(self._count):
            yield [[x[s].detach() for x in part] for part in self.tensors()]

    def loss(self, free: list[Tensor], rest: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The loss on one group."""
        given = dict(zip(self._free + self._rest, [*free, *rest], strict=True))
        leaves = [given[i] if i in given else self._outputs.uncut(i) for i in range(len(self._outputs.leaves))]
        parts = iter(targets)
        whole = [next(parts) if isinstance(leaf, Tensor) else leaf for leaf in self._targets]
        tree = pytree.tree_unflatten(whole, self._spec)
        return scalar_loss(self._loss_fn, self._outputs.with_leaves(leaves), tree)
