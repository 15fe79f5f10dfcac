"""Tells how long pruning block by block takes, and how much memory, from a trial on one block of each kind."""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fishleg_ext.common.grad_mode import outside_inference_mode
from fishleg_ext.common.memory import peak_of, used_bytes
from fishleg_ext.config import SHARED, PruneConfig, documented
from fishleg_ext.observation.batches import CHUNK_SAMPLES, Adapted, BatchFunction, Chunk, checked_source, chunks
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.observation.walk import BlockWalk
from fishleg_ext.pruner import Pruner

FEW, CHUNKS = 8, 2  # samples of the small trial of a block, and batches of up to 64 of the large one


@dataclass(frozen=True)
class BlockPlan:
    """Holds what one block takes.

    Attributes:
        name: of the block.
        weights: that are pruned.
        observation: seconds to observe it.
        pruning: seconds to choose and to compensate.
        running: seconds to run it for the inputs of the next.
        curvature: bytes of its estimate and the workspace of that.
    """

    name: str
    weights: int
    observation: float
    pruning: float
    running: float
    curvature: int


@dataclass(frozen=True)
class Plan:
    """Holds what pruning block by block takes, as one round of it was predicted.

    Attributes:
        blocks: one by one.
        rounds: how often they are walked.
        start: seconds to find the inputs of the first block and, where gradients are of the network's loss, those.
        used: bytes that were in use before, the model's among them.
        hidden: bytes of hidden states, and gradients by them where these are of the loss.
        peak: bytes in use at the highest.
    """

    blocks: list[BlockPlan]
    rounds: int
    start: float
    used: int
    hidden: int
    peak: int

    @property
    def seconds(self) -> float:
        """Return the seconds of all rounds."""
        of_blocks = sum(block.observation + block.pruning + block.running for block in self.blocks)
        return self.rounds * (self.start + of_blocks)

    def table(self) -> str:
        """Return a table of the blocks, and what all of it takes."""
        rows = [
            [
                b.name,
                f"{b.weights:,}",
                f"{b.observation:.3g}",
                f"{b.pruning:.3g}",
                f"{b.running:.3g}",
                _mib(b.curvature),
            ]
            for b in self.blocks
        ]
        headers = ["block", "weights", "observe, s", "prune, s", "run, s", "curvature, MiB"]
        table = tabulate(rows, headers, tablefmt="plain", colalign=("left", *["right"] * 5), disable_numparse=True)
        rounds = f" of {self.rounds} rounds" if self.rounds > 1 else ""
        return (
            f"{table}\n\nabout {self.seconds:.3g} s{rounds}, {self.start:.3g} of these in each round for the inputs of "
            f"the first block;\nabout {_mib(self.peak)} MiB at the highest: {_mib(self.used)} are in use now, "
            f"{_mib(self.hidden)} are for hidden states"
        )


@dataclass(frozen=True)
class _Trial:
    """Holds what one block took for some samples.

    Attributes:
        size: numbers in the hidden states of these samples.
        seconds: of each stage.
        running: seconds to run the block once more.
        peak: bytes in use at the highest moment beyond those before, hidden states among them.
        hidden: bytes of what is held between blocks.
    """

    size: int
    seconds: dict[str, float]
    running: float
    peak: int
    hidden: int


@documented
@outside_inference_mode
def plan(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction | None = nn.functional.cross_entropy,
    *,
    batch_fn: BatchFunction | None = None,
    **settings: Any,
) -> Plan:
    """Predict time and memory of `prune` with `block_by_block`, from a trial on one block of each kind.

    The trial prunes a block on the two largest batches of up to 64 samples, and puts its weights back. Seconds of
    observation are extrapolated to all samples by the size of their hidden states. Memory is what the trial took at the
    highest, with the hidden states of all samples and a copy of the weights; what an allocator keeps in pieces of other
    sizes, as between batches of many lengths, comes on top.

    Args:
        model: any module; it is left as it is.
        data: as `prune` takes it.
        loss_fn, batch_fn: as `prune` takes them.
    {settings}

    Raises:
        ValueError: block_by_block is not among the settings, or what `prune` raises.
    """
    config = PruneConfig(**settings)
    if not config.block_by_block:
        raise ValueError("a plan is of pruning block by block: give block_by_block=True (--block-by-block)")
    data, loss_fn = checked_source(data, loss_fn, batch_fn)
    full = Pruner(model, dataclasses.replace(config, recomputations=1, holdout=0), loss_fn=loss_fn)
    assert full.blocks is not None
    estimator, device = full.estimator, next(iter(full.weights.values())).device
    for parameter in model.parameters():
        parameter.detach().sum()  # so that files of weights that are mapped into memory are there
    used, limit = used_bytes(device), estimator.num_grads * estimator.grad_batch_size
    walk = BlockWalk(model, full.blocks, device=device, seed=config.seed, held_on=torch.device("cpu"))
    own_loss = None if estimator.one_by_one else loss_fn is None
    walk.start(chunks(data, CHUNK_SAMPLES, limit, device, own_loss=own_loss, needs_targets=False))
    size, largest = sum(walk.sizes()), walk.largest(CHUNKS)
    del walk
    known: dict[tuple[Any, ...], list[_Trial]] = {}
    blocks, start, peak, hidden = list[BlockPlan](), 0.0, 0, 0
    for block in full.blocks.modules:
        names = [name for name in full.weights if full.blocks.of(name) == block]
        if not names:
            continue
        scope = config.scope if isinstance(config.scope, Mapping) else {}
        kind = tuple((n.removeprefix(block), tuple(full.weights[n].shape), scope.get(n)) for n in names)
        if kind not in known:
            first = largest[0]
            few = first.part(0, min(FEW, first.samples)) if first.divisible else first
            known[kind] = [_trial(model, config, full, names, parts, loss_fn) for parts in ([few], largest)]
        small, large = known[kind]
        pruning = sum(large.seconds.get(stage, 0.0) for stage in ("saliency", "selection", "compensation"))
        groups = [group for group in estimator.groups if group[0] in names]
        blocks.append(
            BlockPlan(
                block,
                sum(full.weights[name].numel() for name in names),
                _extrapolated(small, large, "observation", size),
                pruning,
                large.running * size / large.size,
                max(estimator.bytes_of(group, 0) for group in groups),
            )
        )
        start = max(start, _extrapolated(small, large, "hidden states", size))
        rest = large.hidden * max(0, size - large.size) // large.size
        hidden = max(hidden, large.hidden + rest)
        peak = max(peak, large.peak + rest)
    copies = sum(p.numel() * (p.element_size() + 1) for p in full.weights.values())  # and masks
    return Plan(blocks, config.recomputations, start, used, hidden, used + peak + copies)


def _trial(
    model: nn.Module,
    config: PruneConfig,
    full: Pruner,
    names: list[str],
    parts: list[Chunk],
    loss_fn: LossFunction | None,
) -> _Trial:
    """Prune these parameters on some samples and put them back."""
    scope, sparsity = config.scope, config.sparsity
    of_recipe: dict[str, Any] = dict.fromkeys(SHARED)
    if isinstance(scope, Mapping):
        scope = {name: share for name, share in scope.items() if name in names}
        scope, sparsity = (scope, None) if scope else ("layer", 0.0)
    if config.allocation is not None:
        scope = "layer"
    settings = dataclasses.replace(
        config,
        **of_recipe,
        curvature=dataclasses.replace(full.estimator.recipe, num_grads=sum(part.samples for part in parts)),
        allocation=None,
        params=names,
        scope=scope,
        sparsity=sparsity,
        recomputations=1,
        holdout=0,
        progress=False,
    )
    pairs = [(part.inputs, part.targets) for part in parts]
    data = pairs if parts[0].divisible else Adapted(pairs, lambda sample: [sample])
    pruner = Pruner(model, settings, data=data, loss_fn=loss_fn)
    moving = [*pruner.weights.values(), *map(model.get_parameter, pruner.estimator.known_biases.values())]
    before = [x.detach().clone() for x in moving]
    used = used_bytes(before[0].device)
    try:
        with peak_of(before[0].device) as peak:
            pruner.estimate()
            walk = pruner.estimator.walk
            assert walk is not None
            size, hidden = sum(walk.sizes()), walk.bytes_held()
            result = pruner.prune_to()
        begun = time.perf_counter()
        walk.advance()
        if before[0].is_cuda:
            torch.cuda.synchronize(before[0].device)
        apart = pruner.estimator.one_by_one and not pruner.estimator.recipe.dense_inputs
        running = time.perf_counter() - begun if apart else 0.0
        return _Trial(size, result.history[0]["seconds"], running, max(0, peak[0] - used), hidden)
    finally:
        with torch.no_grad():
            for x, values in zip(moving, before, strict=True):
                x.copy_(values)


def _extrapolated(few: _Trial, many: _Trial, stage: str, size: int) -> float:
    """Return the seconds of a stage for all samples, which grow with their size from what verification takes."""
    a, b = few.seconds.get(stage, 0.0), many.seconds.get(stage, 0.0)
    if many.size <= few.size:
        return b * size / many.size
    slope = max(0.0, b - a) / (many.size - few.size)
    return b + slope * (size - many.size)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
