"""Reads data: batches of any size, re-cut into chunks."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fishleg_ext.common.arguments import checked_function, checked_type
from fishleg_ext.observation.likelihoods import LossFunction

CHUNK_SAMPLES = 64  # whose activations are held at a time
PASSED_ON = (type(None), bool, int, float, str)  # what is no tensor, and the same for all samples of a batch
BatchFunction = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Shared:
    """Holds what all samples of a batch share, and is passed on: a tensor without a row for each, or another object.

    Attributes:
        held: the tensor or object.
    """

    held: Any

    def value(self) -> Any:
        """Return a copy, which the model may change."""
        return self.held.clone() if isinstance(self.held, Tensor) else copy.deepcopy(self.held)

    def to(self, device: torch.device) -> "Shared":
        """Move a tensor."""
        moved = self.held.to(device) if isinstance(self.held, Tensor) else self.held
        return self if moved is self.held else Shared(moved)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some samples.

    Attributes:
        inputs, targets: trees of tensors whose first dimension is the sample, and of what is the same for all samples.
        samples: how many.
        own_loss: whether the model computes the loss itself, from `labels` among the inputs.
        divisible: whether it can be cut along the first dimension; else it is a single sample, in a form of its own.
    """

    inputs: Any
    targets: Any
    samples: int
    own_loss: bool = False
    divisible: bool = True

    def part(self, start: int, stop: int) -> "Chunk":
        """The samples from `start` to before `stop`."""
        if (start, stop) == (0, self.samples):
            return self
        cut = lambda x: x[start:stop] if isinstance(x, Tensor) else x
        inputs, targets = pytree.tree_map(cut, (self.inputs, self.targets))
        return dataclasses.replace(self, inputs=inputs, targets=targets, samples=stop - start)

    def joined(self, other: "Chunk") -> "Chunk":
        """The samples of both, whose trees are alike."""
        join = lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a
        inputs, targets = pytree.tree_map(join, (self.inputs, self.targets), (other.inputs, other.targets))
        return dataclasses.replace(self, inputs=inputs, targets=targets, samples=self.samples + other.samples)

    def with_targets(self, targets: Any) -> "Chunk":
        """The same samples with other targets."""
        inputs = self.inputs | {"labels": targets} if self.own_loss else self.inputs
        return dataclasses.replace(self, inputs=inputs, targets=targets)


def tokens_of(model: nn.Module, inputs: Any) -> Tensor | None:
    """Return which positions of sequences are tokens and not padding, bool [N, T]; None where nothing tells.

    That is the `attention_mask` among the inputs, as the models of transformers take it; of an encoder and a decoder it
    would be of the encoder's positions alone.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask != 0


def one_chunk(inputs: Any, targets: Any = None) -> Chunk:
    """Make a chunk of one batch; its inputs are a mapping or a tuple, and there may be no targets.

    Raises:
        TypeError, ValueError: there is no tensor with a first dimension, or tensors have others.
    """
    return Chunk(inputs, targets, _batch_size(inputs, targets, needs_targets=False))


class Samples(list[Any]):
    """Pairs of inputs and targets of single samples, which are not put together."""


class Adapted:
    """Data whose batches go through a function.

    Args:
        data: an iterable of batches of any kind.
        batch_fn: batch -> (inputs, targets), or a list of such tuples, one for each sample.
    """

    def __init__(self, data: Iterable[Any], batch_fn: BatchFunction) -> None:
        self.data, self.batch_fn = data, checked_function("batch_fn", batch_fn, "a function of a batch")

    def __iter__(self) -> Iterator[Any]:
        """Read the data anew."""
        for batch in self.data:
            adapted = self.batch_fn(batch)
            yield Samples(adapted) if isinstance(adapted, list) else adapted


def chunks(
    data: Iterable[Any],
    size: int,
    limit: int,
    device: torch.device,
    *,
    own_loss: bool | None = None,
    needs_targets: bool = True,
) -> Iterator[Chunk]:
    """Re-cut batches into chunks of `size` samples, `limit` samples in all.

    A chunk is smaller where the data ends, or where the next batch has tensors of other shapes.

    Args:
        data: iterable of (inputs, targets), or of mappings that hold both, as Hugging Face's loaders yield them.
        size, limit: see above.
        device: that tensors are moved to.
        own_loss: whether the model computes the loss itself; None where no loss is asked for.
        needs_targets: whether targets must be there, as they are neither drawn nor left aside.

    Raises:
        TypeError, ValueError: a batch that is of another kind; tensors of different numbers of samples.
    """
    held: Chunk | None = None
    spec = None
    remaining = limit
    if remaining <= 0:
        return
    for batch in data:
        if isinstance(batch, Samples):
            for inputs, targets in map(_checked_sample, batch[:remaining]):
                inputs, targets = pytree.tree_map(lambda x: _moved(x, device), (inputs, targets))
                yield Chunk(inputs, targets, 1, bool(own_loss), divisible=False)
                remaining -= 1
        else:
            inputs, targets = _pair(batch, own_loss if needs_targets or own_loss else None)
            needed = needs_targets and not (own_loss or isinstance(batch, Mapping))
            count = _batch_size(inputs, targets, needs_targets=needed)
            batch_spec = pytree.tree_structure((inputs, targets))
            if spec is not None and batch_spec != spec:
                raise TypeError(f"expected every batch of the structure of the first, {spec}, got {batch_spec}")
            spec = batch_spec
            if own_loss and isinstance(inputs, dict) and targets is not None:
                inputs = inputs | {"labels": targets}
            given = Chunk(inputs, targets, count, bool(own_loss)).part(0, min(count, remaining))
            moved = pytree.tree_map(lambda x: _moved(x, device), (given.inputs, given.targets))
            given = dataclasses.replace(given, inputs=moved[0], targets=moved[1])
            remaining -= given.samples
            if held is not None and held.samples and not _alike(held, given):
                yield held
                held = None
            held = given if held is None or not held.samples else held.joined(given)
            while held.samples >= size:
                yield held.part(0, size)
                held = held.part(size, held.samples)
        if remaining == 0:
            break
    if held is not None and held.samples:
        yield held


def _pair(batch: Any, own_loss: bool | None) -> tuple[Any, Any]:
    """Inputs and targets of a batch."""
    if isinstance(batch, Mapping):
        if own_loss is False:
            raise ValueError(
                f"expected data to yield (inputs, targets) pairs, got one {type(batch).__name__} a batch: give "
                "loss_fn=None where the model returns its own loss, or batch_fn= to make a pair of each"
            )
        inputs = _plain(batch)
        return inputs, inputs.get("labels")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
        raise TypeError(
            f"expected data to yield (inputs, targets) pairs, got {what}; batch_fn= can make a pair of each batch"
        )
    inputs, targets = _plain(batch[0]), _plain(batch[1])
    if own_loss and not isinstance(inputs, dict):
        raise TypeError(
            "expected a mapping of inputs with loss_fn=None, as the model takes keywords and returns its own loss, got "
            f"{type(inputs).__name__}"
        )
    if own_loss and targets is None:
        targets = inputs.get("labels")
    return inputs, targets


def _plain(tree: Any) -> Any:
    """Mappings of other kinds, such as a BatchEncoding, as dicts."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return tree


def _checked_sample(sample: Any) -> tuple[Any, Any]:
    if not isinstance(sample, tuple) or len(sample) != 2:
        raise TypeError(f"expected batch_fn to return tuples (inputs, targets), got a {type(sample).__name__}")
    return sample


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if hasattr(leaf, "to") else leaf


def _batch_size(inputs: Any, targets: Any, *, needs_targets: bool) -> int:
    sizes = set()
    for leaf in pytree.tree_leaves((inputs, targets)):
        if isinstance(leaf, Tensor) and leaf.dim():
            sizes.add(len(leaf))
        elif isinstance(leaf, Tensor):
            raise TypeError(
                "expected batches of tensors whose first dimension is the sample, got a tensor without dimensions; a "
                "dataset of single samples goes through torch.utils.data.DataLoader"
            )
        elif not isinstance(leaf, (*PASSED_ON, Shared)):
            raise TypeError(
                "expected batches of tensors whose first dimension is the sample, got a "
                f"{type(leaf).__name__}; batch_fn= can make tensors of it, or a list of single samples"
            )
    for what, tree in (("inputs", inputs), ("targets", targets)):
        leaves = pytree.tree_leaves(tree)
        if not any(isinstance(leaf, Tensor) for leaf in leaves) and (needs_targets or what == "inputs"):
            kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
            raise TypeError(
                f"expected {what} to hold a tensor whose first dimension is the sample, got {kinds}; a dataset of "
                "single samples goes through torch.utils.data.DataLoader"
            )
    if len(sizes) != 1:
        raise ValueError(
            f"expected inputs and targets with as many samples each, got {sorted(sizes)}; batch_fn= can make them so"
        )
    return sizes.pop()


def _alike(held: Chunk, given: Chunk) -> bool:
    """Tell whether two chunks can be put together: tensors have the same shapes, what is no tensor is the same."""
    pairs = zip(_leaves(held), _leaves(given), strict=True)
    return all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b) and a == b
        for a, b in pairs
    )


def _leaves(chunk: Chunk) -> list[Any]:
    return pytree.tree_leaves((chunk.inputs, chunk.targets))


def require_rereadable(data: Iterable[Any], why: str) -> None:
    """Raise if the data can be iterated over only once."""
    source = data.data if isinstance(data, Adapted) else data
    if isinstance(source, Iterator):
        raise ValueError(
            f"expected data that can be read again, as {why}, got a one-shot {type(source).__name__}; "
            "pass a list or a DataLoader"
        )


def checked_source(
    data: Iterable[Any] | None, loss_fn: LossFunction | None, batch_fn: BatchFunction | None = None
) -> tuple[Any, LossFunction | None]:
    """Return data, its batches adapted by `batch_fn`, and loss if they are an iterable and a function or None."""
    if data is not None and not hasattr(data, "__getitem__"):  # which is enough to be iterated over
        checked_type("data", data, Iterable, "an iterable of batches")
    if data is not None and batch_fn is not None:
        data = Adapted(data, batch_fn)
    if loss_fn is None:
        return data, None
    if isinstance(loss_fn, type):
        raise TypeError(
            f"expected loss_fn to be a function of outputs and targets, got the class {loss_fn.__name__}: an instance "
            f"of it, {loss_fn.__name__}(), is one"
        )
    return data, checked_function("loss_fn", loss_fn, "a function of outputs and targets or None")
