"""Recomputes the running statistics of BatchNorm."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fishleg_ext.common.progress import progress_bar
from fishleg_ext.observation.batches import Chunk, chunks
from fishleg_ext.observation.forward import call, running, training

BATCHNORM_SAMPLES = 128


def recalibrate_batchnorm(model: nn.Module, data: Iterable[Any], *, seed: int = 0, progress: bool = False) -> int:
    """Recompute the running statistics of every BatchNorm layer as means over all batches of the data.

    Args:
        model: any module; only running statistics change, and they not if anything is raised.
        data: as in `observe`; read to its end.
        seed: of PyTorch's RNG while the data is read.
        progress: show a progress bar.

    Returns:
        how many samples were used.

    Raises:
        ValueError: no data.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    used = 0
    with running(model, device, seed, restore_buffers=False), progress_bar(what="BatchNorm", show=progress) as bar:
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
            for chunk in chunks(data, BATCHNORM_SAMPLES, sys.maxsize, device, needs_targets=False):
                samples = chunk.samples
                if used and samples == 1:
                    break  # one sample alone may have no variance
                used += samples
                for norm in norms:
                    norm.momentum = samples / used  # so that every sample counts the same
                call(model, {}, chunk.inputs)
                bar.update(samples)
            if used == 0:
                raise ValueError("expected data that yields at least one sample, got none")
        except BaseException:
            for norm, (_, buffers) in zip(norms, before, strict=True):
                norm.load_state_dict(buffers, strict=False)
            raise
        finally:
            for norm, (momentum, _) in zip(norms, before, strict=True):
                norm.momentum = momentum
    return used


@contextlib.contextmanager
def statistics_of(
    model: nn.Module, norms: Sequence[nn.Module], chunk: Chunk, trained: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Give BatchNorm layers the statistics of these samples within this block.

    In eval mode they so normalise as in training, by constants; the running statistics lag behind.

    Args:
        model: within `running`, which gives them back the statistics that they had.
        norms: BatchNorm layers of it; a single sample has no statistics, and leaves them as they are.
        chunk: the samples.
        trained: other modules that are in training mode meanwhile.
    """
    momenta = [norm.momentum for norm in norms]
    try:
        if norms and chunk.samples > 1:
            for norm in norms:
                norm.momentum = 1.0  # type: ignore[assignment]
                norm.train()
            with training(trained):
                call(model, {}, chunk.inputs)
            for norm in norms:
                norm.eval()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
