"""Walks the repeated blocks of a network, such as the layers of a transformer, one after the other.

A pass in which no block runs gives what the network hands to each of them, but for the hidden states that one block
hands to the next; these are held, and each block runs by itself. So each runs once, however many there are, and what
is computed in a block takes the memory of that block.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fishleg_ext.observation.batches import Chunk, Shared, tokens_of
from fishleg_ext.observation.blocks import Blocks, Entry, Segment
from fishleg_ext.observation.forward import call, running, scalar_loss
from fishleg_ext.observation.likelihoods import LossFunction, OwnLoss
from fishleg_ext.observation.outputs import CannotCut, OutputTree, SampleLosses
from fishleg_ext.observation.types import DrawLabels
from fishleg_ext.observation.verification import differ, epsilon, rounding, tolerance

VERIFIED = 2  # samples that are run through the whole network as well


@dataclass
class _Held:
    """A chunk of samples: what each block is called with beside the hidden states, and these."""

    chunk: Chunk
    entries: list[Entry]
    hidden: Tensor
    tokens: Tensor | None
    inputs: list[Tensor] = field(default_factory=list)  # of each block, where all are held
    gradients: list[Tensor] = field(default_factory=list)  # by the outputs of each block


class _Reached(Exception):
    """The last block is called."""


class CannotWalk(ValueError):
    """The blocks cannot be run one by one; the message says why."""


class BlockWalk:
    """Holds the hidden states before one block, and runs it for those before the next.

    Args:
        model: any module, as it is now.
        blocks: of the model.
        device: where the model is.
        seed: of PyTorch's RNG while the model runs.
        held_on: where hidden states are held; None is the device.

    Attributes:
        position: number of the block whose inputs are held.
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, *, device: torch.device, seed: int, held_on: torch.device | None = None
    ) -> None:
        self.model, self.blocks, self.device, self.seed = model, blocks, device, seed
        self.held_on = device if held_on is None else held_on
        self.modules = list(blocks.modules.values())
        self.segments = [Segment(path, block) for path, block in blocks.modules.items()]
        self.position = 0
        self._input, self._output = 0, 0  # which leaf of a block's arguments, and of its outputs, the hidden states are
        self._returns: list[Callable[[Tensor], Any]] = []  # what stands for a block's outputs
        self._held: list[_Held] = []

    def start(self, chunks: Iterable[Chunk]) -> None:
        """Hold the inputs of the first block.

        Raises:
            CannotWalk: a block needs more of the others than the hidden states of the one before.
        """
        with running(self.model, self.device, self.seed):
            for chunk in chunks:
                if not self._held:
                    self._trace(chunk.part(0, min(VERIFIED, chunk.samples)) if chunk.divisible else chunk)
                entries = self._arguments(chunk)
                self._held.append(self._hold(chunk, entries))
        if not self._held:
            raise ValueError("expected data that yields at least one sample, got none; can it be read again?")

    def data(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield (inputs, targets) of the block at `position`, as its segment takes them.

        Targets are gradients by its outputs after `differentiate`, else of the same shape as its outputs.
        """
        for held in self._held:
            leaves = self._inputs(held, self.position)
            mask = {} if held.tokens is None else {"attention_mask": held.tokens}
            inputs = {"leaves": leaves} | mask
            yield inputs, held.gradients[self.position] if held.gradients else leaves[self._input]

    @property
    def samples(self) -> int:
        """Count the samples whose hidden states are held."""
        return sum(held.chunk.samples for held in self._held)

    def sizes(self) -> list[int]:
        """Count the numbers in the hidden states of each chunk."""
        return [held.hidden.numel() for held in self._held]

    def largest(self, count: int) -> list[Chunk]:
        """Return the chunks with the largest hidden states."""
        ordered = sorted(self._held, key=lambda held: held.hidden.numel(), reverse=True)
        return [held.chunk for held in ordered[:count]]

    def bytes_held(self) -> int:
        """Count the bytes of what is held of all samples."""
        tensors: dict[int, Tensor] = {}
        for held in self._held:
            leaves = [x.held if isinstance(x, Shared) else x for entry in held.entries for x in entry.leaves]
            both = pytree.tree_leaves((held.chunk.inputs, held.chunk.targets))
            for x in (*leaves, *both, held.hidden, held.tokens, *held.inputs, *held.gradients):
                if isinstance(x, Tensor):
                    tensors[x.untyped_storage().data_ptr()] = x
        return sum(x.untyped_storage().nbytes() for x in tensors.values())

    def segment(self, unit: float | None = None) -> Segment:
        """Return the block at `position`; its outputs are divided by `unit`, and zero where there is padding."""
        entry = self._held[0].entries[self.position]
        return self.segments[self.position].takes(entry.spec, self._output, unit)

    def root_mean_square(self) -> float:
        """Return that of the outputs of the block at `position`, of the first samples; 1 where all are zero."""
        with running(self.segment(), self.device, self.seed):
            return float(self._run(self._held[0], self.position).float().square().mean().sqrt()) or 1.0

    def advance(self, outputs: Sequence[Tensor] = ()) -> None:
        """Run the block at `position`, as it is now, and hold the inputs of the next.

        Args:
            outputs: of the block, where it has run already: those of all samples in order, in any number of tensors.
        """
        parts = iter(outputs)
        if not outputs:
            with running(self.segment(), self.device, self.seed):
                for held in self._held:
                    held.hidden = self._run(held, self.position).to(self.held_on)
        else:
            for held in self._held:
                found = [next(parts)]
                while sum(map(len, found)) < held.chunk.samples:
                    found.append(next(parts))
                held.hidden = (torch.cat(found) if len(found) > 1 else found[0]).to(self.held_on)
        self.position += 1

    def differentiate(self, loss_fn: LossFunction | None, draw: DrawLabels | None) -> None:
        """Hold the inputs of every block, and the gradient of each sample's own loss by the outputs of every block.

        From here on `data` is there for every `position`, which may be set at will.

        Args:
            loss_fn: of the network; None is the loss that the model returns.
            draw: labels, where they are drawn.

        Raises:
            ValueError: the loss does not depend on the blocks, or needs what cannot be cut into samples.
        """
        losses = SampleLosses(loss_fn)
        with running(self.model, self.device, self.seed):
            first = self._held[0].chunk
            self._compare_outputs(first.part(0, min(VERIFIED, first.samples)) if first.divisible else first)
            for held in self._held:
                self._run_all(held)
                self._back(held, self._top_gradient(held, losses, draw))
                held.hidden = held.inputs[0]

    def _run_all(self, held: _Held) -> None:
        """Hold the inputs of all blocks, and the hidden states after the last."""
        for index in range(len(self.modules)):
            held.inputs.append(held.hidden)
            held.hidden = self._run(held, index).to(self.held_on)

    def _back(self, held: _Held, gradient: Tensor) -> None:
        """Hold the gradients by the outputs of all blocks, given that of the last."""
        for index in reversed(range(len(self.modules))):
            held.gradients.insert(0, gradient.to(self.held_on))
            if index:
                gradient = self._by_inputs(held, index, gradient)

    def _by_inputs(self, held: _Held, index: int, gradient: Tensor) -> Tensor:
        """Return the gradient by the hidden states before a block, given that by its outputs."""
        hidden = held.inputs[index].to(self.device).requires_grad_()
        with torch.enable_grad():
            outputs = self._run(held, index, hidden)
        return torch.autograd.grad(outputs, hidden, gradient)[0]

    def _outputs(self, chunk: Chunk, hidden: Tensor) -> Any:
        """Outputs of the network, given the hidden states after the last block; no block runs."""
        last = len(self.modules) - 1
        stand_in = lambda index, *_: self._returns[index](hidden if index == last else hidden.detach())
        with torch.enable_grad(), self._replaced(stand_in):
            return call(self.model, {}, chunk.inputs)

    def _compare_outputs(self, chunk: Chunk) -> None:
        """Raise CannotWalk where the network's outputs depend on blocks other than through the last one."""
        held = self._hold(chunk, self._arguments(chunk))
        start = held.hidden.to(self.device)

        def replaced(module: nn.Module, args: Any, kwargs: Any) -> Any:
            entry = Entry.of(args, kwargs)
            entry.leaves[self._input] = start
            return pytree.tree_unflatten(entry.leaves, entry.spec)

        self._run_all(held)
        after = held.hidden.to(self.device).requires_grad_()
        found = self._floats(self._outputs(chunk, after))
        handle = self.modules[0].register_forward_pre_hook(replaced, with_kwargs=True)
        try:
            start.requires_grad_()
            with torch.enable_grad():
                expected = self._floats(call(self.model, {}, chunk.inputs))
        finally:
            handle.remove()
        alike = len(found) == len(expected) and all(map(_close, found, expected))
        if alike and found:
            probes = [torch.randn_like(x) for x in found]  # one gradient for all outputs
            (wanted,) = torch.autograd.grad(expected, start, probes, allow_unused=True)
            (gradient,) = torch.autograd.grad(found, after, probes, allow_unused=True)
            for index in reversed(range(len(self.modules))) if gradient is not None else ():
                gradient = self._by_inputs(held, index, gradient)
            alike = (wanted is None) == (gradient is None) and (wanted is None or _close(gradient, wanted))
        if not alike:
            raise CannotWalk(
                f"outputs of the network depend on the blocks of {self.blocks.name} other than through the last; "
                "block_gradients='outputs' does without them"
            )

    @staticmethod
    def _floats(outputs: Any) -> list[Tensor]:
        """Outputs that depend on the blocks."""
        leaves = OutputTree(outputs).leaves
        return [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]

    def _top_gradient(self, held: _Held, losses: SampleLosses, draw: DrawLabels | None) -> Tensor:
        """Gradient of each sample's loss by the outputs of the last block."""
        chunk, hidden = held.chunk, held.hidden.to(self.device).requires_grad_()
        outputs, targets, scale = self._outputs(chunk, hidden), chunk.targets, torch.ones(())
        tree = OutputTree(outputs)
        if chunk.samples > 1:
            losses.names = tree.per_sample(OutputTree(self._outputs(chunk.part(0, 1), hidden[:1])), chunk.samples)
        if losses.loss_fn is None:
            scalar_loss(None, outputs, targets)  # which says so where there is none
        elif isinstance(losses.loss_fn, OwnLoss):
            losses.loss_fn.check(outputs, targets)
        if draw is not None:
            targets, factor = draw(tree.detached(), targets, chunk.samples, chunk.samples)
            scale = torch.as_tensor(factor)
            if chunk.own_loss:  # which is computed from the labels among the inputs
                outputs = self._outputs(chunk.with_targets(targets), hidden)
        try:
            (gradient,) = losses.gradients_by([hidden], outputs, targets, chunk.samples, scale)
        except CannotCut as what:
            raise CannotWalk(f"the loss needs {what}, which cannot be cut into samples") from None
        if gradient is None:
            raise CannotWalk(f"the loss does not depend on the blocks of {self.blocks.name}")
        return gradient

    def _run(self, held: _Held, index: int, hidden: Tensor | None = None) -> Tensor:
        segment = self.segments[index].takes(held.entries[index].spec, self._output)
        inputs = [x.to(self.device) if hasattr(x, "to") else x for x in self._inputs(held, index)]
        if hidden is not None:
            inputs[self._input] = hidden
        return call(segment, {}, {"leaves": inputs})

    def _inputs(self, held: _Held, index: int) -> tuple[Any, ...]:
        leaves = list(held.entries[index].leaves)
        leaves[self._input] = held.inputs[index] if held.inputs else held.hidden
        return tuple(leaves)

    def _hold(self, chunk: Chunk, entries: list[Entry]) -> _Held:
        """Put aside what blocks are called with: tensors with a row for each sample, and what all samples share."""
        # What has as many rows as there are samples, and not as many where there is one sample alone.
        alone = self._arguments(chunk.part(0, 1)) if chunk.samples > 1 and chunk.divisible else []
        per_sample = [[_length(x) == chunk.samples for x in entry.leaves] for entry in entries]
        for rows, entry in zip(per_sample, alone, strict=False):  # which is empty of a single sample
            for i, x in enumerate(entry.leaves):
                rows[i] = rows[i] and _length(x) != chunk.samples
        if not all(rows[self._input] for rows in per_sample[:1]):
            raise CannotWalk(f"the hidden states of {self.blocks.name} have no row for each sample")
        moved: dict[int, Any] = {}  # blocks are given the same objects, which are held once
        hidden = entries[0].leaves[self._input]
        for entry, rows in zip(entries, per_sample, strict=True):
            for i, x in enumerate(entry.leaves):
                if i == self._input:
                    entry.leaves[i] = None
                elif isinstance(x, Tensor) or not isinstance(x, (type(None), bool, int, float, str)):
                    if id(x) not in moved:
                        value = x.to(self.held_on) if isinstance(x, Tensor) else x
                        moved[id(x)] = (value if rows[i] and isinstance(x, Tensor) else Shared(value), x)
                    entry.leaves[i] = moved[id(x)][0]
        tokens = tokens_of(self.model, chunk.inputs)
        return _Held(chunk, entries, hidden.to(self.held_on), None if tokens is None else tokens.to(self.held_on))

    def _arguments(self, chunk: Chunk) -> list[Entry]:
        """Find what each block is called with, without running any; the hidden states are those of the first."""
        entries: list[Entry] = []

        def stand_in(index: int, args: Any, kwargs: Any) -> Any:
            if index != len(entries):
                raise CannotWalk(f"{self._path(index)} is called where {self._path(len(entries))} is to be")
            entries.append(Entry.of(args, kwargs))
            if index == len(self.modules) - 1:
                raise _Reached
            return self._returns[index](entries[0].leaves[self._input])

        with self._replaced(stand_in), contextlib.suppress(_Reached):
            call(self.model, {}, chunk.inputs)
        if len(entries) < len(self.modules):
            raise CannotWalk(f"{self._path(len(entries))} was not called")
        return entries

    @contextlib.contextmanager
    def _replaced(self, stand_in: Callable[[int, Any, Any], Any]) -> Iterator[None]:
        """Let `stand_in` run in the place of each block."""

        def replacement(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stand_in(index, args, kwargs)

        before = [module.__dict__.get("forward") for module in self.modules]
        for index, module in enumerate(self.modules):
            module.__dict__["forward"] = replacement(index)
        try:
            yield
        finally:
            for module, forward in zip(self.modules, before, strict=True):
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _trace(self, chunk: Chunk) -> None:
        """Run some samples through the whole network, find how blocks hang together, and compare."""
        entries: list[Entry] = []
        outputs: list[Any] = []
        values: list[Any] = []  # of the outputs, before the next block may change them in place

        def called(module: nn.Module, args: Any, kwargs: Any) -> None:
            if len(entries) == len(self.modules) or module is not self.modules[len(entries)]:
                raise CannotWalk(f"blocks are not called once each, in the order of {self.blocks.name}")
            entries.append(Entry.of(args, kwargs))  # before the block fills a cache

        def returned(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            values.append([x.clone() if isinstance(x, Tensor) else x for x in pytree.tree_leaves(output)])

        handles = [module.register_forward_pre_hook(called, with_kwargs=True) for module in self.modules]
        handles += [module.register_forward_hook(returned) for module in self.modules]
        try:
            call(self.model, {}, chunk.inputs)
        finally:
            for handle in handles:
                handle.remove()
        if len(outputs) < len(self.modules):
            raise CannotWalk(f"{self._path(len(outputs))} was not called")
        flow = {self._flow(i, outputs[i - 1], entries[i]) for i in range(1, len(entries))}
        if len(flow) > 1:
            raise CannotWalk(f"the blocks of {self.blocks.name} hand on their outputs in different ways")
        self._output, self._input = flow.pop()
        self._returns = [_rebuilding(output, self._output) for output in outputs]
        self._compare(chunk, entries, [leaves[self._output] for leaves in values])

    def _flow(self, index: int, outputs: Any, entry: Entry) -> tuple[int, int]:
        """Return which output of the block before is which argument of this one."""
        made = [x if isinstance(x, Tensor) else None for x in pytree.tree_leaves(outputs)]
        pairs = [(k, j) for k, y in enumerate(made) for j, x in enumerate(entry.leaves) if y is not None and x is y]
        if len(pairs) != 1:
            what = "nothing" if not pairs else f"{len(pairs)} tensors"
            raise CannotWalk(
                f"{self._path(index)} is given {what} of what {self._path(index - 1)} returns, where one tensor of "
                "hidden states is expected"
            )
        return pairs[0]

    def _compare(self, chunk: Chunk, entries: list[Entry], outputs: list[Tensor]) -> None:
        """Raise CannotWalk unless the blocks by themselves do what they do in the network."""
        held = self._hold(chunk, self._arguments(chunk))
        for index, (entry, output) in enumerate(zip(entries, outputs, strict=True)):
            pairs = zip(held.entries[index].leaves, entry.leaves, strict=True)
            for j, (found, given) in enumerate(pairs):
                value = found.held if isinstance(found, Shared) else found
                if j != self._input and isinstance(given, Tensor) and not _same(value.to(given.device), given):
                    raise CannotWalk(f"what {self._path(index)} is given, beside hidden states, is from another block")
            held.hidden = self._run(held, index)
            if not _same(held.hidden.to(output.device), output):
                raise CannotWalk(f"{self._path(index)} by itself computes another output than within the network")

    def _path(self, index: int) -> str:
        return [*self.blocks.modules][index]


def linear_loss(outputs: Tensor, gradients: Tensor) -> Tensor:
    """Return the mean over samples of a loss that has these gradients by a block's outputs."""
    return (outputs * gradients).sum() / len(outputs)


def _rebuilding(output: Any, index: int) -> Callable[[Tensor], Any]:
    """Return what makes of a tensor an output with this one's structure; its other tensors are left out."""
    leaves, spec = pytree.tree_flatten(output)
    rest = [None if isinstance(x, Tensor) else x for x in leaves]

    def rebuild(hidden: Tensor) -> Any:
        return pytree.tree_unflatten([*rest[:index], hidden, *rest[index + 1 :]], spec)

    return rebuild


def _length(leaf: Any) -> int:
    return len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else 0


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Tell whether two results are the same but for the order of sums."""
    assert a is not None
    assert b is not None
    return a.shape == b.shape and not differ(a.detach(), b.detach(), tolerance(epsilon(a)))


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether tensors are equal, but for rounding where they are floating point."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    equal = (a == b) | (a.isnan() & b.isnan())  # what is wrong with values is said where they are observed
    return bool(equal.all()) or bool(a.is_floating_point() and not differ(a, b, rounding(epsilon(a))))
