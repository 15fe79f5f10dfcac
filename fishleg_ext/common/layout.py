"""Cuts a parameter into blocks of weights. No other place knows about padding."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLayout:
    """A parameter of n entries, in row-major order, as K blocks of B; the last block is filled up with padding.

    Examples:
        >>> layout = BlockLayout((2, 3), 4)
        >>> layout.to_blocks(torch.arange(6.0).reshape(2, 3))
        tensor([[0., 1., 2., 3.],
                [4., 5., 0., 0.]])
    """

    shape: tuple[int, ...]
    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"expected block_size >= 1, got {self.block_size}")
        # A block larger than the parameter would be padding and work for nothing.
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "block_size", min(self.block_size, max(1, self.numel)))

    @property
    def numel(self) -> int:
        """Entries of the parameter, n."""
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Blocks, K = ceil(n / B)."""
        return -(-self.numel // self.block_size)

    def to_blocks(self, x: Tensor) -> Tensor:
        """[..., *shape] -> [..., K, B], zeros (or False) in the padding; a view where nothing is padded."""
        lead = x.shape[: x.dim() - len(self.shape)]
        return self.entries_to_blocks(0, x.reshape(*lead, self.numel))[1]

    def entries_to_blocks(self, first: int, x: Tensor) -> tuple[slice, Tensor]:
        """[..., n] entries, from the first of a block on -> which blocks these are, and [..., K, B] as `to_blocks`."""
        padding = -x.shape[-1] % self.block_size
        if padding:
            x = torch.nn.functional.pad(x, (0, padding))
        start, count = first // self.block_size, x.shape[-1] // self.block_size
        return slice(start, start + count), x.unflatten(-1, (count, self.block_size))

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """[..., K, B] -> [..., *shape], without the padding."""
        return blocks.flatten(-2)[..., : self.numel].reshape((*blocks.shape[:-2], *self.shape))

    def is_weight(self, device: torch.device) -> Tensor:
        """Bool [K, B], False in the padding."""
        return self.to_blocks(torch.ones(self.shape, dtype=torch.bool, device=device))
