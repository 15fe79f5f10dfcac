"""Quantization in one call."""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.arguments import checked_flag, checked_type, one_of
from fishleg_ext.common.grad_mode import outside_inference_mode
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.common.state import Restorer
from fishleg_ext.curvature import Curvature, CurvatureError, make_curvature
from fishleg_ext.estimator import Estimator, Stopwatch
from fishleg_ext.observation.batches import BatchFunction, checked_source, require_rereadable
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction
from fishleg_ext.ops import use_impl
from fishleg_ext.ops.quantize import MAX_BITS
from fishleg_ext.quantization.allocation import allocate_bits, least_bits
from fishleg_ext.quantization.elimination import eliminate_to_codes, tables_of_blocks
from fishleg_ext.quantization.entropy import Book, mean_entropy, uniform_codebooks
from fishleg_ext.quantization.fitting import Grid, Groups
from fishleg_ext.quantization.kmeans import distortion as distortions_of
from fishleg_ext.quantization.packed import QuantizedTensor
from fishleg_ext.quantized import QuantizeResult
from fishleg_ext.sparsity.masks import Masks
from fishleg_ext.sparsity.parameters import ParameterChoice, choose_parameters, orientations_of, own_names, why_dense

DAMPING = 1e-8  # of the diagonal Fisher matrix: it is not inverted, and what no gradient reaches needs few bits
METHODS = ("codebook", "fixed_point", "obq")
MOST_PASSES = 12  # of elimination, until its codes have no more entropy than they may
WIDER = 3  # bits beyond the mean up to which the distortion of a group is measured


@outside_inference_mode
def quantize(
    model: nn.Module,
    data: Iterable[Any] | None,
    loss_fn: LossFunction | None = nn.functional.cross_entropy,
    *,
    bits: float,
    method: str = "codebook",
    group: str | int = "tensor",
    curvature: str | Curvature = "diagonal",
    masks: Mapping[str, Tensor] | None = None,
    params: ParameterChoice | None = None,
    num_grads: int | None = None,
    labels: str | None = None,
    likelihood: Likelihood | None = None,
    damping: float | None = None,
    coding: str = "fixed",
    allocate: bool = True,
    grid: str | None = None,
    order: str | None = None,
    batch_fn: BatchFunction | None = None,
    max_memory: int | None = None,
    impl: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> QuantizeResult:
    """Quantize a model in place, in one call. If anything is raised, the model is as before the call.

    Each weight is replaced by one of the few values of its group, so that the loss rises least by the curvature: by
    1/2 sum h (w - q)^2 where weights go to their nearest codes, and by 1/2 dw^T F dw where they compensate for each
    other (`method="obq"`). The importance h, by which bits, codebooks and scales are chosen, is the diagonal of F.

    Args:
        model: any module.
        data: batches as `prune` takes them; may be None where the curvature needs none, as "identity" or
            `DiagonalFisher.from_optimizer`.
        loss_fn: as in `prune`.
        bits: of a code, on average over all weights that have one, 0 < bits <= 8. Codes of all groups together never
            take more. With coding="entropy" what their entropy is at most; Huffman's code takes up to a bit a code
            more where that is below 1.
        method: "codebook" (weighted k-means; with coding="entropy" weighted means of a uniform grid), "fixed_point"
            (whole multiples of a scale), or "obq" (elimination: weights go to their codes one by one, and the others of
            their block or row compensate).
        group: what has a codebook or scale, and bits, of its own: "tensor", "row" (the weights of one output), or so
            many consecutive weights of the matrix [out, fan-in].
        curvature: a name or a recipe, as in `prune`: what is important, and for "obq" how weights compensate.
            "identity" counts squared errors of weights.
        masks: name -> bool tensor, True = kept, such as `PruneResult.masks`, of some or all of the parameters. What is
            pruned stays zero and has no code;
            with "obq" weights that are pruned by the mask but not yet zero are eliminated in the same pass. A kept
            weight that is zero counts as pruned, but for "obq". Without masks weights that are zero stay zero under
            "codebook" and "fixed_point", where zero is a code then.
        params: as in `prune`; None is the parameters of `masks`, or what `prune` would choose.
        num_grads, labels, likelihood, damping, batch_fn, max_memory, impl, seed, progress: as in `prune`; but labels
            and damping of "diagonal" are by default "model", where the likelihood is known, and 1e-8.
        coding: of the codes in the saved file, and of masks: "fixed" is as many bits as their group has, "entropy"
            Huffman's code.
        allocate: give more bits to groups in which they save more of the loss, and to none fewer than the next whole
            number below the mean. Else all have the same, a whole number, and codebooks with coding="entropy" as many
            bits of entropy, at most (with "obq" about as many). Under layerwise curvature, whose errors cannot be
            compared from layer to layer, groups of one parameter share its own budget.
        grid: what the codes of "obq" stand for, "codebook" or "fixed_point"; None is "codebook".
        order: of "obq": "cheapest" (OBQ) or "given" (GPTQ: column after column); None is "cheapest".

    Returns:
        the packed tensors, their size and distortion; `save` writes them.

    Raises:
        ValueError, TypeError: an argument that does not fit, a budget that cannot be met, NaN or inf in weights or
            gradients, masks of other parameters.
        CurvatureError: a Fisher matrix that cannot be inverted, by parameter.

    Examples:
        >>> model = nn.Linear(16, 8)
        >>> data = [(torch.randn(32, 16), torch.randint(8, (32,)))]
        >>> result = quantize(model, data, bits=4, num_grads=32, progress=False)
        >>> result.bits
        {'weight': tensor([4], dtype=torch.uint8)}
        >>> len(model.weight.unique()) <= 16
        True
    """
    checked_type("model", model, nn.Module, "an nn.Module")
    bits = _checked_bits(bits)
    one_of(*METHODS)("method", method)
    one_of("fixed", "entropy")("coding", coding)
    checked_flag("allocate", allocate)
    grid = _checked_grid(method, grid, order, coding, group)
    order = one_of("cheapest", "given")("order", order or "cheapest")
    if not allocate and bits != int(bits) and grid != "uniform":
        raise ValueError(f"expected a whole number of bits with allocate=False, got {bits}")
    if masks is not None:
        checked_type("masks", masks, Mapping, "a dict of tensors")
        masks = own_names(model, masks)
        params = list(masks) if params is None else params
    chosen = choose_parameters(model, params)
    kept = Masks(chosen)
    if masks is not None:
        kept.set({**{name: mask for name, mask in kept.items() if name not in masks}, **masks})
    orientations = orientations_of(model, chosen)
    group_sizes = {name: _group_size(group, orientation) for name, orientation in orientations.items()}
    if curvature == "diagonal":
        damping = DAMPING if damping is None else damping
        if labels is None and (loss_fn is nn.functional.cross_entropy or likelihood is not None):
            labels = "model"
    recipe = make_curvature(curvature, num_grads=num_grads, labels=labels, likelihood=likelihood, damping=damping)
    if method == "obq":
        recipe = recipe.with_saliency("exact" if order == "cheapest" else "fixed_order")
        _check_blocks(recipe, chosen, orientations)
    data, loss_fn = checked_source(data, loss_fn, batch_fn)
    estimator = Estimator(
        model,
        chosen,
        {},
        orientations,
        recipe,
        max_memory=max_memory,
        sharing=1,
        progress=progress,
        timed=Stopwatch(next(iter(chosen.values())).device),
        stage="observation",
    )
    if data is not None and method == "obq" and len(estimator.groups) > 1:
        require_rereadable(data, "obq with a curvature that is estimated in parts")
    implementation = contextlib.nullcontext() if impl == "auto" else use_impl(impl)
    with implementation, torch.no_grad(), Restorer()(chosen.values()):
        # Of weights that are yet to be pruned the curvature must know: the others compensate for them.
        alive = Masks(chosen) if method == "obq" and kept.num_revived() else kept
        estimator.begin(data, loss_fn, alive, seed=seed)
        groups = _grouped(estimator, kept, masks or {}, group_sizes, nonzero_alone=method != "obq")
        # Errors of layers' outputs cannot be compared from layer to layer: each has the same budget.
        alone = recipe.default_scope == "layer" or not allocate
        options: dict[str, Any] = {"alone": alone, "allocate": allocate, "progress": progress}
        if method == "obq":
            before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
            tensors: dict[str, QuantizedTensor] = {}
            for target in _targets(bits, tensors):
                for name, parameter in chosen.items():
                    parameter.copy_(before[name])
                grids = _grids(groups, target, grid, nearest=True, **options)
                found, distortion = _eliminated(estimator, groups, grids, kept, order, progress)
                tensors |= found
                if grid != "uniform":
                    break
        else:
            tensors, distortion = {}, 0.0
            for name, own in _grids(groups, bits, grid, nearest=False, **options).items():
                codes, of = own.codes_of(groups[name].weight), groups[name]
                tensors[name] = own.quantized(codes, of, orientations[name], chosen[name].dtype)
                errors = distortions_of(of.weight, of.importance, torch.where(of.kept, own.weights(codes), 0))
                distortion += float(errors.sum())
        for name, parameter in chosen.items():
            parameter.copy_(tensors[name].unpack())
    return QuantizeResult(
        model=model,
        tensors={name: tensors[name] for name in chosen},
        importances={name: groups[name].importance for name in groups},
        distortion=distortion,
        coding=coding,
        settings={
            "bits": bits,
            "method": method,
            "group": group,
            "curvature": str(recipe),
            "coding": coding,
            "allocate": bool(allocate),
            "grid": grid,
            "order": order if method == "obq" else None,
            "seed": seed,
        },
        dense=why_dense(model, chosen, by_default=params is None),
    )


def _check_blocks(recipe: Curvature, chosen: Mapping[str, nn.Parameter], orientations: Mapping[str, Any]) -> None:
    """Raise unless weights can compensate for each other."""
    matrices = {name: orientations[name].to_matrix(parameter.detach()) for name, parameter in chosen.items()}
    if all(recipe.layout(name, matrix).block_size == 1 for name, matrix in matrices.items()):
        raise ValueError(
            "method='obq' needs a curvature with blocks, such as 'block', 'layerwise', 'kronecker' or 'fishleg'; under "
            f"{type(recipe).__name__} no weight compensates for another"
        )


def _checked_bits(bits: Any) -> float:
    if isinstance(bits, bool) or not isinstance(bits, (int, float)):
        raise TypeError(f"expected bits to be a number, got {bits!r}")
    if not 0 < bits <= MAX_BITS:
        raise ValueError(f"expected 0 < bits <= {MAX_BITS}, got {bits}")
    return float(bits)


def _checked_grid(method: str, grid: str | None, order: str | None, coding: str, group: str | int) -> str:
    """Return "codebook", "fixed_point" or, of codebooks that are entropy-coded, "uniform"."""
    if method != "obq" and (grid is not None or order is not None):
        given = "grid" if grid is not None else "order"
        raise ValueError(f"{given} is of method='obq' alone, got it with method={method!r}")
    grid = one_of("codebook", "fixed_point")("grid", grid or ("codebook" if method == "obq" else method))
    if grid == "codebook" and coding == "entropy":
        if group != "tensor":
            raise ValueError(f"coding='entropy' takes one codebook for each tensor, got group={group!r}")
        return "uniform"
    return grid


def _group_size(group: str | int, orientation: Any) -> int:
    """Return how many consecutive weights of a matrix are a group."""
    if group == "tensor":
        return max(1, math.prod(orientation.shape))
    if group == "row":
        return max(1, orientation.fan_in)
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"expected group to be 'tensor', 'row' or an integer >= 1, got {group!r}")
    return group


def _grouped(
    estimator: Estimator,
    masks: Mapping[str, Tensor],
    masked: Collection[str],
    group_sizes: Mapping[str, int],
    *,
    nonzero_alone: bool,
) -> dict[str, Groups]:
    """Cut all parameters into groups; the importance of their weights is the diagonal of F."""
    found: dict[str, Groups] = {}
    for names in estimator.groups:
        estimate = estimator.hold(names)
        weights = estimator.oriented(estimator.weights(names))
        kept = estimator.oriented({name: masks[name] for name in names})
        for name, importance in estimate.fisher_diag().items():
            if name not in weights:
                continue
            if not importance.isfinite().all():
                raise CurvatureError(f"{name}: the diagonal of its Fisher matrix is not finite")
            mask = None
            if name in masked:  # a kept weight that is zero stays zero, too
                mask = kept[name] & (weights[name] != 0) if nonzero_alone else kept[name]
            found[name] = Groups.of(weights[name], importance, mask, group_sizes[name])
    return {name: found[name] for name in group_sizes}


def _grids(
    groups: Mapping[str, Groups],
    bits: float,
    grid: str,
    *,
    alone: bool,
    allocate: bool,
    nearest: bool,
    progress: bool,
) -> dict[str, Grid]:
    """Fit what the weights of each parameter may become, under a budget for all, or where `alone` for each."""
    together = [[name] for name in groups] if alone else [list(groups)]
    if grid == "uniform":
        flat = {name: (g.weight[g.kept], g.importance[g.kept]) for name, g in groups.items()}
        zero = {name for name, g in groups.items() if not g.masked and bool((g.kept & (g.weight == 0)).any())}
        books: dict[str, Book] = {}
        for names in together:
            weights, importances = ({n: flat[n][i] for n in names} for i in (0, 1))
            books |= uniform_codebooks(weights, importances, bits, with_zero=zero, nearest=nearest)
        return {name: Grid.of_values(*book) for name, book in books.items()}
    chosen = {n: torch.where(g.counts > 0, int(bits), 0).to(torch.uint8) for n, g in groups.items()}
    if allocate:
        most = min(MAX_BITS, math.ceil(bits) + WIDER)
        measured = progress_bar(groups.items(), what="bits", show=progress)
        distortions = {name: group.distortions(grid, most) for name, group in measured}
        for names in together:
            counts = [groups[name].counts for name in names]
            budget = math.floor(bits * sum(int(count.sum()) for count in counts))
            found = allocate_bits([distortions[name] for name in names], counts, budget, least_bits(bits))
            chosen |= dict(zip(names, found, strict=True))
    fitted = progress_bar(groups.items(), what="codes", show=progress)
    return {name: Grid.fitted(group, grid, chosen[name].to(group.weight.device)) for name, group in fitted}


def _eliminated(
    estimator: Estimator,
    groups: Mapping[str, Groups],
    grids: Mapping[str, Grid],
    masks: Mapping[str, Tensor],
    order: str,
    progress: bool,
) -> tuple[dict[str, QuantizedTensor], float]:
    """Quantize all parameters by elimination.

    The model is left as it is, so that a curvature that is estimated in parts is that of one network, unless each
    parameter's is to be that of the network quantized so far.

    Returns:
        name -> packed codes, and the cost of the whole move.
    """
    conditioned, sequential = estimator.is_conditioned_on(masks), estimator.recipe.sequential
    tensors: dict[str, QuantizedTensor] = {}
    cost = 0.0
    if sequential:
        estimator.held = []  # observed before anything was quantized
    for names in estimator.groups if sequential else reversed(estimator.groups):  # the last is still held
        estimate = estimator.hold(names)
        own_weights = estimator.weights(names)
        weights = estimator.oriented(own_weights)
        for name in progress_bar(names, what="elimination", show=progress):
            group, layout = groups[name], estimate.layouts[name]
            table = tables_of_blocks(grids[name].table(), layout, group.layout.block_size)
            flat_kept = group.kept.reshape(-1)[: layout.numel].view(layout.shape)
            rows, kept = layout.to_blocks(weights[name]), layout.to_blocks(flat_kept)
            found = []
            for part, blocks in estimate.blocks_at_a_time(name):
                own = table if len(table) == 1 else table[part]
                here = rows[part], kept[part], own
                try:
                    found.append(eliminate_to_codes(blocks, *here, order=order, conditioned=conditioned))
                except CurvatureError as error:
                    raise CurvatureError(f"{name}: {error}") from None
                del blocks  # before the next are computed
            index = layout.from_blocks(torch.cat(found)).reshape(-1)
            group_of = torch.arange(layout.numel, device=index.device) // group.layout.block_size
            codes, dtype = grids[name].of_table(index, group_of), own_weights[name].dtype
            tensors[name] = grids[name].quantized(codes, group, estimator.orientation(name), dtype)
        after = {name: tensors[name].unpack() for name in names}
        moves = {name: value - own_weights[name] for name, value in after.items()}
        cost += estimate.step_cost(estimator.oriented(moves))
        for name in names if sequential else ():
            own_weights[name].copy_(after[name])
    return tensors, cost


def _targets(bits: float, tensors: Mapping[str, QuantizedTensor]) -> Iterator[float]:
    """Yield the entropy that grids are fitted to until the codes that elimination made of them have at most `bits`."""
    target = bits
    for done in range(1, MOST_PASSES + 1):
        yield target
        if (entropy := mean_entropy(tensor.counts() for tensor in tensors.values())) <= bits:
            return
        target *= 0.995**done * bits / entropy  # the further below the more often it was missed
    raise ValueError(f"expected codes of at most {bits} bits of entropy; elimination left {entropy:.3f}")
