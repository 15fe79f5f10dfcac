"""Finds the repeated blocks of a network, and makes each a module that runs by itself."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fishleg_ext.observation.batches import Shared


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model.

    Attributes:
        name: of the list that holds them.
        modules: name -> block, in the order in which they are called.
    """

    name: str
    modules: dict[str, nn.Module]

    def of(self, parameter: str) -> str | None:
        """Return the name of the block that a parameter lies in; None where it lies in none."""
        return next((name for name in self.modules if parameter.startswith(f"{name}.")), None)


def find_blocks(model: nn.Module, weights: Collection[str], name: str | None = None) -> Blocks:
    """Find the list of repeated blocks that holds the most of these weights.

    Args:
        model: any module.
        weights: names of parameters.
        name: of the list, to say which; None is the one with the most weights.

    Raises:
        ValueError: there is none, or a block shares parameters with another.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(block) for block in module}) == 1
        if len(module) > 1
    }
    sizes = {path: sum(model.get_parameter(w).numel() for w in weights if _inside(w, path)) for path in lists}
    if name is None:
        name = max(sizes, key=lambda path: sizes[path], default=None)
        if name is None or not sizes[name]:
            raise ValueError(
                "expected a model with a list of repeated blocks (an nn.ModuleList or nn.Sequential of modules of one "
                "class) that holds weights to prune, found none; block_by_block= takes its name"
            )
    else:  # as it is without torch.compile
        name = next((path for path in lists if path.replace("_orig_mod.", "") == name), name)
    if name not in lists:
        raise ValueError(
            f"expected the name of an nn.ModuleList or nn.Sequential of modules of one class, got {name!r}; there are "
            f"{', '.join(lists) or 'none'}"
        )
    blocks = {f"{name}.{key}" if name else key: block for key, block in lists[name].named_children()}
    owners: dict[int, str] = {}
    for path, block in blocks.items():
        for key, parameter in block.named_parameters():
            owner = owners.setdefault(id(parameter), path)
            if owner != path:
                raise ValueError(f"{path}.{key} is a parameter of {owner} as well, so that they are not block by block")
    if len({id(block) for block in lists[name]}) < len(lists[name]):
        raise ValueError(f"{name} holds a block several times, so that it is not pruned block by block")
    return Blocks(name, blocks)


def _inside(parameter: str, path: str) -> bool:
    return not path or parameter.startswith(f"{path}.")


class Segment(nn.Module):
    """One block as a function of tensors that goes by the names of the whole network.

    Args:
        path: of the block in the network.
        block: the module.
    """

    def __init__(self, path: str, block: nn.Module) -> None:
        super().__init__()
        inner: nn.Module = self
        *parents, last = path.split(".")
        for key in parents:
            held = nn.Module()
            inner.add_module(key, held)
            inner = held
        inner.add_module(last, block)
        self._call: tuple[pytree.TreeSpec, int] | None = None
        self._unit: float | None = None
        self._run_block: Callable[..., Any] = lambda *args, **kwargs: block(*args, **kwargs)

    def takes(self, spec: pytree.TreeSpec, output: int, unit: float | None = None) -> "Segment":
        """Set how the block's arguments are made of tensors, and which of its outputs is returned, in which unit."""
        self._call, self._unit = (spec, output), unit
        return self

    def forward(self, leaves: Sequence[Any], attention_mask: Tensor | None = None) -> Tensor:
        """Return the hidden states that the block makes; where they have a unit, they are zero where there is padding.

        Args:
            leaves: of the block's arguments.
            attention_mask: of the network's inputs, bool [N, T]; False where there is padding.
        """
        assert self._call is not None
        spec, output = self._call
        args, kwargs = pytree.tree_unflatten([x.value() if isinstance(x, Shared) else x for x in leaves], spec)
        hidden = pytree.tree_leaves(self._run_block(*args, **kwargs))[output]
        if self._unit is None:
            return hidden
        hidden = hidden / self._unit
        if attention_mask is None or hidden.shape[:2] != attention_mask.shape:
            return hidden
        return hidden.masked_fill(~attention_mask[..., None], 0)


@dataclass
class Entry:
    """Holds what a block was called with: the leaves of its arguments, and how they are put together."""

    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> "Entry":
        """Flatten the arguments of a call."""
        return cls(*pytree.tree_flatten((args, kwargs)))
