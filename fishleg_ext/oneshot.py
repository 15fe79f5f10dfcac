"""Pruning in one call."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fishleg_ext.common.grad_mode import outside_inference_mode
from fishleg_ext.config import PruneConfig, documented
from fishleg_ext.curvature import Curvature
from fishleg_ext.observation.batches import BatchFunction, checked_source, require_rereadable
from fishleg_ext.observation.divergence import divergence
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction, output_divergence
from fishleg_ext.pruner import Pruner
from fishleg_ext.result import PruneResult
from fishleg_ext.sparsity.budget import Sparsity
from fishleg_ext.sparsity.parameters import ParameterChoice


@documented
@outside_inference_mode
def prune(
    model: nn.Module,
    data: Iterable[Any] | None,
    loss_fn: LossFunction | None = nn.functional.cross_entropy,
    *,
    sparsity: float | None = None,
    curvature: str | Curvature = "block",
    saliency: str | None = None,
    scope: str | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    params: ParameterChoice | None = None,
    num_grads: int | None = None,
    grad_batch_size: int | None = None,
    recomputations: int = 1,
    block_size: int | None = None,
    damping: float | None = None,
    labels: str | None = None,
    likelihood: Likelihood | None = None,
    recalibrate_batchnorm: bool = False,
    max_memory: int | None = None,
    impl: str = "auto",
    seed: int = 0,
    progress: bool = True,
    allocation: str | Curvature | None = None,
    min_density: float = 0.0,
    first_order: bool | float = False,
    block_by_block: bool | str = False,
    block_gradients: str = "outputs",
    offload: bool = False,
    holdout: int = 0,
    batch_fn: BatchFunction | None = None,
) -> PruneResult:
    """Prune a model in place, in one call. If anything is raised, the model is as before the call.

    Args:
        model: any module.
        data: iterable of (inputs, targets) batches; inputs a tensor, a tuple (positional) or a dict (keywords). With
            loss_fn=None a batch may be one mapping of keywords, labels among them, as Hugging Face's collators make it.
            Where labels are drawn from the model or none are needed, targets may be None, and inputs a mapping alone.
            The first dimension of tensors is the sample; what is no tensor is passed on. May be None with
            curvature="identity".
        loss_fn: (outputs, targets) -> scalar, the mean over the batch; None is the loss that the model itself returns
            as `outputs.loss`. The loss of a sample is the loss on that sample alone; class weights of a
            CrossEntropyLoss multiply it.
    {settings}
        batch_fn: what makes (inputs, targets) of each batch of data, or a list of such tuples, one for each sample,
            where samples cannot be put together.

    Raises:
        ValueError, TypeError: an argument that does not fit, or that the chosen curvature cannot use; empty data; NaN
            or inf in weights or gradients, by parameter; one-shot data that is needed more than once.
        CurvatureError: a Fisher matrix that cannot be inverted, by parameter.

    Examples:
        >>> import torch
        >>> model = nn.Linear(4, 2)
        >>> data = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> prune(model, data, sparsity=0.75, num_grads=16, progress=False).sparsity
        0.75
    """
    settings = {name: value for name, value in locals().items() if name not in ("model", "data", "loss_fn", "batch_fn")}
    config = PruneConfig(**settings)
    of_pruner = dataclasses.replace(config, recomputations=1, holdout=0)
    pruner = Pruner(model, of_pruner, data=data, loss_fn=loss_fn, batch_fn=batch_fn)
    target = pruner.target()
    if data is not None and recomputations > 1:
        require_rereadable(data, f"recomputations={recomputations}")
    if data is not None and recalibrate_batchnorm and pruner.curvature.observes:
        require_rereadable(data, "recalibrate_batchnorm=True")
    if holdout:
        if data is None:
            raise ValueError(f"holdout={holdout} needs data, got None")
        require_rereadable(data, f"holdout={holdout}")
        output_divergence(loss_fn, pruner.estimator.recipe.likelihood)
        before = {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}
    with pruner.restoring():
        for done in range(1, recomputations + 1):
            pruner.estimate()
            pruner.prune_to(_part_way(target, done / recomputations))
        result = dataclasses.replace(pruner.finalize(), config=config)
        if not holdout:
            return result
        measured = divergence(
            model,
            before,
            checked_source(data, loss_fn, batch_fn)[0],
            loss_fn,
            likelihood=pruner.estimator.recipe.likelihood,
            skip=pruner.estimator.samples if pruner.curvature.observes else 0,
            num_samples=holdout,
            seed=seed,
            progress=progress,
        )
        return dataclasses.replace(result, divergence=measured)


def _part_way(target: Sparsity, part: float) -> Sparsity:
    """The sparsity whose density lies geometrically between 1 and the target's."""
    if part == 1:
        return target
    if isinstance(target, Mapping):
        return {name: 1 - (1 - sparsity) ** part for name, sparsity in target.items()}
    return 1 - (1 - target) ** part
